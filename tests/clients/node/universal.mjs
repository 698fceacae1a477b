// The universal endpoint from fal's JavaScript clients. node universal.mjs WAY URL, and on stdin
// {"endpoint", "example": the input of the page}.

import { readFileSync } from "node:fs";
import { connect, failure } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const { endpoint, example } = JSON.parse(readFileSync(0));
const fal = connect(way, server, "alice:s3cret");
const data = (result) => (way === "serverless" ? result : result.data);

const progress = [];
const input = { ...example, debug_latents: true };
const result = await fal.subscribe(endpoint, {
  input,
  logs: true,
  pollInterval: 50,
  onQueueUpdate: (update) => {
    if (update.logs) progress.push(update.logs.map((log) => log.message));
  },
});
const elsewhere = { ...example, model_name: "no such model" };
const report = {
  output: data(result),
  progress,
  wrong: await failure(fal.subscribe(endpoint, { input: { ...input, tile_width: 64 } }), "tile_width"),
  lost: await failure(fal.subscribe(endpoint, { input: elsewhere, pollInterval: 50 }), "model_name"),
};
console.log(JSON.stringify(report));
