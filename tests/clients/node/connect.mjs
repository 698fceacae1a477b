// fal's JavaScript clients, each pointed at the server in one of the ways that there are.

import { createFalClient } from "@fal-ai/client";
import * as serverless from "@fal-ai/serverless-client";

export { failure } from "./failure.mjs";

const PREFIXES = {
  "fal.run": "/run",
  "queue.fal.run": "/queue",
  "rest.fal.ai": "/rest",
  "rest.alpha.fal.ai": "/rest",
};

/** A client that reaches `server` in the given way. */
export function connect(way, server, credentials) {
  const proxy = `${server}/api/fal/proxy`;

  async function toProxy(request) {
    return { ...request, url: proxy, headers: { ...request.headers, "x-fal-target-url": request.url } };
  }

  async function toPrefixes(request) {
    const { hostname, pathname, search } = new URL(request.url);
    return { ...request, url: server + PREFIXES[hostname] + pathname + search };
  }

  const ways = {
    proxyUrl: () => createFalClient({ credentials, proxyUrl: { url: proxy, when: "always" } }),
    middleware: () => createFalClient({ credentials, requestMiddleware: toProxy }),
    prefixes: () => createFalClient({ credentials, requestMiddleware: toPrefixes }),
    serverless: () => {
      serverless.config({ credentials, requestMiddleware: toProxy });
      return serverless;
    },
  };
  return ways[way]();
}
