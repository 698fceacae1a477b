// What was asked for in this browser: the newest first, bounded in number and in size. Keys are not in it.

import * as json from "./json.js";

const NAME = "darkroom.history";
const MOST = 60;
const MOST_CHARACTERS = 500_000;
const LONG = 20_000; // of one entry; one with files inside is kept without its input

/** Entries: {id, endpoint, input, at, state, picture, note}. `at` in ms since the epoch; `state`: running, done, failed
 * or cancelled. `storage` is as localStorage, which may be full or forbidden: then nothing is kept. */
export class History {
  constructor(storage) {
    this.storage = storage;
  }

  all() {
    try {
      const found = json.read(this.storage.getItem(NAME) ?? "[]");
      return Array.isArray(found) ? found.filter((each) => typeof each?.id === "string") : [];
    } catch {
      return [];
    }
  }

  of(endpoint) {
    return this.all().filter((each) => each.endpoint === endpoint);
  }

  find(id) {
    return this.all().find((each) => each.id === id);
  }

  /** Puts an entry first, or changes the one with its id. */
  put(entry) {
    const others = this.all();
    const at = others.findIndex((each) => each.id === entry.id);
    const whole = bounded(at < 0 ? entry : { ...others[at], ...entry });
    if (at < 0) others.unshift(whole);
    else others[at] = whole;
    this.keep(others.slice(0, MOST));
  }

  remove(id) {
    this.keep(this.all().filter((each) => each.id !== id));
  }

  clear(endpoint) {
    this.keep(this.all().filter((each) => each.endpoint !== endpoint));
  }

  /** As many as there is room for. */
  keep(entries) {
    while (entries.length && json.write(entries).length > MOST_CHARACTERS) entries.pop();
    for (; ; entries.pop()) {
      try {
        return this.storage.setItem(NAME, json.write(entries));
      } catch {
        if (!entries.length) return;
      }
    }
  }
}

function bounded(entry) {
  const { picture, ...rest } = entry;
  const { input, ...least } = rest;
  const kept = picture?.length < LONG ? { ...rest, picture } : rest;
  if (json.write(kept).length < LONG) return kept;
  return json.write(rest).length < LONG ? rest : least;
}
