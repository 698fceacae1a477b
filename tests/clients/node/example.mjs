// Somebody at examples/page.html. node example.mjs URL KEY.

import { telling } from "./pages.mjs";

const [url, key] = process.argv.slice(2);

await telling(async (open) => {
  const page = await open(url);
  await page.getByLabel("Key").fill(key);
  await page.getByRole("button", { name: "Draw" }).click();
  await page.waitForFunction(() => document.querySelector("#picture").naturalWidth > 0);
  return page.evaluate(() => {
    const picture = document.querySelector("#picture");
    return { width: picture.naturalWidth, alt: picture.alt };
  });
});
