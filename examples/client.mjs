// fal's JavaScript client on your own server: follow the steps, save the picture.
//
//     npm install @fal-ai/client
//     FAL_KEY=me:secret node examples/client.mjs [SERVER]

import { mkdirSync, writeFileSync } from "node:fs";
import { fal } from "@fal-ai/client";

const server = process.argv[2] ?? "http://127.0.0.1:8000";
fal.config({
  credentials: process.env.FAL_KEY,
  proxyUrl: { url: `${server}/api/fal/proxy`, when: "always" }, // the whole difference
});

const { data } = await fal.subscribe("fal-ai/flux/dev", {
  input: { prompt: "a purple square on the right", image_size: { width: 128, height: 128 }, seed: 2 },
  logs: true,
  onQueueUpdate: ({ status, queue_position, logs }) =>
    console.log(status, queue_position ?? logs?.at(-1)?.message ?? ""),
});

const picture = await fetch(data.images[0].url);
mkdirSync("out", { recursive: true });
writeFileSync("out/node.jpg", Buffer.from(await picture.arrayBuffer()));
console.log("out/node.jpg");
