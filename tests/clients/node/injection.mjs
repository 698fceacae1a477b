// A visit where every word is a script. node injection.mjs SERVER: reads {script} as JSON.

import { readFileSync } from "node:fs";
import { telling } from "./pages.mjs";

const [server] = process.argv.slice(2);
const { script } = JSON.parse(readFileSync(0, "utf8"));
const ENDPOINT = "fal-ai/flux-lora/image-to-image";

await telling(async (open) => {
  const page = await open(`${server}/health`);
  await page.context().addInitScript(() => {
    window.violations = [];
    addEventListener("securitypolicyviolation", (event) =>
      window.violations.push(event.violatedDirective + event.blockedURI),
    );
  });
  await page.evaluate(leave, { script, endpoint: ENDPOINT });
  const told = { violations: [], addresses: [], pwned: false };

  async function look() {
    told.violations.push(...(await page.evaluate(() => window.violations)));
    told.addresses.push(...(await page.evaluate(leading)));
    told.pwned ||= await page.evaluate(() => "pwned" in window);
  }

  await page.goto(`${server}/playground`);
  await page.locator(".card").first().waitFor();
  await look();
  await page.goto(`${server}/playground/${encodeURIComponent(script)}`);
  await page.getByRole("heading", { name: "Not served here" }).waitFor();
  await look();

  await page.goto(`${server}/playground/${ENDPOINT}`);
  await page.locator(".past button").first().waitFor();
  await page.locator("input[type=file]").setInputFiles({
    name: `${script.replaceAll("/", "")}.svg`,
    mimeType: "image/svg+xml",
    buffer: Buffer.from("<svg onload='window.pwned=1'/>"),
  });
  await page.waitForFunction(() =>
    document.querySelector(".drop [role=status]").textContent.endsWith(".svg"),
  );
  told.file = await page.locator(".drop [role=status]").textContent();
  await page.getByRole("textbox", { name: "Prompt", exact: true }).fill(script);
  await page.getByRole("button", { name: "Run", exact: true }).click();
  await page.locator(".results .facts").waitFor();
  await look();
  told.result = await page.locator(".results").textContent();
  told.log = await page.locator(".log").textContent();

  await page.getByRole("button", { name: "Run", exact: true }).click();
  await page.locator(".failure").waitFor();
  await look();
  told.failure = await page.locator(".failure").textContent();
  told.fault = await page.locator(".field .fault").first().textContent();
  told.rest = await page.locator(".faults").textContent();

  await page.reload();
  await page.locator(".past button").first().click();
  await page.locator(".results .facts").waitFor();
  await look();
  return told;
});

/** What an earlier visit, or another page of this server's, may have left. */
function leave({ script, endpoint }) {
  const entry = { endpoint, input: { prompt: script, [script]: script, loras: script }, at: 1, note: script };
  const pictures = ["javascript:window.pwned=1", "data:text/html,<script>window.pwned=1</script>", script];
  const entries = pictures.map((picture, index) => ({
    ...entry,
    id: `${script}${index}`,
    state: script,
    picture,
  }));
  localStorage.setItem("darkroom.history", JSON.stringify([...entries, null, 7, { id: 8 }]));
  localStorage.setItem("darkroom.theme", script);
  sessionStorage.setItem("darkroom.key", "");
}

/** Links and pictures that lead to what may run. */
function leading() {
  const all = [...document.querySelectorAll("[href], [src], [action], [srcdoc], [data]")];
  const values = all.flatMap((each) =>
    ["href", "src", "action", "srcdoc", "data"].map((name) => each.getAttribute(name) ?? ""),
  );
  return values.filter((value) => /^\s*(javascript|vbscript):|^\s*data:(?!image\/(png|jpeg))/i.test(value));
}
