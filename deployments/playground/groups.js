// Fields of several values: objects, lists, maps, and values that may be of one kind or another.
//
// As the others: `value()` is undefined where nobody has said anything, `fill(value)` shows a value, or the default
// for undefined, `fault(path, message)` tells what is wrong at a path below and gives the control that it is about,
// or undefined where it leads to none, `clear()` forgets that, `rename(name)` is for an item that has become another
// one of its list. `place.make` makes the fields inside.

import { button, element, newId, words } from "./dom.js";
import { counted, mark, option } from "./scalars.js";
import { fits } from "./schema.js";

const EMPTY = { object: () => ({}), map: () => ({}), list: () => [], numbers: () => [] };

/** What all of these have in common: a frame with a legend. */
class Group {
  constructor(spec, place) {
    this.spec = spec;
    this.place = place;
    this.isSet = false;
    this.faultElement = element("p", { class: "fault" });
    this.body = element("div", { class: "fields" });
    this.title = element("span", {}, words(place.name));
    const legend = element("legend", {}, this.title, mark(place));
    const description = spec.description && element("p", { class: "description" }, spec.description);
    this.element = element("fieldset", { class: "group" }, legend, description, this.body, this.faultElement);
    this.element.tabIndex = -1; // where the focus goes if the fault is of the whole
  }

  inside(name, isRequired = false) {
    return { ...this.place, name, isRequired };
  }

  rename(name) {
    this.place.name = name;
    this.title.textContent = words(name);
  }

  told(message) {
    this.faultElement.textContent = message;
    return this.element;
  }

  clear() {
    this.faultElement.textContent = "";
  }
}

export class ObjectField extends Group {
  constructor(spec, place) {
    super(spec, place);
    this.fields = new Map(
      spec.fields.map(({ name, spec, isRequired }) => [
        name,
        place.make(spec, this.inside(name, isRequired)),
      ]),
    );
    this.body.append(...[...this.fields.values()].map((field) => field.element));
  }

  value() {
    const values = [...this.fields].map(([name, field]) => [name, field.value()]);
    const given = values.filter(([, value]) => value !== undefined);
    return this.isSet || given.length ? Object.fromEntries(given) : undefined;
  }

  fill(value) {
    this.isSet = value !== undefined && value !== null;
    for (const [name, field] of this.fields) field.fill(value?.[name]);
  }

  fault([name, ...rest], message) {
    return this.fields.get(name)?.fault(rest, message) ?? this.told(message);
  }

  clear() {
    super.clear();
    for (const field of this.fields.values()) field.clear();
  }
}

/** Values one after another, which can be added and removed. */
export class List extends Group {
  constructor(spec, place) {
    super(spec, place);
    this.rows = [];
    this.items = element("ol", { class: "items" });
    this.addButton = button("Add", () => this.added(), { class: "plain" });
    const most = spec.most && element("span", { class: "hint" }, `up to ${counted(spec.most)}`);
    this.body.append(this.items, element("div", { class: "row" }, this.addButton, most));
    this.rename(place.name);
    this.fill(undefined);
  }

  rename(name) {
    super.rename(name);
    this.addButton.setAttribute("aria-label", `Add to ${words(name)}`);
    this.number();
  }

  /** Names the items by their places. */
  number() {
    for (const [index, { field, remove }] of this.rows.entries()) {
      const name = `${this.place.name} ${index + 1}`;
      field.rename(name);
      remove.setAttribute("aria-label", `Remove ${words(name)}`);
    }
  }

  value() {
    return this.isSet
      ? this.rows.map(({ field }) => field.value() ?? EMPTY[field.spec.kind]?.() ?? "")
      : undefined;
  }

  fill(value) {
    this.isSet = value !== undefined && value !== null;
    this.rows = [];
    this.items.replaceChildren();
    for (const each of value ?? []) this.append().field.fill(each);
    this.settle();
  }

  added() {
    this.isSet = true;
    const { row } = this.append();
    this.settle();
    this.place.changed();
    row.querySelector("input, textarea, select, button")?.focus();
  }

  removed(gone) {
    this.rows = this.rows.filter((each) => each !== gone);
    gone.row.remove();
    this.settle();
    this.place.changed();
    this.addButton.focus();
  }

  append() {
    const field = this.place.make(this.spec.item, this.inside(this.place.name, true));
    const remove = button("Remove", () => this.removed(made), { class: "quiet" });
    const made = { field, remove, row: element("li", {}, field.element, remove) };
    this.rows.push(made);
    this.items.append(made.row);
    return made;
  }

  settle() {
    this.number();
    this.addButton.disabled = this.rows.length >= (this.spec.most ?? Infinity);
    this.clear();
  }

  fault([index, ...rest], message) {
    return this.rows[index]?.field.fault(rest, message) ?? this.told(message);
  }

  clear() {
    super.clear();
    for (const { field } of this.rows) field.clear();
  }
}

/** Values by names of the caller's. */
export class MapField extends Group {
  constructor(spec, place) {
    super(spec, place);
    const name = { kind: "text", description: "" };
    const pair = {
      kind: "object",
      description: "",
      fields: [{ name: "name", spec: name, isRequired: true }],
    };
    pair.fields.push({ name: "value", spec: spec.item, isRequired: true });
    this.list = new List({ kind: "list", item: pair, description: "" }, place);
    this.list.element.firstChild.hidden = true;
    this.body.append(this.list.element);
  }

  rename(name) {
    super.rename(name);
    this.list.rename(name);
  }

  value() {
    const rows = this.list.value();
    return rows && Object.fromEntries(rows.map((row) => [row.name ?? "", row.value ?? null]));
  }

  fill(value) {
    this.list.fill(value && Object.entries(value).map(([name, each]) => ({ name, value: each })));
  }

  fault([name], message) {
    const index = (this.list.value() ?? []).findIndex((row) => row.name === name);
    return index < 0 ? this.told(message) : this.list.fault([index, "value"], message);
  }

  clear() {
    super.clear();
    this.list.clear();
  }
}

/** A value of one kind or another: a select says which; the values of a choice stand in it themselves. */
export class Union {
  constructor(spec, place) {
    this.spec = spec;
    this.place = place;
    this.entries = spec.options.flatMap(entriesOf);
    const id = newId();
    this.select = element("select", {
      id,
      "aria-describedby": `${id}-d ${id}-f`,
      onchange: () => this.chosen(),
    });
    this.select.append(
      option("", this.unset()),
      ...this.entries.map((entry, index) => option(index, entry.text)),
    );
    this.faultElement = element("p", { class: "fault", id: `${id}-f` });
    this.inner = element("div", { class: "inner" });
    this.title = element("span", {}, words(place.name));
    const label = element("label", { for: id }, this.title, mark(place));
    this.element = element(
      "div",
      { class: "field" },
      element("div", { class: "head" }, label),
      this.select,
      element("p", { class: "description", id: `${id}-d` }, spec.description),
      this.inner,
      this.faultElement,
    );
    this.fill(undefined);
  }

  rename(name) {
    this.place.name = name;
    this.title.textContent = words(name);
    this.field?.rename(this.insideName());
  }

  insideName() {
    return `${this.place.name}, ${String(this.entry.text).toLowerCase()}`;
  }

  unset() {
    const { default: value } = this.spec;
    if (value === undefined || typeof value === "object")
      return this.place.isRequired ? "Choose…" : "Not set";
    return `Default: ${value}`;
  }

  get entry() {
    return this.entries[this.select.value === "" ? -1 : Number(this.select.value)];
  }

  value() {
    if (this.entry === undefined) return undefined;
    return this.field ? (this.field.value() ?? EMPTY[this.entry.spec.kind]?.()) : this.entry.value;
  }

  fill(value) {
    const index =
      value === undefined || value === null ? -1 : this.entries.findIndex((entry) => takes(entry, value));
    this.show(index < 0 ? this.first() : index);
    if (index >= 0) this.field?.fill(value);
  }

  /** What stands there before anything is chosen: where a value is needed, the first that has a field. */
  first() {
    return this.place.isRequired && this.spec.default === undefined
      ? this.entries.findIndex((entry) => !entry.value)
      : -1;
  }

  chosen() {
    this.show(this.entry ? this.entries.indexOf(this.entry) : -1);
    this.place.changed();
  }

  show(index) {
    this.select.value = index < 0 ? "" : String(index);
    const { spec, value } = this.entries[index] ?? {};
    this.field =
      spec && value === undefined
        ? this.place.make(spec, { ...this.place, name: this.insideName(), isRequired: false })
        : undefined;
    this.inner.replaceChildren(...(this.field ? [this.field.element] : []));
    this.clear();
  }

  fault(path, message) {
    const isOfWhole = !path.length && this.field instanceof Group;
    const control = isOfWhole ? undefined : this.field?.fault(path, message);
    if (control) return control;
    this.faultElement.textContent = message;
    this.select.setAttribute("aria-invalid", "true");
    return this.select;
  }

  clear() {
    this.faultElement.textContent = "";
    this.select.removeAttribute("aria-invalid");
    this.field?.clear();
  }
}

function entriesOf(spec) {
  if (spec.kind !== "choice") return [{ spec, text: title(spec) }];
  return spec.values.map((value) => ({ spec, text: value, value }));
}

const takes = (entry, value) => (entry.value === undefined ? fits(entry.spec, value) : entry.value === value);

function title(spec) {
  const titles = {
    object: "Custom",
    list: "Several",
    map: "By name",
    number: "One number",
    picture: "One",
    text: "One",
    file: "One",
  };
  return titles[spec.kind] ?? words(spec.kind);
}
