// Pictures while you type, with fal's JavaScript clients. node --experimental-websocket realtime.mjs WAY URL.
// No client lets one say where its websocket goes: a preload would change it as is done here.

import { connect } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const ENDPOINT = "fal-ai/flux/dev";
const small = { prompt: "a lighthouse", image_size: { width: 64, height: 64 }, num_inference_steps: 3, seed: 7 };

const Plain = globalThis.WebSocket;
globalThis.WebSocket = class extends Plain {
  constructor(url) {
    super(url.replace("wss://fal.run", `${server.replace("http", "ws")}/run`));
  }
};

/** A connection whose outcomes can be awaited one by one. */
function open(fal, endpoint, options = {}) {
  const outcomes = [];
  let waiting;
  const tell = (outcome) => {
    outcomes.push(outcome);
    waiting?.();
  };
  const connection = fal.realtime.connect(endpoint, {
    connectionKey: crypto.randomUUID(),
    throttleInterval: 0,
    ...options,
    onResult: (result) => tell({ result: shown(result) }),
    onError: (error) => tell({ error: { name: error.name, message: error.message, status: error.status } }),
  });
  async function next() {
    if (!outcomes.length) await new Promise((resolve) => (waiting = resolve));
    return outcomes.shift();
  }
  return { ...connection, next };
}

/** A result in JSON. */
function shown(result) {
  const images = result.images.map(({ content, ...image }) => ({
    ...image,
    content: Buffer.from(content).toString("base64"),
  }));
  return { ...result, images };
}

async function conversation(fal) {
  const connection = open(fal, ENDPOINT, { maxBuffering: 2 });
  const told = [];
  for (const input of [small, { ...small, seed: 8, request_id: "mine" }, { ...small, num_images: 9 }, small]) {
    connection.send(input);
    told.push(await connection.next());
  }
  connection.close();
  return told;
}

async function single(fal, endpoint) {
  const connection = open(fal, endpoint);
  connection.send(small);
  const told = await connection.next();
  connection.close();
  return told;
}

const fal = connect(way, server, "alice:s3cret");
const report = { conversation: await conversation(fal), unknown: await single(fal, "fal-ai/flux/nope") };
console.log(JSON.stringify(report));
process.exit();
