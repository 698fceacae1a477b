// JSON whose whole numbers are exact: those too large for a number are BigInts. Seeds have 64 bits.

const TOKENS = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*/gs;

/** Raises SyntaxError, as JSON.parse does. */
export function read(text) {
  if (!/\d{16}/.test(text)) return JSON.parse(text);
  const mark = `${crypto.getRandomValues(new Uint32Array(4)).join("-")}:`; // which no text in it begins with
  const marked = text.replace(TOKENS, (token) => (isLarge(token) ? `"${mark}${token}"` : token));
  return JSON.parse(marked, (_, value) => {
    const isMarked = typeof value === "string" && value.startsWith(mark);
    return isMarked ? BigInt(value.slice(mark.length)) : value;
  });
}

const isLarge = (token) => /^-?\d{16,}$/.test(token) && !Number.isSafeInteger(Number(token));

/** As JSON.stringify with this indentation, or without any. */
export function write(value, indent = 0) {
  return written(value, { ...JSON_WORDS, indent });
}

const JSON_WORDS = { true: "true", false: "false", null: "null" };

/** A literal of a language whose strings, lists and objects look like JSON's. `style`: its words for true, false
 * and null, the indentation (0: all on one line), and whether keys are `bare` where they can be. */
export function written(value, style, margin = "") {
  if (typeof value === "string") return quoted(value);
  if (typeof value !== "object" || value === null) return style[String(value)] ?? String(value);
  const isList = Array.isArray(value);
  const inner = margin + " ".repeat(style.indent);
  const parts = isList
    ? value.map((each) => written(each, style, inner))
    : said(value).map(([name, each]) => `${key(name, style)}: ${written(each, style, inner)}`);
  const [open, close] = isList ? "[]" : "{}";
  if (!parts.length) return open + close;
  if (!style.indent) return open + parts.join(", ") + close;
  return `${open}\n${parts.map((each) => inner + each).join(",\n")}\n${margin}${close}`;
}

const said = (value) => Object.entries(value).filter(([, each]) => each !== undefined);

const key = (name, style) => (style.bare && /^[A-Za-z_]\w*$/.test(name) ? name : quoted(name));

// What cannot be seen, or turns the text around it, is spelled out.
const HIDDEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

function quoted(text) {
  return JSON.stringify(text).replace(
    HIDDEN,
    (each) => `\\u${each.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}
