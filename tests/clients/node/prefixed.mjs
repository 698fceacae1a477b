// A visit to a server that a proxy shows below a prefix. node prefixed.mjs SERVER PICTURE

import { telling } from "./pages.mjs";

const [server, file] = process.argv.slice(2);
const DRAW = "fal-ai/flux/dev";
const REMAKE = "fal-ai/flux-lora/image-to-image";

const run = (page) => page.getByRole("button", { name: "Run", exact: true }).click();

await telling(async (open) => {
  const page = await open(`${server}/`); // the front door
  const told = { gallery: page.url() };
  await page.getByRole("link", { name: DRAW }).click();
  await page.getByRole("textbox", { name: "Prompt", exact: true }).fill("a lighthouse");
  told.page = page.url();
  await run(page);
  told.code = await page.locator("#code pre").innerText();
  told.picture = await picture(page);

  const odd = await open(`${server}/playground/fal-ai%2Fnope`);
  await odd.getByRole("heading", { name: "Not served here" }).waitFor();
  await odd.getByRole("link", { name: "All models" }).click();
  await odd.getByRole("link", { name: REMAKE }).click();
  const url = odd.getByRole("textbox", { name: "Image url" });
  await odd.locator("input[type=file]").setInputFiles(file);
  await odd.waitForFunction((each) => each.value.includes("/files/"), await url.elementHandle());
  told.uploaded = await url.inputValue();
  await odd.locator(".thumb img").evaluate((each) => each.decode());
  await odd.getByRole("textbox", { name: "Prompt", exact: true }).fill("the same by night");
  await run(odd);
  told.remade = await picture(odd);
  await odd.getByRole("link", { name: "All models" }).click();
  await odd.locator(".card .last img").first().waitFor();
  told.back = odd.url();
  return told;
});

async function picture(page) {
  const image = page.locator(".results img");
  await image.waitFor();
  await image.evaluate((each) => each.decode());
  return image.getAttribute("src");
}
