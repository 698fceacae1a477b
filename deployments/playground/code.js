// The request as code, to copy.

import { button, element } from "./dom.js";
import { snippets } from "./snippets.js";

export class Code {
  constructor(server, endpointId) {
    Object.assign(this, { server, endpointId, input: {} });
    this.pre = element("pre", { tabindex: "0", "aria-label": "Code" });
    this.said = element("span", { class: "hint", role: "status" });
    this.tabs = Object.keys(snippets(server, endpointId, {})).map((title) =>
      button(title, () => this.choose(title), { "aria-pressed": "false" }),
    );
    const copy = button("Copy", () => this.copy(), { class: "plain" });
    const head = element(
      "div",
      { class: "row spread" },
      element("div", { class: "tabs" }, this.tabs),
      element("div", { class: "row" }, this.said, copy),
    );
    this.element = element("div", {}, head, this.pre);
    this.choose(this.tabs[0].textContent);
  }

  choose(title) {
    this.title = title;
    for (const tab of this.tabs) tab.setAttribute("aria-pressed", String(tab.textContent === title));
    this.show(this.input);
  }

  show(input) {
    this.input = input;
    this.pre.textContent = snippets(this.server, this.endpointId, input)[this.title];
    this.said.textContent = "";
  }

  /** By the clipboard, or where a browser keeps it for https, by selecting the text. */
  async copy() {
    try {
      await navigator.clipboard.writeText(this.pre.textContent);
      this.said.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.pre);
      this.said.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
    }
  }
}
