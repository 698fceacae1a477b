// What a request came to: its pictures, its other files, and what else is told of it.

import { element, link, picture, words } from "./dom.js";
import * as json from "./json.js";

/** The pictures of an output, wherever they are in it. */
export const pictures = (output) => files(output).filter(isPicture);

export class Results {
  constructor() {
    this.element = element("section", { class: "results", "aria-label": "Result" });
  }

  clear() {
    this.element.replaceChildren();
  }

  /** `facts`: {label: text} that stand before what the output says. */
  show(output, facts) {
    const found = files(output);
    const shown = found.filter(isPicture);
    const figures = shown.map((file, index) => figure(file, `Picture ${index + 1} of ${shown.length}`));
    const others = found
      .filter((file) => !isPicture(file))
      .map((file) => element("li", {}, download(file, file.file_name ?? "File")));
    this.element.replaceChildren(
      element("div", { class: `pictures ${figures.length === 1 ? "single" : ""}` }, figures),
      others.length ? element("ul", {}, others) : "",
      element("dl", { class: "facts" }, Object.entries({ ...facts, ...told(output) }).flatMap(fact)),
      element(
        "details",
        { class: "raw" },
        element("summary", {}, "Output as JSON"),
        element("pre", { tabindex: "0" }, short(json.write(output, 2))),
      ),
    );
  }

  fail(message, facts = {}) {
    this.element.replaceChildren(
      element("p", { class: "failure", role: "alert" }, message),
      element("dl", { class: "facts" }, Object.entries(facts).flatMap(fact)),
    );
  }
}

/** Objects with an address, at any depth. */
function files(value) {
  if (typeof value !== "object" || value === null) return [];
  if (typeof value.url === "string") return [value];
  return Object.values(value).flatMap(files);
}

const isPicture = (file) => (file.content_type ?? "image/").startsWith("image/");

function figure(file, name) {
  const size = file.width && file.height ? { width: file.width, height: file.height } : {};
  const image = picture(file.url, { alt: name, ...size });
  const facts = [file.width && `${file.width} × ${file.height}`, kind(file), bytes(file)]
    .filter(Boolean)
    .join(" · ");
  const caption = element(
    "figcaption",
    {},
    element("span", {}, facts),
    download(file, "Download", `Download ${name.toLowerCase()}`),
  );
  return element(
    "figure",
    {},
    link(image, file.url, { target: "_blank", rel: "noopener", "aria-label": `Open ${name.toLowerCase()}` }),
    caption,
  );
}

function download(file, text, label) {
  return link(text, file.url, {
    download: file.file_name ?? "",
    rel: "noopener",
    ...(label && { "aria-label": label }),
  });
}

const kind = (file) => (file.content_type ?? "").replace(/^image\//, "").toUpperCase();

function bytes({ file_size: size, url }) {
  const count =
    size ?? (url.startsWith("data:") ? Math.floor((url.length - url.indexOf(",") - 1) * 0.75) : undefined);
  if (count === undefined) return undefined;
  return count < 1e6 ? `${Math.ceil(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

/** What an output says beside its files. */
function told(output) {
  const rest = Object.entries(output).filter(([, value]) => value !== null && !files(value).length);
  return Object.fromEntries(
    rest.map(([name, value]) => [words(name), plain(value)]).filter(([, text]) => text !== ""),
  );
}

/** A value in words. */
export function plain(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (typeof value === "object")
    return Object.entries(value)
      .map(([name, each]) => `${words(name)} ${seconds(each)}`)
      .join(", ");
  return String(value);
}

const seconds = (value) => (typeof value === "number" ? `${value.toFixed(2)} s` : plain(value));

const fact = ([name, text]) => [element("dt", {}, name), element("dd", {}, text)];

/** Without the bytes of files in it. */
const short = (text) => text.replace(/(data:[\w/+.-]+;base64,[A-Za-z0-9+/]{24})[A-Za-z0-9+/=]+/g, "$1…");
