// The canny endpoint from fal's JavaScript clients. node canny.mjs WAY URL, and on stdin
// {"endpoint", "code": the input of the page's code, "example": that of its JSON, "pictures": field → URL,
// "files": field → a PNG's path}.

import { readFileSync } from "node:fs";
import { connect, failure } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const { endpoint, code, example, pictures, files } = JSON.parse(readFileSync(0));
const fal = connect(way, server, "alice:s3cret");
const data = (result) => (way === "serverless" ? result : result.data);

function each(sources, use) {
  return Object.fromEntries(Object.entries(sources).map(([field, source]) => [field, use(source)]));
}

/** What the page's code does, with what it prints kept. */
async function subscribe(input, options) {
  const seen = { statuses: [], progress: [] };
  const result = await fal.subscribe(endpoint, {
    input,
    logs: true,
    ...options,
    onQueueUpdate: (update) => {
      seen.statuses.push(update.status);
      if (update.logs) seen.progress.push(update.logs.map((log) => log.message));
    },
  });
  return { ...seen, output: data(result), requestId: result.requestId };
}

/** The page's three calls of the queue, and what becomes of them. */
async function queue(input) {
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  await fal.queue.subscribeToStatus(endpoint, { requestId, pollInterval: 50 });
  const status = await fal.queue.status(endpoint, { requestId, logs: true });
  return { status, output: data(await fal.queue.result(endpoint, { requestId })) };
}

const png = (path) => readFileSync(path);
const blob = (path) => new Blob([png(path)], { type: "image/png" }); // which the client uploads by itself
const dataUri = (path) => `data:image/png;base64,${png(path).toString("base64")}`;
const few = { ...example, num_inference_steps: 2, seed: 7 };
const wrong = [
  ["control_image_url", { ...example, image_url: pictures.image_url }],
  ["strength", { ...example, ...pictures, strength: 2 }],
  ["path", { ...example, ...pictures, loras: [{ scale: 0.5 }] }],
];

const report = { wrong: {} };
report.code = await subscribe({ ...code, ...pictures }, { pollInterval: 50 });
report.example = await subscribe({ ...example, ...pictures }, { mode: "streaming" });
report.queue = await queue({ ...few, ...pictures });
report.blobs = await subscribe({ ...few, ...each(files, blob) }, { pollInterval: 50 });
report.dataUris = await subscribe({ ...few, ...each(files, dataUri) }, { pollInterval: 50 });
for (const [field, input] of wrong) {
  report.wrong[field] = {};
  for (const call of ["run", "subscribe"]) {
    report.wrong[field][call] = await failure(fal[call](endpoint, { input }), field);
  }
}
const lost = { ...few, ...pictures, control_image_url: `${pictures.control_image_url}.none` };
report.lost = await failure(fal.subscribe(endpoint, { input: lost, pollInterval: 50 }), "control_image_url");
console.log(JSON.stringify(report));
