// An app that calls fal through Hugging Face's client, all but for what the Hub would answer. node huggingface.mjs PNG

import { readFileSync } from "node:fs";
import { InferenceClient } from "@huggingface/inference";

const MODELS = {
  "someone/text-to-image": { providerId: "fal-ai/flux/dev", task: "text-to-image" },
  "someone/image-to-image": { providerId: "fal-ai/flux-lora/image-to-image", task: "image-to-image" },
};
const fetch = globalThis.fetch;
globalThis.fetch = (url, init) => {
  const { hostname, pathname } = new URL(url);
  if (hostname !== "huggingface.co") return fetch(url, init);
  const model = MODELS[pathname.replace("/api/models/", "")];
  return Promise.resolve(Response.json({ inferenceProviderMapping: { "fal-ai": { ...model, status: "live" } } }));
};

const alive = setInterval(() => {}, 1000); // the client's own timers keep no program running
const client = new InferenceClient(process.env.FAL_KEY);
const small = { num_inference_steps: 3, seed: 7 };

async function draw(parameters, outputType) {
  const model = "someone/text-to-image";
  return client.textToImage({ provider: "fal-ai", model, inputs: "a lighthouse", parameters }, { outputType });
}

async function told(blob) {
  return Buffer.from(await blob.arrayBuffer()).toString("base64");
}

const size = { image_size: { width: 96, height: 64 } };
const report = {};
report.drawn = await told(await draw({ ...small, ...size }));
report.url = await draw({ ...small, ...size }, "url");
const start = new Blob([readFileSync(process.argv[2])], { type: "image/png" });
const parameters = { ...small, prompt: "a lion" };
const remake = { provider: "fal-ai", model: "someone/image-to-image", inputs: start, parameters };
report.remade = await told(await client.imageToImage(remake));
report.wrong = await draw({ num_inference_steps: 99 }).catch((error) => error.httpResponse);
clearInterval(alive);
console.log(JSON.stringify(report));
