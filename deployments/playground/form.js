// The form of an endpoint: made from its spec, filled from JSON, read as JSON.

import { element } from "./dom.js";
import { make } from "./fields.js";

const PLAIN = 4; // optional fields of one value that stand in front; the others are folded
const IS_SHOWN = (field) => field.isRequired || field.spec.kind === "picture" || field.spec.isLong;
const SIMPLE = ["integer", "number", "boolean", "choice", "text", "file"];
const IS_SIMPLE = ({ spec }) => SIMPLE.includes(spec.kind) || (spec.kind === "union" && hasChoice(spec));
const hasChoice = (spec) => spec.options.some((each) => each.kind === "choice");

export class Form {
  /** `changed` is called when a value has changed; `upload` sends a file and gives its address. */
  constructor(spec, { changed, upload }) {
    this.fields = new Map(
      spec.fields.map(({ name, spec, isRequired }) => [
        name,
        make(spec, { name, isRequired, changed: () => this.changed(), upload }),
      ]),
    );
    this.tell = changed;
    const front = inFront(spec.fields);
    this.folded = [...this.fields].filter(([name]) => !front.includes(name)).map(([, field]) => field);
    this.count = element("span", { class: "hint" });
    this.more = element("details", { class: "more" }, element("summary", {}, "More settings ", this.count));
    this.more.append(...this.folded.map((field) => field.element));
    const shown = front.map((name) => this.fields.get(name).element);
    this.rest = element("ul", { class: "faults", tabindex: "-1" });
    this.element = element(
      "div",
      { class: "fields" },
      this.rest,
      shown,
      this.folded.length ? this.more : undefined,
    );
    this.settle();
  }

  /** The input as it stands: what has not been said is left out. */
  value() {
    const values = [...this.fields].map(([name, field]) => [name, field.value()]);
    return Object.fromEntries(values.filter(([, value]) => value !== undefined));
  }

  fill(values) {
    for (const [name, field] of this.fields) field.fill(values[name]);
    this.clear();
    this.changed();
  }

  /** Shows each fault at its field, goes to the first, and lists those that belong to none.
   * `detail`: fal's, [{loc: ["body", …], msg}]. */
  show(detail) {
    this.clear();
    const placed = detail.map((fault) => this.fault(fault));
    const [first] = [...this.element.querySelectorAll("[aria-invalid], .fault:not(:empty)")];
    if (this.more.querySelector("[aria-invalid], .fault:not(:empty)")) this.more.open = true;
    const target = placed.find(Boolean) ?? this.rest;
    (first ?? target).scrollIntoView?.({ block: "center" });
    target.focus({ preventScroll: true });
  }

  fault({ loc = [], msg }) {
    const [name, ...path] = loc.slice(1);
    const control = this.fields.get(name)?.fault(path, msg);
    if (!control) this.rest.append(element("li", {}, [...loc.slice(1), msg].join(": ")));
    return control;
  }

  clear() {
    this.rest.replaceChildren();
    for (const field of this.fields.values()) field.clear();
  }

  /** The first picture field, for what is pasted beside all fields. */
  get picture() {
    return [...this.fields.values()].find((field) => field.spec.kind === "picture");
  }

  changed() {
    this.settle();
    this.tell();
  }

  settle() {
    const set = this.folded.filter((field) => field.value() !== undefined).length;
    this.count.textContent = set ? `${set} of ${this.folded.length} set` : `${this.folded.length}`;
  }
}

/** The names of the fields that are not folded: what must be said first, then the pictures and prose. */
function inFront(fields) {
  const plain = fields.filter((field) => !IS_SHOWN(field) && IS_SIMPLE(field)).slice(0, PLAIN);
  const optional = fields.filter((field) => !field.isRequired && (IS_SHOWN(field) || plain.includes(field)));
  return [...fields.filter((field) => field.isRequired), ...optional].map(({ name }) => name);
}
