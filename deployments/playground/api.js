// The server's public API, as any client calls it.

import * as json from "./json.js";

/** Where the server is, with a slash at the end: there where this script came from, below whatever prefix a proxy
 * in front has put it. */
export const SERVER = new URL("../../", import.meta.url);

/** An answer that is an error, in the server's own words. `detail`: text, or a list of faults with `loc` and `msg`. */
export class Refused extends Error {
  constructor(status, body) {
    const { detail, message } = body ?? {};
    const said = message ?? (typeof detail === "string" ? detail : undefined);
    super(said ?? `The server answered ${status}.`);
    this.status = status;
    this.faults = Array.isArray(detail) ? detail : [];
  }
}

/** Calls with a key, which `key()` gives, or with none. Paths are below SERVER. Raises Refused, and TypeError where there is no connection. */
export class Api {
  constructor(key) {
    this.key = key;
  }

  async open(path, { method = "GET", body, headers = {}, signal } = {}) {
    const key = this.key();
    const shown = key ? { authorization: `Key ${key}` } : {};
    const answer = await fetch(new URL(path, SERVER), {
      method,
      body,
      signal,
      headers: { ...shown, ...headers },
      cache: "no-store",
    });
    if (!answer.ok) throw new Refused(answer.status, parsed(await answer.text()));
    return answer;
  }

  async call(path, options) {
    return json.read(await (await this.open(path, options)).text());
  }

  post(path, value, headers = {}) {
    const body = json.write(value);
    return this.call(path, {
      method: "POST",
      body,
      headers: { "content-type": "application/json", ...headers },
    });
  }

  /** Every model, with its OpenAPI document. */
  async models() {
    const found = [];
    let cursor;
    do {
      const query = new URLSearchParams({ expand: "openapi-3.0", limit: "10", ...(cursor && { cursor }) });
      const page = await this.call(`v1/models?${query}`);
      found.push(...page.models);
      cursor = page.next_cursor;
    } while (cursor);
    return found;
  }

  /** Whether calls are taken as they are: with this key, or with none. */
  async opens() {
    try {
      await this.call("v1/models/requests?limit=1");
      return true;
    } catch (error) {
      if (error.status === 401) return false;
      throw error;
    }
  }

  /** Sends a file and gives its address. */
  async upload(file) {
    const content_type = file.type || "application/octet-stream";
    const begun = await this.post("rest/storage/upload/initiate", { content_type, file_name: file.name });
    const [, place] = begun.upload_url.match(/.*\/(files\/.*)/); // by the way that led here
    const sent = await fetch(new URL(place, SERVER), {
      method: "PUT",
      body: file,
      headers: { "content-type": content_type },
    });
    if (!sent.ok) throw new Refused(sent.status, parsed(await sent.text()));
    return begun.file_url;
  }
}

function parsed(text) {
  try {
    return json.read(text);
  } catch {
    return undefined;
  }
}
