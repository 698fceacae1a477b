// The page of one endpoint: which one, its address says; everything else, its OpenAPI document.

import { Api, Refused, SERVER } from "./api.js";
import { Code } from "./code.js";
import { element } from "./dom.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { KeyDialog, current } from "./key.js";
import { Past } from "./past.js";
import { Queue } from "./queue.js";
import { Run } from "./run.js";
import { input } from "./schema.js";

const ENDPOINT = location.pathname.slice(`${SERVER.pathname}playground/`.length).replace(/\/$/, "");

const at = (id) => document.getElementById(id);

class Page {
  constructor(api, { spec, example }) {
    this.api = api;
    this.uploads = new Set();
    this.history = new History(localStorage);
    this.example = withoutPictures(spec, example);
    this.code = new Code(SERVER.href.replace(/\/$/, ""), ENDPOINT);
    this.form = new Form(spec, {
      changed: () => this.code.show(this.form.value()),
      upload: (file) => this.upload(file),
    });
    this.run = new Run(new Queue(api, ENDPOINT), this.history, {
      endpointId: ENDPOINT,
      form: this.form,
      button: at("run"),
      settled: () => Promise.allSettled(this.uploads),
      refused: () => this.askKey(),
      changed: () => this.past.show(),
    });
    this.past = new Past(this.history, ENDPOINT, (entry) => this.open(entry));
    this.key = new KeyDialog(
      () => api.opens(),
      () => this.resume(),
    );
  }

  show() {
    at("form").append(this.form.element);
    at("output").append(this.run.element, this.past.element);
    at("code").append(this.code.element);
    at("run").before(this.run.cancelButton);
    document.body.append(this.key.element);
    this.form.fill(this.example);
    this.past.show();
    this.listen();
    at("request").hidden = at("code-section").hidden = false;
  }

  listen() {
    at("key-button").addEventListener("click", () => this.key.ask());
    at("example").addEventListener("click", () => this.form.fill(this.example));
    at("empty").addEventListener("click", () => this.form.fill({}));
    at("request").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run.start();
    });
    document.addEventListener("keydown", (event) => this.pressed(event));
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
      if (file) this.form.picture?.take(file);
    });
    // A file dropped beside the fields would open in the page's place.
    for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());
  }

  pressed(event) {
    if (this.key.element.open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.run.start();
    }
    if (event.key === "Escape") this.run.cancel();
  }

  /** Goes on where the reader was, once the server is open to them. */
  async begin() {
    const isOpen = await this.api.opens();
    at("key-button").hidden = isOpen && !current();
    if (isOpen) this.resume();
    else this.key.ask();
  }

  /** The request that the address names, or the last one that was under way. */
  resume() {
    if (this.run.isBusy) return;
    const named = location.hash.slice(1);
    const isUnderWay = (entry) => entry.state === "running";
    const entry = this.history.find(named) ?? this.history.of(ENDPOINT).find(isUnderWay);
    if (entry) this.open(entry);
    else if (named) this.run.follow(named);
  }

  open(entry) {
    if (entry.input) this.form.fill(entry.input);
    this.run.follow(entry.id);
  }

  askKey() {
    this.key.ask("The server asks for a key.");
  }

  async upload(file) {
    const sending = this.api.upload(file);
    this.uploads.add(sending);
    try {
      return await sending;
    } catch (error) {
      if (error.status === 401) this.askKey();
      throw error;
    } finally {
      this.uploads.delete(sending);
    }
  }
}

function introduce({ display_name, description, category, license_type, hardware }) {
  document.title = `${display_name} · darkroom`;
  at("title").textContent = display_name;
  at("description").textContent = description;
  const tags = [category, license_type, hardware].filter(Boolean);
  at("tags").append(...tags.map((text) => element("li", { class: "tag" }, text)));
}

/** An example's pictures are not there to be fetched: the reader brings one. */
function withoutPictures(spec, example) {
  const pictures = spec.fields.filter((field) => field.spec.kind === "picture").map((field) => field.name);
  return Object.fromEntries(Object.entries(example).filter(([name]) => !pictures.includes(name)));
}

async function start() {
  at("id").textContent = ENDPOINT;
  const api = new Api(current);
  const openapi = await api.call(`openapi/${ENDPOINT}`);
  const { models } = await api.call(`v1/models?${new URLSearchParams({ endpoint_id: ENDPOINT })}`);
  introduce(models[0].metadata);
  const page = new Page(api, input(openapi));
  page.show();
  await page.begin();
}

start().catch((error) => {
  const isUnknown = error instanceof Refused && error.status === 404;
  at("title").textContent = isUnknown ? "Not served here" : "Something went wrong";
  at("description").textContent = error.message;
});
