// The history of an endpoint in this browser, as a row of pictures.

import { button, element, picture } from "./dom.js";

export class Past {
  /** `open` is called with the entry that is chosen. */
  constructor(history, endpointId, open) {
    Object.assign(this, { history, endpointId, open });
    this.list = element("ol", { class: "past" });
    const forget = button("Clear", () => this.clear(), { class: "quiet", "aria-label": "Clear the history" });
    const head = element("div", { class: "head" }, element("h2", {}, "History"), forget);
    this.element = element("section", { "aria-label": "History", hidden: true }, head, this.list);
  }

  show() {
    const entries = this.history.of(this.endpointId);
    this.element.hidden = !entries.length;
    this.list.replaceChildren(...entries.map((entry) => element("li", {}, this.item(entry))));
  }

  item(entry) {
    const at = new Date(entry.at).toLocaleString();
    const said = words(entry.input);
    const shown = entry.picture
      ? picture(entry.picture, { alt: "", loading: "lazy" })
      : element("span", { class: entry.state }, entry.state);
    const about = `${entry.state}, ${at}${said ? `: ${said}` : ""}`;
    return button(shown, () => this.open(entry), { title: about, "aria-label": about });
  }

  clear() {
    this.history.clear(this.endpointId);
    this.show();
  }
}

/** The first text of an input, cut to a line. */
function words(input) {
  const text =
    Object.values(input ?? {}).find((each) => typeof each === "string" && each.includes(" ")) ?? "";
  return text.length > 120 ? `${text.slice(0, 119)}…` : text;
}
