// What each answer cost: one table, and one bar of phases for each answer.

const PHASES = [
  ["encoder", "vision encoder"], ["projector", "projector"], ["select", "selection"], ["prefill", "prefill (LM)"],
  ["rest", "later tokens and the rest"],
];
const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function number(value, unit) {
  const [scale, prefix] = UNITS.find(([size]) => value >= size) ?? [1, ""];
  return `${(value / scale).toPrecision(3)} ${prefix}${unit}`;
}

const percent = (share) => `${Math.round(100 * share)} %`;

function rows(columns) {
  const last = (own) => own.stages.at(-1);
  const evidence = columns[0][1].stages[0].recall !== null;
  return [
    ["answer", (own) => own.answer || "(empty)"],
    ["visual tokens left", (own) => `${last(own).left}`],
    ["tokens per LM layer (mean)", (own) => own.tokens.mean.toFixed(1)],
    ["prefill", (own) => `${number(own.flops, "FLOP")} (${percent(own.flops / own.flops_full)})`],
    ["KV cache", (own) => `${number(own.kv_bytes, "B")} (${percent(own.kv_bytes / own.kv_bytes_full)})`],
    ...(evidence ? [["evidence kept", (own) => percent(last(own).recall)]] : []),
    ["each later token, ms", (own) => own.ms.token?.toFixed(2) ?? "–"],
    ["end to end, ms", (own) => own.ms.total.toFixed(2)],
  ];
}

function cell(kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}

/** columns: [name, answer], the first without compression. */
export function table(element, columns) {
  const head = document.createElement("thead");
  const top = head.insertRow();
  top.append(cell("th", ""), ...columns.map(([name]) => cell("th", name)));
  for (const heading of top.children) heading.scope = "col";
  const body = document.createElement("tbody");
  for (const [name, value] of rows(columns)) {
    const row = body.insertRow();
    const heading = cell("th", name);
    heading.scope = "row";
    row.append(heading, ...columns.map(([, own]) => cell("td", value(own))));
  }
  element.replaceChildren(head, body);
}

export function phases(element, columns) {
  const longest = Math.max(...columns.map(([, own]) => own.ms.total));
  element.replaceChildren(...columns.map(([name, own]) => bar(name, own.ms, longest)));
}

function bar(name, ms, longest) {
  const known = ["encoder", "projector", "select", "prefill"].reduce((sum, own) => sum + ms[own], 0);
  const times = { ...ms, rest: Math.max(0, ms.total - known) };
  const made = document.createElement("div");
  made.className = "phase";
  const line = document.createElement("div");
  line.className = "bar";
  line.style.width = `${(100 * ms.total) / longest}%`;
  const keys = document.createElement("div");
  keys.className = "keys";
  for (const [phase, said] of PHASES) {
    const part = document.createElement("i");
    part.className = phase;
    part.style.flexGrow = times[phase];
    line.append(part);
    const key = document.createElement("span");
    const mark = document.createElement("i");
    mark.className = phase;
    key.append(mark, `${said} ${times[phase].toFixed(2)}`);
    keys.append(key);
  }
  made.append(cell("strong", `${name}: ${ms.total.toFixed(2)} ms`), line, keys);
  return made;
}
