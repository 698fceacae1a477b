// Pictures remade and edited with fal's JavaScript clients. node pictures.mjs WAY URL, and on stdin
// {"examples": {endpoint: input}, "file": a PNG's path, "url": where it can be had by http}.

import { readFileSync } from "node:fs";
import { connect, failure } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const { examples, file, url } = JSON.parse(readFileSync(0));
const fal = connect(way, server, "alice:s3cret");
const [remake, edit] = Object.keys(examples);

const png = readFileSync(file);
const sources = {
  dataUri: `data:image/png;base64,${png.toString("base64")}`,
  blob: new Blob([png], { type: "image/png" }), // which the client uploads by itself
  file: new File([png], "start.png", { type: "image/png" }),
  url,
};

async function subscribe(endpoint, input) {
  const seen = { statuses: [], lines: [] };
  const result = await fal.subscribe(endpoint, {
    input,
    logs: true,
    pollInterval: 50,
    onQueueUpdate: (status) => {
      seen.statuses.push(status.status);
      seen.lines = (status.logs ?? []).map((line) => line.message);
    },
  });
  seen.output = way === "serverless" ? result : result.data;
  return seen;
}

const report = { examples: {} };
let seed = { proxyUrl: 2000, prefixes: 3000, serverless: 4000, middleware: 5000 }[way]; // of which none was used before
for (const [endpoint, input] of Object.entries(examples)) {
  report.examples[endpoint] = {};
  for (const [name, image_url] of Object.entries(sources)) {
    report.examples[endpoint][name] = await subscribe(endpoint, { ...input, image_url, seed: seed++ });
  }
}
const kept = await fal.storage.upload(sources.file);
report.uploaded = await subscribe(remake, { ...examples[remake], image_url: kept });
report.chained = await subscribe(edit, { ...examples[edit], image_url: report.uploaded.output.images[0].url });

const net = { path: "someone/controlnet" };
const deep = { controls: [{ control_mode: "canny", control_image_url: sources.blob }] }; // found inside as well
const missing = { ...examples[edit], image_url: sources.blob, controlnets: [net], controlnet_unions: [{ ...net, ...deep }] };
const lost = { ...examples[edit], image_url: `${url}.none` };
report.missing = {};
for (const call of ["run", "subscribe"]) {
  report.missing[call] = await failure(fal[call](edit, { input: missing }), "control_image_url");
}
report.lost = await failure(fal.subscribe(edit, { input: lost, pollInterval: 50 }), "image_url");
console.log(JSON.stringify(report));
