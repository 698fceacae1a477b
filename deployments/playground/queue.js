// One endpoint's queue: submit, follow, fetch, cancel.

import * as json from "./json.js";

const PAUSES_MS = [500, 1000, 2000, 5000]; // before a broken stream is opened again

export class Queue {
  constructor(api, endpointId) {
    this.api = api;
    this.path = `queue/${endpointId}`;
  }

  /** The receipt. Pictures on their way are asked for. */
  submit(input) {
    return this.api.post(this.path, input, { "x-darkroom-previews": "1" });
  }

  status(requestId) {
    return this.api.call(`${this.request(requestId)}/status`);
  }

  result(requestId) {
    return this.api.call(this.request(requestId));
  }

  cancel(requestId) {
    return this.api.call(`${this.request(requestId)}/cancel`, { method: "PUT" });
  }

  /** Status documents until the request is completed, however often the connection breaks. `broke` is called when
   * it does; a stream that is opened again begins with all logs once more, and its first document says so by
   * `again`. Raises Refused. */
  async *follow(requestId, { signal, broke = () => {} }) {
    for (let tries = 0; ;) {
      let again = true;
      try {
        for await (const status of this.stream(requestId, signal)) {
          yield { ...status, again };
          if (status.status === "COMPLETED") return;
          [again, tries] = [false, 0];
        }
      } catch (error) {
        if (signal?.aborted || (error.status && error.status < 500)) throw error;
      }
      broke();
      await paused(PAUSES_MS[Math.min(tries++, PAUSES_MS.length - 1)], signal);
    }
  }

  async *stream(requestId, signal) {
    const answer = await this.api.open(`${this.request(requestId)}/status/stream?logs=1&previews=1`, {
      signal,
    });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const frames = (text + value).split("\n\n");
        text = frames.pop();
        const documents = frames.filter((frame) => frame.startsWith("data: "));
        yield* documents.map((frame) => json.read(frame.slice("data: ".length)));
      }
    } finally {
      reader.cancel().catch(() => {}); // whoever looks away needs no more of it
    }
  }

  request(requestId) {
    return `${this.path}/requests/${encodeURIComponent(requestId)}`;
  }
}

function paused(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
