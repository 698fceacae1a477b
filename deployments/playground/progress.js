// How far a request is: its place in the queue, its steps, its log, and the picture as it forms.

import { element, picture } from "./dom.js";
import { pictures } from "./results.js";

const STEP = /^step (\d+)\/(\d+)$/;

export class Progress {
  constructor() {
    this.line = element("p", { class: "state", role: "status" });
    this.bar = element("progress", { "aria-label": "Steps" });
    this.previews = element("div", { class: "pictures forming" });
    this.log = element("ol", { class: "log", tabindex: "0", "aria-label": "Log" });
    this.logs = element("details", { class: "logs" }, element("summary", {}, "Log"), this.log);
    this.element = element("div", { class: "progress" }, this.line, this.bar, this.previews);
    this.clear();
  }

  clear() {
    this.log.replaceChildren();
    this.previews.replaceChildren();
    this.say("");
    this.bar.hidden = this.logs.hidden = true;
  }

  say(text) {
    if (this.line.textContent !== text) this.line.textContent = text;
  }

  /** Shows a status document. */
  show(status) {
    if (status.again) this.log.replaceChildren();
    this.logs.hidden &&= !status.logs?.length;
    for (const line of status.logs ?? []) this.log.append(element("li", { class: line.level }, line.message));
    if (status.preview) this.form(status.preview);
    if (status.status === "IN_QUEUE") this.wait(status.queue_position);
    if (status.status === "IN_PROGRESS") this.run(status.logs ?? []);
  }

  wait(ahead) {
    this.bar.hidden = false;
    this.bar.removeAttribute("value");
    this.say(ahead ? `In the queue, ${ahead} ahead` : "In the queue, next");
  }

  run(lines) {
    this.bar.hidden = false;
    const [step] = lines
      .map((line) => STEP.exec(line.message))
      .filter(Boolean)
      .slice(-1);
    if (step) {
      [, this.bar.value, this.bar.max] = step.map(Number);
      this.say(`Step ${step[1]} of ${step[2]}`);
    } else if (!this.line.textContent.startsWith("Step")) {
      this.bar.removeAttribute("value");
      this.say("Running");
    }
  }

  form(output) {
    const shown = pictures(output).map(({ url }, index) =>
      picture(url, { alt: `Picture ${index + 1} as it forms` }),
    );
    this.previews.replaceChildren(...shown);
  }
}
