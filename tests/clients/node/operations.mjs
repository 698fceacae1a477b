// What an application does with fal's clients, told as one JSON document.
// node operations.mjs WAY URL: the way says which client it is and how it is pointed at the server.

import { connect, failure } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const ENDPOINT = "fal-ai/flux/dev";
const small = { prompt: "a lighthouse", image_size: { width: 64, height: 64 }, num_inference_steps: 3, seed: 7 };
const watched = { ...small, image_size: "square", num_inference_steps: 20 };
const long = { ...small, image_size: "square_hd", num_inference_steps: 50, num_images: 4 };

let fal = connect(way, server, "alice:s3cret");

async function subscribe(options) {
  const seen = { statuses: [], lines: [] };
  seen.result = await fal.subscribe(ENDPOINT, {
    input: watched,
    logs: true,
    ...options,
    onEnqueue: (id) => (seen.enqueued = id),
    onQueueUpdate: (status) => {
      seen.statuses.push(status.status);
      seen.lines = (status.logs ?? []).map((line) => line.message);
    },
  });
  return seen;
}

async function wait() {
  const { request_id: blocker } = await fal.queue.submit(ENDPOINT, { input: long });
  const receipt = await fal.queue.submit(ENDPOINT, { input: small });
  const requestId = receipt.request_id;
  const told = { receipt };
  told.status = await fal.queue.status(ENDPOINT, { requestId });
  told.early = await failure(fal.queue.result(ENDPOINT, { requestId }));
  told.cancel = await failure(fal.queue.cancel(ENDPOINT, { requestId }));
  told.cancelled = await fal.queue.status(ENDPOINT, { requestId });
  told.result = await failure(fal.queue.result(ENDPOINT, { requestId }));
  told.again = await failure(fal.queue.cancel(ENDPOINT, { requestId }));
  if (way !== "serverless") {
    told.late = await failure(fal.run(ENDPOINT, { input: small, startTimeout: 1.1 }));
    const impatient = { input: small, pollInterval: 50, timeout: 300 };
    told.impatient = await failure(
      fal.subscribe(ENDPOINT, { ...impatient, onEnqueue: (id) => (told.left = id) }),
    );
  }
  await fal.queue.cancel(ENDPOINT, { requestId: blocker });
  return told;
}

async function stream() {
  const partial = [];
  const events = await fal.stream(ENDPOINT, { input: watched });
  events.on("data", (event) => partial.push(event.images[0].url.slice(0, 23)));
  return { last: await events.done(), partial };
}

async function calls(endpoint, input) {
  const told = {};
  told.run = await failure(fal.run(endpoint, { input }));
  told.submit = await failure(fal.queue.submit(endpoint, { input }));
  told.stream = await failure(fal.stream(endpoint, { input }).then((events) => events.done()));
  return told;
}

const report = {};
report.run = await fal.run(ENDPOINT, { input: small });
report.polling = await subscribe({ pollInterval: 50 });
report.streaming = await subscribe({ mode: "streaming" });
const { enqueued: requestId } = report.polling;
report.status = await fal.queue.status(ENDPOINT, { requestId, logs: true });
report.result = await fal.queue.result(ENDPOINT, { requestId });
report.waiting = await wait();
report.stream = await stream();
report.unknown = await calls("fal-ai/nope", small);
report.invalid = await calls(ENDPOINT, { ...small, num_inference_steps: 51 });
fal = connect(way, server, "alice:guess");
report.wrongKey = await calls(ENDPOINT, small);
console.log(JSON.stringify(report));
