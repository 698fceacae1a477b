// Shows a page to Chromium and tells what its story came to. node browser.mjs FOLDER URL: the page's script is
// bundled into the folder, which is served at the URL.

import { join } from "node:path";
import { build } from "esbuild";
import { launch } from "./chromium.mjs";

const [folder, url] = process.argv.slice(2);
await build({ entryPoints: ["page.mjs"], bundle: true, format: "esm", outfile: join(folder, "page.js") });
const browser = await launch();
try {
  const page = await browser.newPage();
  const complaints = [];
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto(url);
  const report = await page.evaluate(() => window.story);
  console.log(JSON.stringify({ ...report, complaints }));
} finally {
  await browser.close();
}
