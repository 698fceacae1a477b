// Elements of a page. Text goes in as text: nothing here reads markup, and no address that runs a script is taken.

const SHOWN = /^data:image\/(png|jpeg|webp|gif|avif);/i;

/** An element with attributes, listeners (`onclick: …`) and children, which are elements or text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((each) => each !== undefined && each !== null));
  return made;
}

export const button = (text, onclick, attributes = {}) =>
  element("button", { type: "button", onclick, ...attributes }, text);

/** The address as it may stand in a link or a picture, or undefined for one that leads nowhere good. */
export function address(text) {
  if (SHOWN.test(text)) return text;
  if (!URL.canParse(text)) return undefined;
  const url = new URL(text);
  return ["http:", "https:"].includes(url.protocol) ? url.href : undefined;
}

/** A picture; its address is checked. `attributes.alt` says what it shows. */
export function picture(text, attributes) {
  const src = address(text);
  return src === undefined ? element("span", {}, "(no picture)") : element("img", { src, ...attributes });
}

/** A link; its address is checked. */
export function link(text, href, attributes = {}) {
  const checked = address(href);
  return checked === undefined
    ? element("span", {}, text)
    : element("a", { href: checked, ...attributes }, text);
}

let count = 0;

/** An id for an element that others refer to. */
export const newId = () => `e${++count}`;

/** `num_inference_steps` → "Num inference steps". */
export function words(name) {
  const text = name.replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}
