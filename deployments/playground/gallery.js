// The gallery: a card for each model, as /v1/models tells of it.

import { Api, SERVER } from "./api.js";
import { element, picture } from "./dom.js";
import { History } from "./history.js";
import { input } from "./schema.js";

const cards = document.getElementById("cards");
const note = document.getElementById("note");

/** The longest text of an example: what was asked for, in words. */
function words(example) {
  const texts = Object.values(example).filter((each) => typeof each === "string" && each.includes(" "));
  return texts.sort((one, other) => other.length - one.length)[0];
}

function card({ endpoint_id: id, metadata, openapi }, last) {
  const example = words(input(openapi).example);
  const facts = { Licence: metadata.license_type, Hardware: metadata.hardware };
  const known = Object.entries(facts).filter(([, text]) => text);
  return element(
    "li",
    {},
    element(
      "a",
      { class: "card", href: new URL(`playground/${id.split("/").map(encodeURIComponent).join("/")}`, SERVER) },
      last && element("div", { class: "last" }, picture(last, { alt: "" })),
      element("span", { class: "tag" }, metadata.category),
      element("h2", {}, metadata.display_name),
      element("code", {}, id),
      element("p", {}, metadata.description),
      example && element("blockquote", {}, example),
      element(
        "dl",
        { class: "facts" },
        known.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]),
      ),
    ),
  );
}

async function show() {
  const history = new History(localStorage);
  const last = (id) => history.of(id).find((each) => each.picture)?.picture;
  const models = await new Api(() => "").models();
  cards.replaceChildren(...models.map((model) => card(model, last(model.endpoint_id))));
  note.textContent = models.length ? "" : "No model is served at the moment.";
}

show().catch((error) => (note.textContent = `The models could not be listed: ${error.message}`));
