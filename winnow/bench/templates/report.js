"use strict";
document.documentElement.classList.add("scripted");

// A press on a heading sorts by it; a second press turns the order round. Cells without a value stay last.
for (const table of document.querySelectorAll("table.headline")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const column = Number(button.dataset.column);
    const text = "text" in button.dataset;
    const head = button.parentElement;
    const down = head.ariaSort ? head.ariaSort === "ascending" : !text;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const found = row.cells[column] && row.cells[column].dataset.v;
      if (found === undefined || found === "") return null;
      return text ? found : Number(found);
    };
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = text ? a.localeCompare(b) : a - b;
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  });
}

for (const select of document.querySelectorAll("select.budget")) {
  select.addEventListener("change", () => {
    for (const row of select.closest(".cells").querySelectorAll("tbody tr")) {
      row.hidden = select.value !== "" && row.dataset.budget !== "" && row.dataset.budget !== select.value;
    }
  });
}

// A press on a legend entry singles its curve out in the charts above; a pointer does so while it is there.
for (const plot of document.querySelectorAll(".plot")) {
  const buttons = [...plot.querySelectorAll(".legend button")];
  const charts = plot.querySelectorAll(":scope > svg");
  const show = (names) => {
    for (const chart of charts) {
      chart.classList.toggle("single", names.size > 0);
      for (const group of chart.querySelectorAll("g[data-curve]")) {
        group.classList.toggle("on", names.has(group.dataset.curve));
      }
    }
  };
  const pressed = () => new Set(buttons.filter((b) => b.ariaPressed === "true").map((b) => b.dataset.curve));
  for (const button of buttons) {
    const name = button.dataset.curve;
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.ariaPressed !== "true"));
      show(pressed());
    });
    button.addEventListener("pointerenter", () => show(pressed().add(name)));
    button.addEventListener("pointerleave", () => show(pressed()));
  }
}

// Paper has no folds: everything is open while it prints.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
