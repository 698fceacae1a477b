// A Node application that asks for a webhook, receives it and verifies it as fal's documentation says.
// node webhooks.mjs WAY URL

import { createHash, createPublicKey, verify } from "node:crypto";
import { createServer } from "node:http";

import { connect } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const input = { prompt: "a lighthouse", image_size: { width: 64, height: 64 }, num_inference_steps: 3, seed: 7 };

const received = new Promise((resolve) => {
  const receiver = createServer(async (request, response) => {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    response.end("taken", () => receiver.close());
    resolve({ headers: request.headers, body: Buffer.concat(chunks) });
  });
  receiver.listen(0, "127.0.0.1", async () => {
    const webhookUrl = `http://127.0.0.1:${receiver.address().port}/hook`;
    receipt = connect(way, server, "alice:s3cret").queue.submit("fal-ai/flux/dev", { input, webhookUrl });
  });
});
let receipt;

async function genuine(headers, body) {
  const [id, user, timestamp, signature] = ["request-id", "user-id", "timestamp", "signature"].map(
    (name) => headers[`x-fal-webhook-${name}`],
  );
  if (Math.abs(Date.now() / 1000 - Number(timestamp)) > 300) return false;
  const digest = createHash("sha256").update(body).digest("hex");
  const message = Buffer.from([id, user, timestamp, digest].join("\n"), "utf-8");
  const { keys } = await (await fetch(`${server}/rest/.well-known/jwks.json`)).json();
  return keys.some((key) => {
    if (Buffer.from(key.x, "base64url").length !== 32) return false;
    return verify(null, message, createPublicKey({ key, format: "jwk" }), Buffer.from(signature, "hex"));
  });
}

const { headers, body } = await received;
const forged = Buffer.from(body.toString().replace("OK", "KO"));
console.log(
  JSON.stringify({
    body: JSON.parse(body),
    genuine: await genuine(headers, body),
    forged: await genuine(headers, forged),
    requestId: (await receipt).request_id,
  }),
);
