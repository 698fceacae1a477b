// What a web application does with fal's client, in the visitor's browser. The page's query says where the
// server is, and another that allows no page to read it.

import { fal } from "@fal-ai/client";
import { failure } from "./failure.mjs";

const { server, closed, large } = Object.fromEntries(new URLSearchParams(location.search));
const ENDPOINT = "fal-ai/flux/dev";
const REMAKE = "fal-ai/flux-lora/image-to-image";
const small = { prompt: "a page", image_size: { width: 64, height: 64 }, num_inference_steps: 3, seed: 11 };
const watched = { ...small, image_size: "square", num_inference_steps: 20 };
const long = { ...small, image_size: "square_hd", num_inference_steps: 50, num_images: 4 };

// What the client asks for without its proxy goes to fal's own hosts: its websocket, and streams with a token.
const Plain = window.WebSocket;
window.WebSocket = class extends Plain {
  constructor(url) {
    super(url.replace("wss://fal.run", `${server.replace("http", "ws")}/run`));
  }
};
const direct = (url, options) => fetch(url.replace("https://fal.run", `${server}/run`), options);

function configure(credentials) {
  fal.config({ credentials, proxyUrl: `${server}/api/fal/proxy`, fetch: direct });
}

async function subscribe(options) {
  const seen = { statuses: [], lines: [] };
  seen.result = await fal.subscribe(ENDPOINT, {
    input: watched,
    logs: true,
    ...options,
    onEnqueue: (id) => (seen.enqueued = id),
    onQueueUpdate: (status) => {
      seen.statuses.push(status.status);
      seen.lines = (status.logs ?? []).map((line) => line.message);
    },
  });
  return seen;
}

async function stream(connectionMode) {
  const events = await fal.stream(ENDPOINT, { input: watched, connectionMode });
  const urls = [];
  events.on("data", (event) => urls.push(event.images[0].url.slice(0, 23)));
  return { last: await events.done(), urls };
}

/** A picture over a websocket, and what is said of a mistake on it. */
async function realtime() {
  let tell;
  const connection = fal.realtime.connect(ENDPOINT, {
    connectionKey: "page",
    throttleInterval: 0,
    onResult: (result) => tell(result),
    onError: (error) => tell(error),
  });
  const ask = (input) => {
    const told = new Promise((resolve) => (tell = resolve));
    connection.send(input);
    return told;
  };
  const { images, seed } = await ask(small);
  const picture = await createImageBitmap(new Blob([images[0].content]));
  const { name, message } = await ask({ ...small, num_images: 9 });
  connection.close();
  return { seed, size: [picture.width, picture.height], error: { name, message } };
}

/** What happens to requests behind one that takes long. */
async function wait() {
  const { request_id: blocker } = await fal.queue.submit(ENDPOINT, { input: long });
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input: small });
  const told = {};
  told.status = await fal.queue.status(ENDPOINT, { requestId });
  told.cancel = await failure(fal.queue.cancel(ENDPOINT, { requestId }));
  told.result = await failure(fal.queue.result(ENDPOINT, { requestId }));
  told.late = await failure(fal.run(ENDPOINT, { input: small, startTimeout: 1.1 }));
  await fal.queue.cancel(ENDPOINT, { requestId: blocker });
  return told;
}

/** A picture that the visitor has made. */
function drawing() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 80, height: 48 });
  const context = canvas.getContext("2d");
  context.fillStyle = "teal";
  context.fillRect(0, 0, 80, 48);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

async function uploads() {
  const picture = await drawing();
  const told = { size: picture.size };
  told.blob = await fal.storage.upload(picture);
  told.file = await fal.storage.upload(new File(["Hello"], "hello.txt", { type: "text/plain" }));
  told.large = await fal.storage.upload(new File([new Uint8Array(Number(large)).fill(7)], "large.bin"));
  const input = { prompt: "a page", image_url: picture, num_inference_steps: 4, seed: 11 };
  told.inside = await fal.run(REMAKE, { input });
  return told;
}

/** What the page can read of a picture once it is on a canvas. */
async function shown(url, crossOrigin) {
  const image = Object.assign(new Image(), { crossOrigin, src: url });
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const mean = [0, 1, 2].map((channel) => {
    let sum = 0;
    for (let at = channel; at < data.length; at += 4) sum += data[at];
    return (sum * 4) / data.length;
  });
  return { width: canvas.width, height: canvas.height, mean };
}

async function pictures(url) {
  const answer = await fetch(url);
  const part = await fetch(url, { headers: { range: "bytes=2-5" } });
  const told = { type: answer.headers.get("content-type"), etag: answer.headers.get("etag") };
  told.bytes = (await answer.arrayBuffer()).byteLength;
  told.part = { status: part.status, bytes: (await part.arrayBuffer()).byteLength };
  told.range = part.headers.get("content-range");
  told.canvas = await shown(url, "anonymous");
  told.tainted = await failure(shown(url, null));
  told.closed = await failure(fetch(closed));
  return told;
}

async function calls(endpoint, input) {
  const told = {};
  told.run = await failure(fal.run(endpoint, { input }));
  told.submit = await failure(fal.queue.submit(endpoint, { input }));
  told.stream = await failure(fal.stream(endpoint, { input }).then((events) => events.done()));
  return told;
}

async function tell() {
  const told = { origin: location.origin };
  configure("alice:s3cret");
  told.run = await fal.run(ENDPOINT, { input: small });
  told.polling = await subscribe({ pollInterval: 50 });
  told.streaming = await subscribe({ mode: "streaming" });
  const { enqueued: requestId } = told.polling;
  told.status = await fal.queue.status(ENDPOINT, { requestId, logs: true });
  told.result = await fal.queue.result(ENDPOINT, { requestId });
  told.stream = await stream("server");
  told.clientStream = await stream("client");
  told.realtime = await realtime();
  told.waiting = await wait();
  told.uploads = await uploads();
  told.pictures = await pictures(told.run.data.images[0].url);
  told.invalid = await calls(ENDPOINT, { ...small, num_inference_steps: 51 });
  told.unknown = await calls("fal-ai/nope", small);
  configure("alice:guess");
  told.wrongKey = await calls(ENDPOINT, small);
  return told;
}

window.story = tell();
