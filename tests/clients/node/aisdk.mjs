// Vercel's AI SDK, pointed at the server by its own setting. node aisdk.mjs BASE_URL, and on stdin
// {"file": a PNG's path, "lora": where there is one}.

import { readFileSync } from "node:fs";
import { createFal } from "@ai-sdk/fal";
import { generateImage } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false;
const baseURL = process.argv[2];
const { file, lora } = JSON.parse(readFileSync(0));
const fal = createFal({ baseURL, apiKey: process.env.FAL_KEY });
const [draw, remake] = ["fal-ai/flux/dev", "fal-ai/flux-lora/image-to-image"].map((id) => fal.image(id));
const start = readFileSync(file);

function told({ images, responses, providerMetadata, warnings }) {
  return {
    images: images.map(({ mediaType, base64 }) => ({ mediaType, base64 })),
    details: providerMetadata.fal.images,
    ids: responses.map(({ headers }) => headers["x-fal-request-id"]),
    warnings,
  };
}

async function ask(model, prompt, options, rest) {
  try {
    return told(await generateImage({ model, prompt, maxRetries: 0, ...rest, providerOptions: { fal: options } }));
  } catch (error) {
    const { name, message, statusCode, isRetryable, responseBody } = error;
    return { name, message, statusCode, isRetryable, body: responseBody && JSON.parse(responseBody) };
  }
}

const few = { numInferenceSteps: 3 };
const small = { size: "96x64", seed: 7 };
const scene = { text: "a lion", images: [start] };
const report = {
  drawn: await ask(draw, "a lighthouse", few, small),
  several: await ask(draw, "a lighthouse", few, { ...small, n: 2, maxImagesPerCall: 4 }),
  shaped: await ask(draw, "a lighthouse", { numInferenceSteps: 1 }, { aspectRatio: "9:16" }),
  inline: await ask(draw, "a lighthouse", { ...few, syncMode: true }, small),
  remade: await ask(remake, scene, { ...few, strength: 0.9 }),
  byOption: await ask(remake, "a lion", { ...few, imageUrl: `data:image/png;base64,${start.toString("base64")}` }),
  withLora: await ask(remake, scene, { ...few, loras: [{ path: lora, scale: 0.7 }] }),
  wrongInside: await ask(remake, scene, { ...few, loras: [{ path: lora, scale: 70 }] }),
  wrong: await ask(draw, "a lighthouse", { num_images: 99 }),
  unknown: await ask(fal.image("fal-ai/nope"), "a lighthouse"),
  wrongKey: await ask(createFal({ baseURL, apiKey: "x:y" }).image("fal-ai/flux/dev"), "a lighthouse"),
};
console.log(JSON.stringify(report));
