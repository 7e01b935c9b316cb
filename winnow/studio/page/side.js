// One plan beside another: its method and budget, its answer, and what it kept at each point and layer.

import { call, newest } from "./api.js";
import { draw } from "./overlay.js";

const OWN = "own";

export class Side {
  /** page: {request, picture, full, show, changed}: what the sides share, and whom to tell of a new answer. */
  constructor(letter, about, slug, page) {
    this.page = page;
    this.letter = letter;
    this.found = null;
    this.root = document.querySelector("#side").content.firstElementChild.cloneNode(true);
    this.root.id = `side-${letter}`;
    const part = (name) => this.root.querySelector(name);
    this.parts = {
      method: part(".method"), own: part(".own"), plan: part(".plan"), slide: part(".slide"), budget: part(".budget"),
      alert: part(".alert"), answer: part(".answer"), canvas: part("canvas"), where: part(".where"), stage: part(".stage"),
      reads: part(".reads"), layers: part(".layers"), steps: part(".steps"),
    };
    part("h2").textContent = `Plan ${letter}`;
    this.root.setAttribute("aria-label", `Plan ${letter}`);
    this.budgets = new Map(about.methods.map((own) => [own.slug, own.budget]));
    this.#fill(about, slug);
    this.ask = newest(() => this.#ask());
    const { method, budget, plan, stage, layers } = this.parts;
    method.addEventListener("change", () => this.#chosen());
    budget.addEventListener("input", () => this.#slid());
    plan.addEventListener("change", () => this.ask());
    stage.addEventListener("input", () => this.draw());
    layers.addEventListener("click", (event) => this.#pointed(event));
    this.#chosen(false);
  }

  #fill(about, slug) {
    const sorts = [["Tokens of the picture", (own) => !own.cache], ["Slots of the cache", (own) => own.cache]];
    for (const [title, belongs] of sorts) {
      const group = document.createElement("optgroup");
      group.label = title;
      for (const own of about.methods.filter(belongs)) {
        const option = new Option(own.slug, own.slug, false, own.slug === slug);
        option.disabled = own.refused !== "";
        option.title = own.refused || own.summary;
        group.append(option);
      }
      this.parts.method.append(group);
    }
    this.parts.method.append(new Option("a plan of your own …", OWN));
  }

  #chosen(ask = true) {
    const { method, own, slide, plan } = this.parts;
    const free = method.value === OWN;
    own.hidden = !free;
    slide.hidden = free || !this.budgets.get(method.value);
    this.#say();
    if (free) plan.focus();
    else if (ask) this.ask();
  }

  #slid() {
    this.#say();
    this.ask();
  }

  #say() {
    const { slide, budget } = this.parts;
    const kept = this.found && !slide.hidden && this.asked === this.#asked() ? ` · ${this.#left()}` : "";
    slide.querySelector("output").textContent = `${budget.value} %${kept}`;
    budget.setAttribute("aria-valuetext", `${budget.value} per cent`);
  }

  #left() {
    const { stages } = this.found;
    return `${stages.at(-1).left} of ${stages[0].left} tokens`;
  }

  /** Plan and budget as a request says them. */
  #plan() {
    const { method, plan, budget, slide } = this.parts;
    if (method.value === OWN) return { plan: plan.value };
    return slide.hidden ? { plan: method.value } : { plan: method.value, keep: `${budget.value}%` };
  }

  #asked() {
    return JSON.stringify([this.#plan(), this.page.number]);
  }

  async #ask() {
    if (!this.page.request || this.root.hidden) return;
    if (this.parts.method.value === OWN && !this.parts.plan.value.trim()) return;
    const asked = this.#asked();
    this.root.classList.add("waiting");
    try {
      const found = await call("answer", { ...this.page.request, ...this.#plan() });
      if (asked !== this.#asked()) return;
      this.found = found;
      this.asked = asked;
      this.#fault("");
      this.#answered();
    } catch (error) {
      if (asked !== this.#asked()) return;
      this.clear();
      this.#fault(error.message);
    } finally {
      this.root.classList.remove("waiting");
    }
    this.page.changed();
  }

  #fault(text) {
    this.parts.alert.textContent = text;
    this.parts.alert.hidden = text === "";
  }

  /** Forget the answer, which was to something else. */
  clear() {
    this.found = null;
    const { answer, steps, reads, where, canvas } = this.parts;
    answer.textContent = steps.textContent = "";
    where.hidden = canvas.hidden = reads.hidden = true;
    this.#fault("");
    this.#say();
  }

  #answered() {
    const { stage, layers, reads, steps, where, canvas, answer } = this.parts;
    const { found } = this;
    where.hidden = canvas.hidden = reads.hidden = false;
    this.judge();
    this.#say();
    const most = found.stages[0].left;
    const bars = found.layers.map((at, layer) => {
      const bar = document.createElement("i");
      bar.style.height = `${Math.max(4, (100 * found.stages[at].left) / most)}%`;
      bar.title = `LM layer ${layer}: ${found.stages[at].left} of ${most}`;
      bar.dataset.view = found.stages.length + layer;
      return bar;
    });
    layers.replaceChildren(...bars);
    const last = found.stages.length + found.layers.length - 1;
    const before = this.seen ?? "end";
    stage.max = last;
    stage.value = before === "end" ? found.stages.length - 1 : Math.min(before, last);
    const shown = found.stages.slice(1).map((own, at) => `${own.point} · ${own.method} ${found.stages[at].left} → ${own.left}`);
    const cache = found.kv_bytes < found.kv_bytes_full;
    steps.textContent = shown.join("; ") || (cache ? "The cache alone is smaller." : "Nothing was dropped.");
    steps.append(document.createElement("br"), `plan: ${found.plan}`);
    answer.title = found.plan;
    this.draw();
  }

  /** Say how the answer compares with the right one and with that of the whole model. */
  judge() {
    if (!this.found) return;
    const { answer, truth } = this.found;
    const full = this.page.full;
    const right = truth === null ? "" : answer === truth ? "good" : "bad";
    const word = document.createElement("span");
    word.className = right;
    word.textContent = answer || "(empty)";
    const note = document.createElement("small");
    const same = full === null ? "" : answer === full.answer ? "same as without compression" : "another answer than without compression";
    note.textContent = [right && (right === "good" ? "right" : "wrong"), same].filter(Boolean).join(", ");
    this.parts.answer.replaceChildren(word, note);
  }

  #pointed(event) {
    const { view } = event.target.dataset;
    if (view === undefined) return;
    this.parts.stage.value = view;
    this.draw();
  }

  draw() {
    const { found } = this;
    if (!found) return;
    const { stage, where, canvas, layers } = this.parts;
    const view = Number(stage.value);
    this.seen = view === found.stages.length - 1 ? "end" : view;
    const layer = view - found.stages.length;
    const own = found.stages[layer < 0 ? view : found.layers[layer]];
    const at = layer >= 0 ? `LM layer ${layer}` : view === 0 ? "as encoded" : `after ${own.point} · ${own.method}`;
    const recall = own.recall === null ? "" : `, ${Math.round(100 * own.recall)} % of the evidence`;
    const said = `${at}: ${own.left} of ${found.stages[0].left} tokens${recall}`;
    where.querySelector("output").textContent = said;
    stage.setAttribute("aria-valuetext", said);
    canvas.setAttribute("aria-label", `Kept tokens over the picture, ${said}`);
    for (const bar of layers.children) bar.classList.toggle("on", Number(bar.dataset.view) === view);
    draw(canvas, this.page.picture, found, own, this.page.show);
  }
}
