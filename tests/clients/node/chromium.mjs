// A headless Chromium. On 64-bit Linux it is the one in node_modules, which carries its own libraries and fonts
// and so starts on a bare machine; elsewhere it is the Chrome that is installed.

import { existsSync, mkdtempSync, renameSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { inflate } from "@sparticuz/chromium";
import { chromium } from "playwright-core";

const MODULES = join(dirname(fileURLToPath(import.meta.url)), "node_modules");
const PACKED = join(dirname(createRequire(import.meta.url).resolve("@sparticuz/chromium")), "../../bin");
const PARTS = ["chromium.br", "al2023.tar.br", "fonts.tar.br"];

/** Starts it. Its security is that of any browser: the package's own flags would switch CORS off. */
export async function launch() {
  if (process.platform !== "linux" || process.arch !== "x64") {
    return chromium.launch({ channel: "chrome" });
  }
  const folder = await unpacked();
  const env = {
    ...process.env,
    LD_LIBRARY_PATH: join(folder, "al2023/lib"),
    FONTCONFIG_PATH: join(folder, "fonts"),
  };
  return chromium.launch({ executablePath: join(folder, "chromium"), env });
}

/** The folder with the unpacked browser, which is there as a whole or not at all. */
async function unpacked() {
  const folder = join(MODULES, ".chromium");
  if (!existsSync(folder)) {
    process.env.TMPDIR = mkdtempSync(`${folder}-`); // where the package unpacks to
    await Promise.all(PARTS.map((part) => inflate(join(PACKED, part))));
    renameSync(process.env.TMPDIR, folder);
    delete process.env.TMPDIR;
  }
  return folder;
}
