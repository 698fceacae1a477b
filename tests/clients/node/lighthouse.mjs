// An app as a user of fal writes it: nothing here knows of another server.

import { readFileSync } from "node:fs";
import { fal } from "@fal-ai/client";

const [small, large] = process.argv.slice(2);
const ENDPOINT = "fal-ai/flux/dev";
const input = { prompt: "a lighthouse", num_inference_steps: 3, seed: 7, image_size: { width: 64, height: 64 } };
const told = {};
told.subscribed = await fal.subscribe(ENDPOINT, {
  input,
  logs: true,
  onQueueUpdate: (update) => (told.lines = (update.logs ?? []).map((line) => line.message)),
});
told.ran = await fal.run(ENDPOINT, { input });
const stream = await fal.stream(ENDPOINT, { input });
told.streamed = [];
stream.on("data", (event) => told.streamed.push(event));
await stream.done();
told.small = await fal.storage.upload(new File([readFileSync(small)], "start.png", { type: "image/png" }));
told.large = await fal.storage.upload(new File([readFileSync(large)], "large.bin"));
const start = { image_url: told.small, prompt: "a lion", num_inference_steps: 4 };
told.remade = await fal.subscribe("fal-ai/flux-lora/image-to-image", { input: start });
for (const name of ["subscribed", "ran", "remade"]) told[name] = told[name].data;
console.log(JSON.stringify(told));
