// The backend of a web app that keeps its key to itself: fal's own proxy package behind /api/fal/proxy,
// as Next.js routes use it. Prints its port, then serves until it is told to stop.

import { createServer } from "node:http";
import { text } from "node:stream/consumers";
import { Readable } from "node:stream";
import { handleRequest } from "@fal-ai/server-proxy";

async function proxy(request, response) {
  const body = await text(request);
  await handleRequest({
    id: "webapp",
    method: request.method,
    getRequestBody: async () => body || undefined,
    getHeaders: () => request.headers,
    getHeader: (name) => request.headers[name],
    sendHeader: (name, value) => response.setHeader(name, value),
    respondWith: (status, data) => response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(data)),
    sendResponse: async (upstream) => {
      response.writeHead(upstream.status, { "content-type": upstream.headers.get("content-type") ?? "text/plain" });
      Readable.fromWeb(upstream.body).pipe(response);
    },
  });
}

const server = createServer(proxy).listen(0, "127.0.0.1", () => console.log(server.address().port));
process.on("SIGTERM", () => process.exit(0));
