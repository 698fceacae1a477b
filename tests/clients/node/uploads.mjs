// Files as fal's JavaScript clients send them. node uploads.mjs WAY URL, on stdin {"large": bytes}.

import { readFileSync } from "node:fs";
import { connect, failure } from "./connect.mjs";

const [way, server] = process.argv.slice(2);
const { large } = JSON.parse(readFileSync(0));
const fal = connect(way, server, "alice:s3cret");
const intruder = () => connect(way, server, "alice:guess");

const report = {};
report.file = await fal.storage.upload(new File(["Hello, World!"], "hello.txt", { type: "text/plain" }));
report.unnamed = await fal.storage.upload(new Blob(["{}"], { type: "application/json" }));
report.untyped = await fal.storage.upload(new Blob(["\u0000\u0001"]));
report.empty = await fal.storage.upload(new File([], "empty.txt", { type: "text/plain" }));
if (way !== "serverless") {
  const hour = { lifecycle: { expiresIn: "1h" } };
  report.kept = await fal.storage.upload(new Blob(["x"], { type: "text/plain" }), hour);
  const hidden = { lifecycle: { initialAcl: { default: "forbid" } } };
  report.hidden = await failure(fal.storage.upload(new Blob(["x"], { type: "text/plain" }), hidden));
}
report.large = await fal.storage.upload(new File([new Uint8Array(large).fill(7)], "large.bin"));
report.wrongKey = await failure(intruder().storage.upload(new Blob(["x"], { type: "text/plain" })));
console.log(JSON.stringify(report));
