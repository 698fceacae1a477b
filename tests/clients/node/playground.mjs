// Somebody at the playground of a real server. node playground.mjs SERVER KEY PICTURE [FOLDER]: with a folder,
// pictures of the pages are left there.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { left, telling, unlock } from "./pages.mjs";

const [server, key, file, folder] = process.argv.slice(2);
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const DRAW = "fal-ai/flux/dev";
const REMAKE = "fal-ai/flux-lora/image-to-image";
const EDIT = "fal-ai/flux-general/rf-inversion";
const PHONE = { viewport: { width: 320, height: 640 } };

const shown = (page, name) =>
  folder && page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });

const prompt = (page) => page.getByRole("textbox", { name: "Prompt", exact: true });
const steps = (page) => page.getByRole("textbox", { name: "Num inference steps" });
const seed = (page) => page.getByRole("textbox", { name: "Seed" });
const state = (page) => page.locator(".state");

/** All texts that an element has had, from now on. */
const watched = (page, selector) =>
  page.evaluate((selector) => {
    const seen = (window.seen = []);
    const watch = new MutationObserver(() => seen.push(document.querySelector(selector).textContent));
    watch.observe(document.querySelector(selector), { childList: true, characterData: true, subtree: true });
  }, selector);

await telling(async (open) => {
  const gallery = await open(`${server}/`); // the front door
  const told = { gallery: await models(gallery) };
  await gallery.getByRole("link", { name: DRAW }).click();
  told.keys = await keys(gallery);
  told.drawn = await draw(gallery);
  told.left = await left(gallery);
  await gallery.getByRole("link", { name: "All models" }).click();
  await gallery.locator(".card .last img").waitFor();
  await shown(gallery, "gallery");
  const page = await unlocked(open, DRAW);
  told.faults = await faults(page);
  told.cancelled = await cancel(page);
  told.resumed = await resume(page);
  told.waited = await wait(page);
  told.broken = await broken(page);
  told.nested = await nested(await unlocked(open, EDIT));
  told.remade = await remake(await unlocked(open, REMAKE));
  told.copied = await copy(
    await unlocked(open, DRAW, { permissions: ["clipboard-read", "clipboard-write"] }),
  );
  told.themes = await themes(await open(`${server}/playground`, { colorScheme: "light" }));
  told.phone = await phone(open);
  told.axe = await axe(open);
  told.unknown = await unknown(await open(`${server}/playground/fal-ai/nope`));
  return told;
});

async function unlocked(open, endpoint, options) {
  const page = await open(`${server}/playground/${endpoint}`, options);
  await unlock(page, key);
  await page.getByRole("dialog").waitFor({ state: "hidden" });
  return page;
}

async function models(page) {
  await page.locator(".card").first().waitFor();
  return { address: page.url(), cards: await page.locator(".card").allInnerTexts() };
}

async function keys(page) {
  await unlock(page, "alice:guess");
  const fault = await page.getByRole("alert").filter({ hasText: /./ }).innerText();
  await unlock(page, key);
  await page.getByRole("dialog").waitFor({ state: "hidden" });
  return { fault };
}

async function size(page, side) {
  await page.getByLabel("Image size").selectOption("Custom");
  await page.getByLabel("Width", { exact: true }).fill(String(side));
  await page.getByLabel("Height", { exact: true }).fill(String(side));
}

async function draw(page) {
  await watched(page, ".state");
  await page.evaluate(() => {
    window.forming = 0;
    new MutationObserver(
      () => (window.forming = Math.max(window.forming, document.querySelectorAll(".forming img").length)),
    ).observe(document.querySelector(".forming"), { childList: true });
  });
  await prompt(page).fill("a lighthouse");
  await size(page, 512);
  await steps(page).fill("40");
  await seed(page).fill("9007199254740993"); // which a number of JavaScript's does not hold
  await page.getByRole("button", { name: "Python" }).click();
  const code = await page.locator("#code pre").innerText();
  await prompt(page).press("Control+Enter");
  const image = page.locator(".results img");
  await image.waitFor();
  await image.evaluate((each) => each.decode());
  await shown(page, "drawn");
  return {
    code,
    states: await page.evaluate(() => window.seen),
    forming: await page.evaluate(() => window.forming),
    natural: await image.evaluate((each) => [each.naturalWidth, each.naturalHeight]),
    facts: await page.locator(".results .facts").innerText(),
    caption: await page.locator("figcaption").innerText(),
    download: await page.getByRole("link", { name: "Download picture 1 of 1" }).getAttribute("download"),
    history: await page.locator(".past button").count(),
    request: new URL(page.url()).hash.slice(1),
  };
}

async function faults(page) {
  await steps(page).fill("many");
  await seed(page).fill("1");
  await page.getByText("More settings").click();
  await page.getByRole("textbox", { name: "Num images" }).fill("9");
  await page.getByText("More settings").click();
  await page.getByRole("button", { name: "Run", exact: true }).click();
  const field = (control) => page.locator(".field").filter({ has: control }).locator(".fault").innerText();
  await page.locator("[aria-invalid]").first().waitFor();
  const told = {
    steps: await field(steps(page)),
    images: await field(page.getByRole("textbox", { name: "Num images" })),
    seed: await page
      .locator(".field")
      .filter({ has: seed(page) })
      .locator(".fault")
      .textContent(),
    focused: await steps(page).evaluate((each) => each === document.activeElement),
    described: await steps(page).evaluate((each) =>
      each
        .getAttribute("aria-describedby")
        .split(" ")
        .map((id) => document.getElementById(id).textContent)
        .join(" "),
    ),
    failure: await page.locator(".failure").innerText(),
  };
  await shown(page, "faults");
  await page.getByRole("button", { name: "Defaults" }).click();
  return { ...told, after: await page.locator("[aria-invalid]").count() };
}

/** Makes a long request, and waits until it runs. */
async function long(page) {
  await prompt(page).fill("a long one");
  await page.getByLabel("Image size").selectOption("square_hd");
  await steps(page).fill("50");
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await state(page)
    .filter({ hasText: /^Step \d+ of 50$/ })
    .waitFor();
}

async function cancel(page) {
  await long(page);
  await page.keyboard.press("Escape");
  const failure = await page.locator(".failure").innerText();
  return {
    failure,
    history: await page.locator(".past button").first().innerText(),
    runs: await page.getByRole("button", { name: "Run", exact: true }).isEnabled(),
  };
}

async function resume(page) {
  await long(page);
  const before = page.url();
  await page.reload();
  await state(page)
    .filter({ hasText: /^Step \d+ of 50$/ })
    .waitFor();
  const told = {
    sameAddress: page.url() === before,
    prompt: await prompt(page).inputValue(),
    steps: await steps(page).inputValue(),
  };
  await page.goto(`${server}/playground/${DRAW}`); // without its id: the last one that was under way
  await state(page)
    .filter({ hasText: /^Step \d+ of 50$/ })
    .waitFor();
  await page.getByRole("button", { name: "Cancel", exact: true }).click();
  return { ...told, found: page.url() === before, failure: await page.locator(".failure").innerText() };
}

/** Behind a request of somebody else's. */
async function wait(page) {
  const headers = { authorization: `Key ${key}` };
  const data = { prompt: "x", image_size: "square_hd", num_inference_steps: 50, num_images: 4 };
  const first = await (await page.request.post(`${server}/queue/${DRAW}`, { headers, data })).json();
  const second = await (await page.request.post(`${server}/queue/${DRAW}`, { headers, data })).json();
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await state(page).filter({ hasText: "In the queue, 1 ahead" }).waitFor();
  await page.request.put(second.cancel_url, { headers });
  await state(page).filter({ hasText: "In the queue, next" }).waitFor();
  await page.getByRole("button", { name: "Cancel", exact: true }).click();
  const failure = await page.locator(".failure").innerText();
  await page.request.put(first.cancel_url, { headers });
  return { failure };
}

/** On a connection that breaks: not opened, ended too early, and then as it should be. */
async function broken(page) {
  const half = 'data: {"status":"IN_QUEUE","queue_position":7,"logs":[]}\n\ndata: {"sta';
  const answers = [
    (route) => route.abort(),
    (route) => route.fulfill({ contentType: "text/event-stream", body: half }),
  ];
  await page.route("**/status/stream*", (route) => (answers.shift() ?? ((each) => each.continue()))(route));
  await watched(page, ".state");
  await page.getByRole("button", { name: "Example" }).click();
  await size(page, 64);
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await page.locator(".results img").waitFor();
  const lines = await page.locator(".log li").allTextContents();
  return { states: await page.evaluate(() => window.seen), left: answers.length, lines };
}

async function nested(page) {
  await page.getByText("More settings").click();
  await page.getByRole("button", { name: "Add to Loras", exact: true }).click();
  await page.getByRole("button", { name: "Add to Loras", exact: true }).click();
  await page.getByRole("button", { name: "Remove Loras 1" }).click();
  await page.getByRole("group", { name: "Loras 1" }).getByLabel("Scale").selectOption("By name");
  await page.getByRole("button", { name: "Add to Scale, by name" }).click();
  await page
    .getByRole("group", { name: "Loras 1" })
    .getByRole("textbox", { name: "Name" })
    .fill("double_blocks.0");
  await page.getByRole("group", { name: "Loras 1" }).getByRole("textbox", { name: "Value" }).fill("7");
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await page.locator("[aria-invalid]").first().waitFor();
  const invalid = await page
    .locator("[aria-invalid]")
    .evaluateAll((all) => all.map((each) => each.closest(".field").querySelector("label").textContent));
  const faults = await page.locator(".fault").allInnerTexts();
  await page.getByText("As code").scrollIntoViewIfNeeded();
  return { invalid, faults: faults.filter(Boolean), code: await page.locator("#code pre").innerText() };
}

async function remake(page) {
  const field = page.locator(".field").filter({ has: page.getByLabel("Image url") });
  const url = page.getByRole("textbox", { name: "Image url" });
  const uploaded = async () => {
    await page.waitForFunction((each) => each.value.includes("/files/"), await url.elementHandle());
    const value = await url.inputValue();
    await field.locator(".thumb img").evaluate((each) => each.decode());
    await url.fill("");
    return value;
  };
  const told = {};
  await page.locator("input[type=file]").setInputFiles(file);
  told.chosen = await uploaded();
  const transfer = await page.evaluateHandle(async (address) => {
    const blob = await (await fetch(address)).blob();
    const data = new DataTransfer();
    data.items.add(new File([blob], "<img src=x onerror=alert(1)>.png", { type: "image/png" }));
    return data;
  }, new URL(told.chosen).pathname);
  await field.dispatchEvent("drop", { dataTransfer: transfer });
  told.dropped = await uploaded();
  await page.evaluate(
    (data) => document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true })),
    transfer,
  );
  await page.waitForFunction((each) => each.value.includes("/files/"), await url.elementHandle());
  told.pasted = await url.inputValue();
  await prompt(page).fill("the same by night");
  await steps(page).fill("4");
  await page.getByRole("button", { name: "Run", exact: true }).click();
  const image = page.locator(".results img");
  await image.waitFor();
  await image.evaluate((each) => each.decode());
  told.natural = await image.evaluate((each) => [each.naturalWidth, each.naturalHeight]);
  await page.getByRole("button", { name: "Defaults" }).click();
  await page.locator(".past button").first().click(); // what was asked for comes back
  await image.waitFor();
  told.again = [await url.inputValue(), await prompt(page).inputValue()];
  return told;
}

async function copy(page) {
  const told = {};
  for (const title of ["Python", "JavaScript", "curl"]) {
    await page.getByRole("button", { name: title }).click();
    await page.getByRole("button", { name: "Copy" }).click();
    await page.getByText("Copied").waitFor();
    told[title] = await page.evaluate(() => navigator.clipboard.readText());
  }
  return told;
}

async function themes(page) {
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const told = [await ground()];
  await page.getByRole("button", { name: "Dark / light" }).click();
  told.push(await ground());
  await page.reload();
  return [...told, await ground()];
}

/** Opens everything that is folded, and adds one to every list. */
async function unfold(page) {
  await page.evaluate(() => {
    for (const each of document.querySelectorAll("details")) each.open = true;
    for (const each of document.querySelectorAll("#form .fields > .plain")) each.click();
    for (const each of document.querySelectorAll("#form .fields > .plain")) each.click();
  });
}

async function phone(open) {
  const widths = {};
  for (const [name, path] of Object.entries({
    gallery: "",
    draw: `/${DRAW}`,
    edit: `/${EDIT}`,
    universal: "/fal-ai/lora/image-to-image",
  })) {
    const page = path
      ? await unlocked(open, path.slice(1), PHONE)
      : await open(`${server}/playground`, PHONE);
    await page
      .locator(path ? "#request" : ".card")
      .first()
      .waitFor();
    await shown(page, `phone-${name}`);
    await unfold(page);
    widths[name] = await page.evaluate(() => document.scrollingElement.scrollWidth);
  }
  return widths;
}

async function axe(open) {
  const found = [];
  for (const colorScheme of ["light", "dark"]) {
    for (const path of ["", `/${DRAW}`, `/${EDIT}`]) {
      const page = path
        ? await unlocked(open, path.slice(1), { colorScheme })
        : await open(`${server}/playground`, { colorScheme });
      if (path === `/${DRAW}`) {
        await size(page, 64);
        await page.getByRole("button", { name: "Run", exact: true }).click();
        await page.locator(".results img").waitFor();
      }
      await page
        .locator(path ? "#request" : ".card")
        .first()
        .waitFor();
      await unfold(page);
      await shown(page, `${colorScheme}${path.replaceAll("/", "-")}`);
      await page.evaluate(AXE);
      const { violations } = await page.evaluate(() => window.axe.run());
      found.push(
        ...violations.map(({ id, impact, nodes }) => ({
          page: `${colorScheme}${path}`,
          id,
          impact,
          nodes: nodes.map((each) => each.html.slice(0, 200)),
        })),
      );
    }
  }
  const page = await open(`${server}/playground/${DRAW}`);
  await page.getByRole("dialog").waitFor();
  await page.evaluate(AXE);
  found.push(
    ...(await page.evaluate(() => window.axe.run())).violations.map(({ id, impact }) => ({
      page: "key",
      id,
      impact,
    })),
  );
  return found;
}

async function unknown(page) {
  await page.getByRole("heading", { name: "Not served here" }).waitFor();
  return { said: await page.locator("#description").innerText() };
}
