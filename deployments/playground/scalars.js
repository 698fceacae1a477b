// Fields of one value. A field that nobody has touched has no value: it shows its default, and is not sent.

import { button, element, newId, words } from "./dom.js";
import * as json from "./json.js";

/** What all fields have in common: a label, what may be said of the value, and what is wrong with it.
 *
 * `place`: {name, isRequired, changed}. Subclasses have `control`, and `write(value)`, which shows a value, or
 * the default for undefined, and `read()`, which gives the value that is shown. */
export class Scalar {
  constructor(spec, place) {
    this.spec = spec;
    this.place = place;
    this.isSet = false;
    this.id = newId();
  }

  /** Builds the element, once the control is there. */
  build(control, ...more) {
    this.control = control;
    const description = element("p", { class: "description", id: `${this.id}-d` }, this.spec.description);
    this.faultElement = element("p", { class: "fault", id: `${this.id}-f` });
    this.resetButton = button("Reset", () => this.reset(), { class: "quiet reset" });
    this.title = element("span");
    control.id = this.id;
    control.setAttribute("aria-describedby", `${this.id}-d ${this.id}-f`);
    if (this.place.isRequired) control.setAttribute("aria-required", "true");
    control.addEventListener("input", () => this.edited());
    const label = element("label", { for: this.id }, this.title, mark(this.place));
    const head = element(
      "div",
      { class: "head" },
      label,
      element("span", { class: "hint" }, this.hint()),
      this.resetButton,
    );
    this.element = element("div", { class: "field" }, head, control, more, description, this.faultElement);
    this.rename(this.place.name);
    this.fill(undefined);
  }

  rename(name) {
    this.place.name = name;
    this.title.textContent = words(name);
    this.resetButton.setAttribute("aria-label", `Reset ${words(name)}`);
  }

  hint() {
    return "";
  }

  isBlank() {
    return this.control.value === "";
  }

  edited() {
    this.isSet = !this.isBlank();
    this.settle();
    this.place.changed();
  }

  reset() {
    this.fill(undefined);
    this.place.changed();
    this.control.focus();
  }

  value() {
    return this.isSet ? this.read() : undefined;
  }

  fill(value) {
    this.isSet = value !== undefined && value !== null;
    this.write(this.isSet ? value : undefined);
    this.settle();
  }

  /** What follows from a change. */
  settle() {
    const isDefault =
      this.spec.default !== undefined && json.write(this.value()) === json.write(this.spec.default);
    this.resetButton.hidden = !this.isSet || this.place.isRequired || isDefault;
    this.clear();
  }

  fault(_, message) {
    this.faultElement.textContent = message;
    this.control.setAttribute("aria-invalid", "true");
    return this.control;
  }

  clear() {
    this.faultElement.textContent = "";
    this.control.removeAttribute("aria-invalid");
  }
}

export class Text extends Scalar {
  constructor(spec, place) {
    super(spec, place);
    const tag = spec.isLong ? "textarea" : "input";
    this.build(
      element(tag, spec.isLong ? { rows: 3 } : { type: "text", autocomplete: "off", spellcheck: "false" }),
    );
  }

  hint() {
    return this.spec.most ? `up to ${counted(this.spec.most)} characters` : "";
  }

  read() {
    return this.control.value;
  }

  write(value) {
    this.control.value = value ?? "";
    this.control.placeholder = this.spec.default ?? "";
  }
}

/** A number as text, so that what is wrong with it can be told, and a slider where it has both bounds. */
export class NumberField extends Scalar {
  constructor(spec, place) {
    super(spec, place);
    const mode = spec.kind === "integer" && spec.min >= 0 ? "numeric" : "text";
    const control = element("input", { type: "text", inputmode: mode, autocomplete: "off", class: "number" });
    this.slider = hasSlider(spec) ? this.sliderOf(spec) : undefined;
    this.build(control);
    const row = element("div", { class: "row" });
    control.before(row);
    row.append(...[this.slider, control].filter(Boolean));
  }

  rename(name) {
    super.rename(name);
    this.slider?.setAttribute("aria-label", `${words(name)}, slider`);
  }

  sliderOf(spec) {
    const slider = element("input", {
      type: "range",
      min: spec.min,
      max: spec.max,
      step: stepOf(spec),
    });
    slider.addEventListener("input", () => {
      this.control.value = slider.value;
      this.edited();
    });
    return slider;
  }

  hint() {
    const { min, max, isOpen } = this.spec;
    if (isSmall(min) && isSmall(max)) return `${isOpen ? "above " : ""}${min} – ${max}`;
    if (isSmall(min)) return isOpen ? `above ${min}` : `from ${min}`;
    if (isSmall(max)) return `up to ${max}`;
    return this.spec.kind === "integer" ? "a whole number" : "";
  }

  read() {
    return numberOf(this.control.value);
  }

  write(value) {
    this.control.value = value === undefined ? "" : String(value);
    this.control.placeholder = this.spec.default === undefined ? "" : String(this.spec.default);
  }

  settle() {
    super.settle();
    if (this.slider)
      this.slider.value = this.isSet ? this.control.value : (this.spec.default ?? this.spec.min);
  }
}

const isSmall = (bound) => Math.abs(bound) < 1e9;
const hasSlider = ({ kind, min, max }) =>
  isSmall(min) && isSmall(max) && (kind === "number" || max - min <= 1000);

function stepOf({ kind, min, max }) {
  if (kind === "integer") return 1;
  return max - min <= 10 ? 0.01 : 0.1;
}

/** The number that a text says, exactly; what says none stays text, and the server tells what it wants. */
export function numberOf(text) {
  const plain = text.trim();
  if (/^[+-]?\d+$/.test(plain)) return Number.isSafeInteger(Number(plain)) ? Number(plain) : BigInt(plain);
  const number = Number(plain);
  return plain !== "" && Number.isFinite(number) ? number : text;
}

/** Numbers between commas or blanks. */
export class Numbers extends Scalar {
  constructor(spec, place) {
    super(spec, place);
    this.build(element("input", { type: "text", autocomplete: "off" }));
  }

  hint() {
    const numbers = "numbers between commas";
    return this.spec.most ? `${numbers}, up to ${counted(this.spec.most)}` : numbers;
  }

  read() {
    return this.control.value
      .split(/[\s,;]+/)
      .filter((each) => each !== "")
      .map(numberOf);
  }

  write(value) {
    this.control.value = (value ?? []).join(", ");
    this.control.placeholder = (this.spec.default ?? []).join(", ");
  }
}

export class Switch extends Scalar {
  constructor(spec, place) {
    super(spec, place);
    this.build(element("input", { type: "checkbox", role: "switch" }));
    this.element.classList.add("switch");
  }

  isBlank() {
    return false;
  }

  read() {
    return this.control.checked;
  }

  write(value) {
    this.control.checked = value ?? this.spec.default ?? false;
  }
}

export class Choice extends Scalar {
  constructor(spec, place) {
    super(spec, place);
    this.build(
      element(
        "select",
        {},
        choices(spec, place),
        spec.values.map((each, index) => option(index, each)),
      ),
    );
  }

  read() {
    return this.spec.values[Number(this.control.value)];
  }

  write(value) {
    const index = this.spec.values.indexOf(value);
    this.control.value = index < 0 ? "" : String(index);
  }
}

export const counted = (number) => number.toLocaleString("en");

/** Says that a value is needed. */
export function mark({ isRequired }) {
  return isRequired ? element("span", { class: "required", "aria-hidden": "true" }, " *") : undefined;
}

export const option = (value, text) => element("option", { value: String(value) }, String(text));

/** What a select shows while nothing is chosen. */
export function choices(spec, place) {
  if (typeof spec.default === "string") return option("", `Default: ${spec.default}`);
  return option("", place.isRequired ? "Choose…" : "Not set");
}

/** Anything, as JSON. */
export class Json extends Scalar {
  constructor(spec, place) {
    super(spec, place);
    this.build(element("textarea", { rows: 2, class: "code", spellcheck: "false" }));
  }

  hint() {
    return "JSON";
  }

  read() {
    try {
      return json.read(this.control.value);
    } catch {
      return this.control.value;
    }
  }

  write(value) {
    this.control.value = value === undefined ? "" : json.write(value);
    this.control.placeholder = this.spec.default === undefined ? "" : json.write(this.spec.default);
  }
}
