// Fields for files: an address, or a file that is chosen, dropped or pasted, which is uploaded.

import { SERVER } from "./api.js";
import { address, button, element, picture, words } from "./dom.js";
import { Scalar } from "./scalars.js";

/** A file of weights, or of whatever else the server reads; a name of the server's or of a hub's does as well. */
export class FileField extends Scalar {
  constructor(spec, place, accept = "") {
    super(spec, place);
    const control = element("input", { type: "text", autocomplete: "off", spellcheck: "false" });
    this.chooser = element("input", { type: "file", accept, hidden: true, tabindex: "-1" });
    this.chooser.addEventListener("change", () => this.take(this.chooser.files[0]));
    this.state = element("span", { class: "hint", role: "status" });
    this.uploads = 0;
    this.choose = button("Choose a file", () => this.chooser.click(), { class: "plain" });
    this.build(control);
    this.drop = element("div", { class: "drop" });
    control.before(this.drop);
    const row = element("div", { class: "row" }, this.choose, this.chooser, this.state);
    this.drop.append(element("div", { class: "drop-side" }, control, row));
    this.listen();
  }

  rename(name) {
    super.rename(name);
    this.choose.setAttribute("aria-label", `Choose a file for ${words(name)}`);
  }

  listen() {
    const zone = this.element;
    zone.addEventListener("dragover", (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
    zone.addEventListener("dragleave", () => zone.classList.remove("over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      this.take(event.dataTransfer.files[0]);
    });
    zone.addEventListener("paste", (event) => {
      const [file] = event.clipboardData.files;
      if (!file) return;
      event.preventDefault();
      event.stopPropagation();
      this.take(file);
    });
  }

  /** Uploads a file; its address is the value then. */
  async take(file) {
    if (!file) return;
    const number = ++this.uploads; // of several, the last counts
    this.chooser.value = "";
    this.state.textContent = `Uploading ${file.name}…`;
    try {
      const url = await this.place.upload(file);
      if (number !== this.uploads) return;
      this.fill(url);
      this.state.textContent = file.name;
      this.place.changed();
    } catch (error) {
      if (number !== this.uploads) return;
      this.state.textContent = "";
      this.fault([], `${file.name} was not uploaded: ${error.message}`);
    }
  }

  edited() {
    this.uploads++;
    this.state.textContent = "";
    super.edited();
  }

  read() {
    return this.control.value;
  }

  write(value) {
    this.uploads++;
    this.state.textContent = "";
    this.control.value = value ?? "";
    this.control.placeholder = this.spec.default ?? "https://…";
  }
}

/** A picture, which is shown. */
export class Picture extends FileField {
  constructor(spec, place) {
    super(spec, place, "image/*");
    this.preview = element("div", { class: "thumb" });
    this.drop.prepend(this.preview);
    this.control.inputMode = "url";
  }

  settle() {
    super.settle();
    const shown = isNear(this.control.value) ? [picture(this.control.value.trim(), { alt: "" })] : [];
    this.preview?.replaceChildren(...shown); // there is none yet while the field is made
  }
}

/** Whether the page shows it: a file of this server's, or one in the text itself. Nothing else is fetched. */
function isNear(text) {
  const url = address(text.trim());
  if (url === undefined || url.startsWith("data:")) return url !== undefined;
  return url.startsWith(`${SERVER}files/`);
}
