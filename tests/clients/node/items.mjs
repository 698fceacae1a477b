// Items of a list that come and go, and a file for one of them. node items.mjs SERVER

import { telling } from "./pages.mjs";

const [server] = process.argv.slice(2);

await telling(async (open) => {
  const page = await open(`${server}/playground/fal-ai/flux-lora/image-to-image`);
  const item = (number) => page.getByRole("group", { name: `Loras ${number}` });
  const button = (name) => page.getByRole("button", { name, exact: true });
  await page.getByRole("textbox", { name: "Image url" }).fill("https://pictures.example/start.png");
  await page.getByText("More settings").click();
  const hints = await page.locator(".field > .head, .group > .fields > .row").evaluateAll((all) =>
    all.map((each) => [
      each.closest(".field, .group").querySelector("label, legend").textContent,
      each.querySelector(".hint")?.textContent,
    ]),
  );
  for (const [index, path] of ["one", "two", "three"].entries()) {
    await button("Add to Loras").click();
    await item(index + 1).getByRole("textbox", { name: "Path" }).fill(path);
  }
  await item(3).getByRole("textbox", { name: "Scale" }).fill("99");
  await button("Remove Loras 2").click();
  await button("Run").click();
  await page.locator("[aria-invalid]").waitFor();
  const told = {
    hints: Object.fromEntries(hints),
    invalid: await page.locator("[aria-invalid]").evaluate((each) => {
      const item = each.closest("fieldset");
      return {
        item: item.querySelector("legend").textContent,
        path: item.querySelector("input").value,
        field: each.closest(".field").querySelector("label").textContent,
      };
    }),
    fault: await page.locator(".fault:not(:empty)").innerText(),
  };
  await button("Add to Loras").click();
  const all = (selector, read) => page.locator(selector).evaluateAll(read);
  told.items = await all(".items legend", (each) => each.map(({ textContent }) => textContent));
  told.buttons = await all(".items > li > button", (each) => each.map(({ ariaLabel }) => ariaLabel));
  await button("Remove Loras 1").click();
  const path = item(1).getByRole("textbox", { name: "Path" });
  told.left = await path.inputValue();
  const weights = { name: "stripes.safetensors", mimeType: "", buffer: Buffer.from("weights") };
  await item(1).locator("input[type=file]").setInputFiles(weights);
  await page.waitForFunction((each) => each.value.includes("/files/"), await path.elementHandle());
  told.uploaded = await path.inputValue();
  return told;
});
