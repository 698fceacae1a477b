// Forms filled with values, and read again. node forms.mjs SERVER: reads {endpoint: [values]} as JSON texts, writes
// {endpoint: {untouched, read}} likewise.

import { readFileSync } from "node:fs";
import { telling } from "./pages.mjs";

const [server] = process.argv.slice(2);
const given = JSON.parse(readFileSync(0, "utf8"));

await telling(async (open) => {
  const page = await open(`${server}/playground`);
  const told = {};
  for (const [endpoint, texts] of Object.entries(given))
    told[endpoint] = await page.evaluate(filled, { endpoint, texts });
  return { told };
});

async function filled({ endpoint, texts }) {
  const part = (name) => import(`/playground/static/${name}.js`);
  const [{ Form }, { input }, json] = await Promise.all(["form", "schema", "json"].map(part));
  const document_ = json.read(await (await fetch(`/openapi/${endpoint}`)).text());
  const form = new Form(input(document_).spec, { changed: () => {}, upload: () => {} });
  document.body.append(form.element);
  const untouched = json.write(form.value());
  const read = texts.map((text) => {
    form.fill(json.read(text));
    return json.write(form.value());
  });
  form.element.remove();
  return { untouched, read };
}
