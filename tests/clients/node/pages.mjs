// A browser on the playground's pages, and what it complains of.

import { launch } from "./chromium.mjs";

/** What `story(open)` tells, with the complaints of all its pages. `open(url, options)` gives a page. */
export async function telling(story) {
  const browser = await launch();
  const complaints = [];
  const contexts = [];

  async function open(url, options = {}) {
    const context = await browser.newContext(options);
    contexts.push(context);
    const page = await context.newPage();
    watch(page, complaints);
    await page.goto(url);
    return page;
  }

  try {
    const told = await story(open);
    console.log(JSON.stringify({ ...told, complaints }));
  } finally {
    await browser.close();
  }
}

function watch(page, complaints) {
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("dialog", (dialog) => {
    complaints.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
}

/** Shows the key that the page asks for. */
export async function unlock(page, key) {
  await page.getByRole("dialog").getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Use this key" }).click();
}

/** The page's storage, its address and its cookies: what somebody else might read. */
export const left = (page) =>
  page.evaluate(() => ({
    local: JSON.stringify({ ...localStorage }),
    session: JSON.stringify({ ...sessionStorage }),
    address: location.href,
    cookies: document.cookie,
  }));
