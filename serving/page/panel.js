// One way to label the post: its controls, its request, its answer.

import { postLabel } from "./api.js";
import { draw, leavesOut } from "./picture.js";

const STAGES = [
  ["image", "Image"], ["queue", "Queue"], ["prefill", "Prefill"],
  ["decode", "Decode"], ["explain", "Explain"], ["other", "Other"],
];
const PAUSE_MS = 250;

const element = (tag, className = "", text = "") =>
  Object.assign(document.createElement(tag), { className, textContent: text });
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

export class Panel {
  #aborter = null;
  #timer = 0;
  #answer = null;
  #shown = null;

  /**
   * @param {string} name "A" or "B"
   * @param {object} served body of /v1/models
   * @param {{post: () => object, look: () => object, changed: () => void, say: (s: string) => void}} page
   */
  constructor(name, served, page) {
    this.name = name;
    this.page = page;
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.root.setAttribute("aria-label", `Labels ${name}`);
    this.part = (part) => this.root.querySelector(`[data-part="${part}"]`);
    this.#fill(served);
    for (const part of ["model", "structure", "selector"])
      this.part(part).addEventListener("change", () => this.#change(part));
    this.part("ratio").addEventListener("input", () => this.#change("ratio"));
  }

  #fill(served) {
    this.served = served;
    const models = served.data.map((card) => [card.id, card.parent ? card.id : `${card.id} (base)`]);
    const first = served.data.find((card) => card.parent) ?? served.data[0];
    this.#options("model", models, first.id);
    this.#options("selector", served.selectors.map((name) => [name, name]), first.selector);
    this.part("ratio").value = first.retention_ratio;
    this.#fillStructures();
    this.#showRatio();
  }

  #options(part, entries, chosen) {
    this.part(part).replaceChildren(
      ...entries.map(([value, text]) => new Option(text, value, false, value === chosen)),
    );
  }

  #fillStructures() {
    const own = this.card.label_structure;
    const names = Object.entries(this.served.label_structures);
    this.#options("structure", names.map(([name, fields]) => {
      const few = Object.keys(fields).join(", ");
      return [name, few === name ? name : `${name} (${few})`];
    }), own);
  }

  get card() {
    return this.served.data.find((card) => card.id === this.part("model").value);
  }

  /** Takes another panel's settings, with a ratio of its own. */
  copy(other, ratio) {
    this.part("model").value = other.part("model").value;
    this.#fillStructures();
    this.part("structure").value = other.part("structure").value;
    this.part("selector").value = other.part("selector").value;
    this.part("ratio").value = ratio;
    this.#showRatio();
  }

  #change(part) {
    if (part === "model") {
      this.#fillStructures();
      this.part("selector").value = this.card.selector;
    }
    this.#showRatio();
    this.page.changed();
    this.later(part === "ratio" ? PAUSE_MS : 0);
  }

  #showRatio() {
    const ratio = Number(this.part("ratio").value), patches = this.served.patches;
    const kept = Math.max(1, Math.floor(ratio * patches + 0.5));
    this.part("ratio-text").replaceChildren(
      element("span", "of", `${kept} of ${patches} patches`), ratio.toFixed(2));
    this.part("ratio").setAttribute("aria-valuetext", `${ratio.toFixed(2)}, ${kept} of ${patches} patches`);
  }

  /** The request's body without the image. */
  body() {
    return {
      text: this.page.post().text,
      model: this.part("model").value,
      label_structure: this.part("structure").value,
      retention_ratio: Number(this.part("ratio").value),
      selector: this.part("selector").value,
    };
  }

  /** Labels after a pause; what was asked before is given up. */
  later(pause = PAUSE_MS) {
    clearTimeout(this.#timer);
    const { image, text } = this.page.post();
    if (!image && !text) return this.clear();
    this.#timer = setTimeout(() => this.run(), pause);
  }

  /** Asks the server; the answer is shown unless something newer was asked meanwhile. */
  async run() {
    clearTimeout(this.#timer);
    this.#aborter?.abort();
    const mine = (this.#aborter = new AbortController());
    const { image } = this.page.post();
    const body = { ...this.body(), ...(image && { image: image.url, explain: true }) };
    this.root.setAttribute("aria-busy", "true");
    try {
      const answer = await postLabel(body, mine.signal);
      if (mine === this.#aborter) this.#show(answer, image);
    } catch (error) {
      if (mine === this.#aborter && error.name !== "AbortError") this.#fail(error);
    } finally {
      if (mine === this.#aborter) this.root.removeAttribute("aria-busy");
    }
  }

  stop() {
    clearTimeout(this.#timer);
    this.#aborter?.abort();
    this.#aborter = null;
    this.root.removeAttribute("aria-busy");
  }

  clear() {
    this.stop();
    this.#answer = this.#shown = null;
    this.part("error").hidden = this.part("figure").hidden = true;
    this.part("empty").hidden = false;
    for (const part of ["labels", "tokens", "time"]) this.part(part).replaceChildren();
  }

  #fail(error) {
    this.clear();
    this.part("empty").hidden = true;
    this.part("error").hidden = false;
    this.part("error").textContent = error.message;
  }

  #show(answer, image) {
    this.part("error").hidden = this.part("empty").hidden = true;
    this.#answer = answer;
    this.#shown = image;
    this.#showLabels();
    this.#showTokens();
    this.#showTime();
    this.redraw();
    const labels = Object.entries(answer.labels).map(([field, label]) =>
      `${field} ${label} ${percent(answer.probabilities[field][label])}`);
    const { kept, patches } = answer.retention;
    this.page.say(`${this.name}: ${labels.join(", ")}. ${kept} of ${patches} patches kept.`);
  }

  redraw() {
    const answer = this.#answer, image = this.#shown;
    this.part("figure").hidden = !image?.bitmap || !answer;
    if (this.part("figure").hidden) return;
    const explanation = answer.explanations?.[0] ?? null;
    draw(this.part("canvas"), image.bitmap, explanation, this.page.look());
    const [rows, columns] = explanation.grid;
    const said = `${explanation.kept.length} of ${rows * columns} patches kept by ${answer.retention.selector}`;
    const cut = leavesOut(explanation, image.bitmap) ? "; outside the frame the checkpoint sees nothing" : "";
    this.part("caption").textContent = `${said}, grid ${columns} × ${rows}${cut}`;
    this.part("canvas").setAttribute("aria-label", `The image with ${said}`);
  }

  #showLabels() {
    const { labels, probabilities } = this.#answer;
    this.part("labels").replaceChildren(...Object.entries(probabilities).map(([field, shares]) => {
      const group = element("section", "label-field");
      const head = element("h4", "", field);
      head.append(element("strong", "", labels[field]));
      const list = element("ul", "bars");
      for (const [label, share] of Object.entries(shares)) {
        const item = element("li", label === labels[field] ? "chosen" : "");
        const track = element("span", "track"), bar = element("span", "fill");
        bar.style.setProperty("width", `${100 * share}%`);
        track.append(bar);
        item.append(element("span", "name", label), track, element("span", "share", percent(share)));
        list.append(item);
      }
      group.append(head, list);
      return group;
    }));
  }

  #showTokens() {
    const { kept, patches } = this.#answer.retention, { usage } = this.#answer;
    const facts = [
      [kept, "visual tokens kept"],
      [patches - kept, patches ? `saved of ${patches}` : "saved"],
      [usage.prompt_tokens, "prompt tokens"],
    ];
    this.part("tokens").replaceChildren(...facts.map(([number, text]) => {
      const fact = element("p", "fact");
      fact.append(element("strong", "", String(number)), element("span", "", text));
      return fact;
    }));
  }

  #showTime() {
    const timing = { ...this.#answer.timing_ms };
    const { total } = timing;
    const named = STAGES.reduce((sum, [stage]) => sum + (timing[stage] ?? 0), 0);
    timing.other = Math.max(0, total - named);
    const head = element("h4", "", "Time in the server");
    head.append(element("strong", "", ms(total)));
    const bar = element("div", "stack"), legend = element("ul", "legend");
    for (const [stage, title] of STAGES) {
      if (!(timing[stage] > 0)) continue;
      const part = element("span", `stage ${stage}`);
      part.style.setProperty("flex-grow", String(timing[stage]));
      bar.append(part);
      const item = element("li");
      item.append(element("span", `dot ${stage}`), `${title} ${ms(timing[stage])}`);
      legend.append(item);
    }
    bar.setAttribute("aria-hidden", "true");
    this.part("time").replaceChildren(head, bar, legend);
  }
}
