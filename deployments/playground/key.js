// The reader's API key: kept as long as the tab is open, sent to this server only, and shown to nobody.

import { button, element } from "./dom.js";

const NAME = "darkroom.key";

let key = sessionStorage.getItem(NAME) ?? "";

export const current = () => key;

/** A dialog that asks for the key. `check` says whether a key opens the server; `said` is called with one that does. */
export class KeyDialog {
  constructor(check, said = () => {}) {
    this.check = check;
    this.said = said;
    this.input = element("input", {
      type: "password",
      id: "key",
      autocomplete: "off",
      spellcheck: "false",
      "aria-describedby": "key-d key-f",
    });
    this.faultElement = element("p", { class: "fault", id: "key-f", role: "alert" });
    const form = element(
      "form",
      { onsubmit: (event) => this.submitted(event) },
      element("h2", { id: "key-title" }, "API key"),
      element(
        "p",
        { class: "description", id: "key-d" },
        "This server asks for one, as ID:SECRET. It stays in this tab until that is closed.",
      ),
      element("label", { for: "key", class: "unseen" }, "API key"),
      this.input,
      this.faultElement,
      element(
        "div",
        { class: "row end" },
        button("Close", () => this.element.close(), { class: "plain" }),
        element("button", { class: "main" }, "Use this key"),
      ),
    );
    this.element = element("dialog", { "aria-labelledby": "key-title" }, form);
  }

  ask(fault = "") {
    this.faultElement.textContent = fault;
    this.input.value = "";
    if (!this.element.open) this.element.showModal();
    this.input.focus();
  }

  async submitted(event) {
    event.preventDefault();
    const before = key;
    key = this.input.value.trim().replace(/^key\s+/i, "");
    try {
      if (!/^[\x21-\x7e]*$/.test(key) || !(await this.check()))
        throw new Error("The server does not know this key.");
    } catch (error) {
      key = before;
      this.ask(error.message);
      return;
    }
    sessionStorage.setItem(NAME, key);
    this.element.close();
    this.said();
  }
}
