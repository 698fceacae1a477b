// The page of one endpoint: which one, its address says; everything else, its OpenAPI document.

import { Api, Refused } from "./api.js";
import { Code } from "./code.js";
import { element } from "./dom.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { KeyDialog, current } from "./key.js";
import { Past } from "./past.js";
import { Queue } from "./queue.js";
import { Run } from "./run.js";
import { input } from "./schema.js";

const endpointId = decodeURIComponent(location.pathname.replace(/^\/playground\//, "").replace(/\/$/, ""));
const at = (id) => document.getElementById(id);

async function start() {
  const api = new Api(current);
  const document_ = await api.call(`/openapi/${endpointId}`);
  const { metadata } = (await api.call(`/v1/models?${new URLSearchParams({ endpoint_id: endpointId })}`))
    .models[0];
  const { spec, example } = input(document_);
  introduce(metadata);

  const history = new History(localStorage);
  const code = new Code(location.origin, endpointId);
  const form = new Form(spec, {
    changed: () => code.show(form.value()),
    upload: (file) => withKey(() => api.upload(file)),
  });
  const run = new Run(new Queue(api, endpointId), history, {
    endpointId,
    form,
    refused: () => key.ask("The server asks for a key."),
  });
  const past = new Past(history, endpointId, (entry) => open(entry));
  const key = new KeyDialog(
    () => api.opens(),
    () => resume(),
  );
  run.changed = () => past.show();

  async function withKey(act) {
    try {
      return await act();
    } catch (error) {
      if (error.status === 401) key.ask("The server asks for a key.");
      throw error;
    }
  }

  function open(entry) {
    if (entry.input) form.fill(entry.input);
    run.follow(entry.id);
  }

  /** Goes on with the request that the address names, or the last one that was under way. */
  function resume() {
    if (run.isBusy) return;
    const named = location.hash.slice(1);
    const entry = history.find(named) ?? history.of(endpointId).find((each) => each.state === "running");
    if (entry) open(entry);
    else if (named) run.follow(named);
  }

  at("form").append(form.element);
  at("output").append(run.element, past.element);
  at("code").append(code.element);
  document.body.append(key.element);
  at("key-button").addEventListener("click", () => key.ask());
  at("example").addEventListener("click", () => form.fill(withoutPictures(spec, example)));
  at("empty").addEventListener("click", () => form.fill({}));
  at("request").addEventListener("submit", (event) => {
    event.preventDefault();
    run.start();
  });
  at("run").before(run.cancelButton);
  run.button = at("run");
  listen(form, run);
  form.fill(withoutPictures(spec, example));
  past.show();
  at("request").hidden = at("code-section").hidden = false;

  const isOpen = await api.opens();
  at("key-button").hidden = isOpen && !current();
  if (isOpen) resume();
  else key.ask();
}

function introduce({ display_name, description, category, license_type, hardware }) {
  document.title = `${display_name} · darkroom`;
  at("title").textContent = display_name;
  at("id").textContent = endpointId;
  at("description").textContent = description;
  at("tags").append(
    ...[category, license_type, hardware]
      .filter(Boolean)
      .map((text) => element("li", { class: "tag" }, text)),
  );
}

/** The keys of the page, and pictures that are pasted anywhere on it. */
function listen(form, run) {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run.start();
    }
    if (event.key === "Escape" && run.isBusy && !document.querySelector("dialog[open]")) run.cancel();
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file && form.picture) form.picture.take(file);
  });
  // A file dropped beside the fields would open in the page's place.
  for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());
}

/** An example's pictures are not there to be fetched: the reader brings one. */
function withoutPictures(spec, example) {
  const pictures = spec.fields.filter((field) => field.spec.kind === "picture").map((field) => field.name);
  return Object.fromEntries(Object.entries(example).filter(([name]) => !pictures.includes(name)));
}

start().catch((error) => {
  const isUnknown = error instanceof Refused && error.status === 404;
  at("title").textContent = isUnknown ? "Not served here" : "Something went wrong";
  at("id").textContent = endpointId;
  at("description").textContent = error.message;
});
