// The page: pick a picture, ask, compare, and open a store.

import { call, newest } from "./api.js";
import { phases, table } from "./costs.js";
import { plain } from "./overlay.js";
import { Side } from "./side.js";

const at = (id) => document.getElementById(id);
const LARGEST = 20_000_000; // bytes of a picture: as base64 it must fit into one request

// What the sides share. `number` counts what was asked, so that a late answer to something else is known.
const page = {
  name: null, shownName: null, picture: new Image(), request: null, full: null, number: 0,
  show: { groups: true, evidence: true }, changed: costs,
};
let sides = [];

function fault(text) {
  at("fault").textContent = text;
  at("fault").hidden = text === "";
}

const look = newest(async (name, question) => {
  try {
    const found = await call("look", { picture: name });
    page.picture.src = found.preview;
    await page.picture.decode();
    page.name = name;
    plain(at("preview"), page.picture);
    const scene = found.scene === null ? "" : `, scene ${found.scene} of winnow's world`;
    at("looked").textContent = `${found.width} × ${found.height} pixels${scene}`;
    at("own-label").hidden = found.questions.length === 0;
    at("own").replaceChildren(...found.questions.map((text) => new Option(text)));
    if (found.questions.length) at("question").value = question ?? found.questions[0];
    fault("");
    forget();
    if (at("question").value.trim()) await ask();
  } catch (error) {
    fault(error.message);
  }
});

/** What was answered was about something else. */
function forget() {
  page.request = page.full = null;
  page.number++;
  at("plain").querySelector(".answer").textContent = "";
  at("plain").querySelector(".said").textContent = "";
  at("notes").replaceChildren();
  for (const side of sides) side.clear();
  costs();
}

async function ask() {
  forget();
  const question = at("question").value.trim();
  if (!page.name) return fault("Pick a picture first.");
  if (!question) {
    at("question").focus();
    return fault("Ask a question.");
  }
  fault("");
  const number = page.number;
  const request = {
    picture: page.name, question, runs: Number(at("runs").value), max_new_tokens: Number(at("tokens").value),
  };
  page.request = request;
  at("plain").classList.add("waiting");
  try {
    const found = await call("answer", { ...request, plan: "full" });
    if (number !== page.number) return;
    page.full = found;
    whole(found);
  } catch (error) {
    if (number !== page.number) return;
    page.request = null;
    return fault(error.message);
  } finally {
    at("plain").classList.remove("waiting");
  }
  costs();
  await Promise.all(sides.filter((side) => !side.root.hidden).map((side) => side.ask()));
}

function whole(found) {
  const word = document.createElement("span");
  word.className = found.truth === null ? "" : found.truth === found.answer ? "good" : "bad";
  word.textContent = found.answer || "(empty)";
  at("plain").querySelector(".answer").replaceChildren(word);
  const truth = found.truth === null ? "" : `Right answer: ${found.truth}. `;
  at("plain").querySelector(".said").textContent = `${truth}${found.stages[0].left} tokens of the picture.`;
  at("notes").replaceChildren(...found.warnings.map((text) => {
    const note = document.createElement("p");
    note.className = "alert";
    note.textContent = `${text[0].toUpperCase()}${text.slice(1)}.`.replace("..", ".");
    return note;
  }));
}

function costs() {
  const columns = [["none", page.full], ...sides.filter((side) => !side.root.hidden).map((side) => [side.letter, side.found])];
  at("costs").hidden = !page.full;
  if (!page.full) return;
  const known = columns.filter(([, found]) => found);
  table(at("table"), known);
  phases(at("phases"), known);
  const busy = known.map(([, found]) => found.busy).find(Boolean);
  const runs = page.request.runs === 1 ? "One run" : `Medians of ${page.request.runs} runs`;
  at("measured").textContent = `${runs} after a warm-up, on ${page.full.ran_on}. ` +
    (busy ? `This machine was busy (${busy}): do not rely on the times.` : "");
}

function compare() {
  sides[1].root.hidden = !at("compare").checked;
  at("sides").classList.toggle("one", !at("compare").checked);
  if (at("compare").checked) sides[1].ask();
  costs();
}

function scene(step) {
  const seed = Math.max(0, (Number(at("seed").value) || 0) + step);
  at("seed").value = seed;
  at("file").value = "";
  look(`world:${seed}`);
}

async function upload(file) {
  if (!file) return;
  if (file.size > LARGEST) return fault(`This picture has ${file.size} bytes; at most ${LARGEST} are taken.`);
  const text = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  }).catch(() => null);
  if (text === null) return fault("The browser could not read this file.");
  look(text.includes(",") ? text : "data:image/png;base64,");
}

function tabs() {
  const all = [...document.querySelectorAll("[role=tab]")];
  const choose = (tab) => {
    for (const own of all) {
      const on = own === tab;
      own.setAttribute("aria-selected", String(on));
      own.tabIndex = on ? 0 : -1;
      at(own.getAttribute("aria-controls")).hidden = !on;
    }
  };
  all.forEach((tab, nth) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = all[(nth + step + all.length) % all.length];
      next.focus();
      choose(next);
    });
  });
}

async function open(event) {
  event.preventDefault();
  const name = at("store").value;
  at("opened").textContent = `Reading ${name} …`;
  fault("");
  try {
    const { path } = await call("report", { store: name });
    at("report").src = at("alone").href = path;
    at("report").hidden = at("alone").hidden = false;
    at("opened").textContent = "";
  } catch (error) {
    at("opened").textContent = "";
    fault(error.message);
  }
}

function listen() {
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  at("seed").addEventListener("change", () => scene(0));
  at("previous").addEventListener("click", () => scene(-1));
  at("next").addEventListener("click", () => scene(1));
  at("file").addEventListener("change", () => upload(at("file").files[0]));
  at("own").addEventListener("change", () => {
    at("question").value = at("own").value;
    ask();
  });
  at("compare").addEventListener("change", compare);
  for (const name of ["groups", "evidence"]) {
    at(`show-${name}`).addEventListener("change", (event) => {
      page.show[name] = event.target.checked;
      for (const side of sides) side.draw();
    });
  }
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    upload(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => upload(event.clipboardData.files[0]));
  at("open").addEventListener("submit", open);
}

async function start() {
  tabs();
  try {
    const about = await call("about");
    at("about").textContent = `version ${about.version}, asks ${about.model}`;
    const able = about.methods.filter((own) => !own.refused && !own.cache && own.slug !== about.default);
    sides = [new Side("A", about, about.default, page), new Side("B", about, able[0]?.slug, page)];
    at("sides").append(...sides.map((side) => side.root));
    at("store").replaceChildren(...about.stores.map((name) => new Option(name)));
    at("open").hidden = about.stores.length === 0;
    if (!about.stores.length) {
      at("opened").textContent = "No store lay in the folder in which the studio was started. Name one: winnow studio --store runs.sqlite";
    }
    for (const side of sides) side.clear();
    compare();
    listen();
    scene(0);
  } catch (error) {
    fault(error.message);
  }
}

start();
