// A history under pressure. node past.mjs FOLDER

import { pathToFileURL } from "node:url";

const [folder] = process.argv.slice(2);
const { History } = await import(pathToFileURL(`${folder}/history.js`));

/** As localStorage, with room for so many characters. */
class Storage {
  constructor(room = Infinity, text = null) {
    Object.assign(this, { room, text });
  }

  getItem() {
    if (this.room < 0) throw new DOMException("no", "SecurityError");
    return this.text;
  }

  setItem(_, text) {
    if (text.length > this.room) throw new DOMException("full", "QuotaExceededError");
    this.text = text;
  }
}

function filled(storage, count, words = "x") {
  const history = new History(storage);
  for (let id = 0; id < count; id++)
    history.put({ id: `${id}`, endpoint: "a/b", input: { prompt: words }, state: "running" });
  return history;
}

const many = filled(new Storage(), 200);
const long = filled(new Storage(), 60, "y".repeat(19_000));
const full = filled(new Storage(1000), 60);
const forbidden = filled(new Storage(-1), 3);
const changed = filled(new Storage(), 2);
changed.put({ id: "0", state: "done", picture: `data:image/png;base64,${"A".repeat(1e6)}` });
changed.put({ id: "1", input: { image_url: "A".repeat(1e6) }, picture: "http://x/y.png" });
changed.put({ id: "2", endpoint: "c/d", input: { seed: 2n ** 63n - 1n } });
console.log(
  JSON.stringify({
    many: many.all().map((each) => each.id),
    long: long.storage.text.length,
    full: { count: full.all().length, first: full.all()[0].id, characters: full.storage.text.length },
    forbidden: forbidden.all(),
    broken: ["{", "7", "null", '[1, null, {"id": 3}, "x"]'].map((text) =>
      new History(new Storage(Infinity, text)).all(),
    ),
    changed: changed.of("a/b"),
    seed: String(changed.find("2").input.seed),
    cleared: (changed.clear("a/b"), changed.all().map((each) => each.id)),
  }),
);
