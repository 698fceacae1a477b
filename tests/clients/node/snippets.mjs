// Inputs as code. node snippets.mjs MODULE: reads JSON texts, writes {title: code} for each.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder] = process.argv.slice(2);
const part = (name) => import(pathToFileURL(`${folder}/${name}`));
const [{ snippets }, json] = await Promise.all([part("snippets.js"), part("json.js")]);
const texts = JSON.parse(readFileSync(0, "utf8"));
console.log(
  JSON.stringify(texts.map((text) => snippets("http://box:8000", "fal-ai/flux/dev", json.read(text)))),
);
