// Clients that wait for requests nobody runs, each with its own client; reports how often they asked.

import { createFalClient } from "@fal-ai/client";

const [server, endpoint, count, interval, seconds] = process.argv.slice(2);
const HOSTS = { "queue.fal.run": "/queue" };
let polls = 0;

async function requestMiddleware(request) {
  const { hostname, pathname, search } = new URL(request.url);
  polls += pathname.endsWith("/status") ? 1 : 0;
  return { ...request, url: server + HOSTS[hostname] + pathname + search };
}

const input = { prompt: "a lighthouse", image_size: { width: 64, height: 64 }, num_inference_steps: 1 };
for (let number = 0; number < Number(count); number += 1) {
  const fal = createFalClient({ credentials: "any:key", requestMiddleware });
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  fal.queue.subscribeToStatus(endpoint, { requestId, pollInterval: Number(interval) });
}
console.log("waiting");
for await (const _ of process.stdin) break; // until told
const [asked, began] = [polls, performance.now()];
setTimeout(() => {
  console.log((polls - asked) / ((performance.now() - began) / 1000));
  process.exit(0);
}, Number(seconds) * 1000);
