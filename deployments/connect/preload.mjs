// Takes what a Node program sends to fal's hosts to the darkroom server at $DARKROOM_URL.
// For `node --import`; a Node that honours NODE_USE_ENV_PROXY by itself needs no help.

const PREFIXES = {
  "fal.run": "/run",
  "queue.fal.run": "/queue",
  "rest.fal.ai": "/rest",
  "rest.alpha.fal.ai": "/rest",
  "v3.fal.media": "/cdn",
  "fal.media": "/cdn",
};
const server = process.env.DARKROOM_URL;

/** Where the same thing is on our server, or undefined for hosts of others. */
function moved(text) {
  if (!URL.canParse(text)) return undefined;
  const { protocol, hostname, port, pathname, search } = new URL(text);
  const prefix = Object.hasOwn(PREFIXES, hostname) && !port ? PREFIXES[hostname] : undefined;
  if (prefix === undefined) return undefined;
  const base = protocol.startsWith("ws") ? server.replace(/^http/, "ws") : server;
  return base + prefix + pathname + search;
}

function wrapFetch(fetch) {
  return function (input, init) {
    const isRequest = input instanceof Request;
    const url = moved(isRequest ? input.url : String(input));
    if (url === undefined) return fetch(input, init);
    return fetch(isRequest ? new Request(url, input) : url, init);
  };
}

function wrapWebSocket(WebSocket) {
  return class extends WebSocket {
    constructor(url, protocols) {
      super(moved(String(url)) ?? url, protocols);
    }
  };
}

const usesProxy = process.env.NODE_USE_ENV_PROXY === "1" && Number(process.versions.node.split(".")[0]) >= 24;
if (server && !usesProxy) {
  globalThis.fetch = wrapFetch(globalThis.fetch);
  if (globalThis.WebSocket) globalThis.WebSocket = wrapWebSocket(globalThis.WebSocket);
}
