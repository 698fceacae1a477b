// One request at a time: sent, followed to its end, cancelled; and what the page says meanwhile.

import { button, element } from "./dom.js";
import { Progress } from "./progress.js";
import { Results, pictures } from "./results.js";

const LOOK_MS = 1000;

export class Run {
  /** `settled` waits for uploads, `refused` is called when the server asks for a key, `changed` when the history
   * has changed. */
  constructor(queue, history, { endpointId, form, button: runButton, settled, refused, changed }) {
    Object.assign(this, { queue, history, endpointId, form, settled, refused, changed });
    this.button = runButton;
    this.progress = new Progress();
    this.results = new Results();
    this.idle = element("p", { class: "idle" }, "The picture appears here.");
    this.element = element(
      "div",
      { class: "run" },
      this.idle,
      this.progress.element,
      this.results.element,
      this.progress.logs,
    );
    this.progress.element.hidden = true;
    this.cancelButton = button("Cancel", () => this.cancel(), { class: "plain", hidden: true });
  }

  get isBusy() {
    return this.leaving !== undefined;
  }

  /** Sends what the form says. */
  async start() {
    if (this.isBusy) return;
    this.form.clear();
    this.begin();
    this.progress.say("Sending");
    await this.settled();
    const input = this.form.value();
    let receipt;
    try {
      receipt = await this.queue.submit(input);
    } catch (error) {
      this.end();
      this.refuse(error);
      return;
    }
    this.note(receipt.request_id, { endpoint: this.endpointId, input, at: Date.now(), state: "running" });
    this.end();
    await this.follow(receipt.request_id);
  }

  /** Follows a request to its end, whoever sent it and whenever that was. */
  async follow(requestId) {
    this.leaving?.abort();
    const leaving = this.begin();
    this.requestId = requestId;
    window.history.replaceState(null, "", `#${requestId}`);
    try {
      const last = await this.watch(requestId, leaving.signal);
      const facts = factsOf(last, this.times, requestId);
      const output = await this.queue.result(requestId);
      if (leaving.signal.aborted) return;
      this.end();
      this.finish(requestId, output, facts);
    } catch (error) {
      if (leaving.signal.aborted) return;
      this.end();
      this.fail(requestId, error);
    }
  }

  /** The last status. */
  async watch(requestId, signal) {
    const looking = setInterval(() => this.look(requestId), LOOK_MS);
    const broke = () => this.progress.say("The connection broke; trying again");
    try {
      for await (const status of this.queue.follow(requestId, { signal, broke })) {
        this.status = status;
        this.times[status.status] ??= performance.now();
        this.progress.show(status);
      }
    } finally {
      clearInterval(looking);
    }
    return this.status;
  }

  /** Asks for the place in the queue: when others leave it, the stream does not say. */
  async look(requestId) {
    const asked = this.status;
    if (asked?.status !== "IN_QUEUE") return;
    const status = await this.queue.status(requestId).catch(() => undefined); // the stream tells what is wrong
    if (status?.status === "IN_QUEUE" && this.status === asked) this.progress.show(status);
  }

  async cancel() {
    if (!this.isBusy || !this.requestId) return;
    this.progress.say("Cancelling");
    try {
      await this.queue.cancel(this.requestId);
    } catch (error) {
      this.progress.say(error.message); // it ended meanwhile
    }
  }

  begin() {
    this.leaving = new AbortController();
    this.requestId = undefined;
    this.times = {};
    this.status = undefined;
    this.idle.hidden = true;
    this.results.clear();
    this.progress.clear();
    this.settle();
    this.reveal();
    return this.leaving;
  }

  /** Scrolls there where the output lies below the form. */
  reveal() {
    if (this.element.getBoundingClientRect().top > innerHeight / 2) this.element.scrollIntoView();
  }

  end() {
    this.leaving = undefined;
    this.settle();
  }

  settle() {
    this.button.disabled = this.isBusy;
    this.cancelButton.hidden = !this.isBusy;
    this.progress.element.hidden = !this.isBusy;
    this.element.setAttribute("aria-busy", String(this.isBusy));
  }

  finish(requestId, output, facts) {
    this.results.show(output, facts);
    this.note(requestId, { state: "done", picture: pictures(output)[0]?.url });
  }

  fail(requestId, error) {
    const isKey = error.status === 401;
    if (!isKey)
      this.note(requestId, { state: error.status === 499 ? "cancelled" : "failed", note: error.message });
    this.refuse(error, requestId);
  }

  refuse(error, requestId) {
    if (error.status === 401) this.refused();
    this.results.fail(error.message, requestId ? { Request: requestId } : {});
    if (error.faults?.length) this.form.show(error.faults);
  }

  /** Notes what has become of a request, if it is one of this browser's. */
  note(requestId, facts) {
    if (!facts.endpoint && !this.history.find(requestId)) return;
    this.history.put({ id: requestId, ...facts });
    this.changed();
  }
}

/** What the page knows of a request beside its output. */
function factsOf(status, times, requestId) {
  const waited = times.IN_QUEUE && times.IN_PROGRESS && times.IN_PROGRESS - times.IN_QUEUE;
  const ran = status?.metrics?.inference_time;
  return {
    ...(waited && { Waited: `${(waited / 1000).toFixed(2)} s` }),
    ...(ran !== undefined && { Ran: `${ran.toFixed(2)} s` }),
    Request: requestId,
  };
}
