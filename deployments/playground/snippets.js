// The request as code: for fal's clients, pointed at this server, and for curl. Pure functions over text.

import { write, written } from "./json.js";

/** {title → code}. `server`: its origin. The key is named, never written. */
export function snippets(server, endpointId, input) {
  return {
    Python: python(server, endpointId, input),
    JavaScript: javaScript(server, endpointId, input),
    curl: curl(server, endpointId, input),
  };
}

const PYTHON = { true: "True", false: "False", null: "None", indent: 4 };
const JAVA_SCRIPT = { true: "true", false: "false", null: "null", indent: 2, bare: true };

function python(server, endpointId, input) {
  return `import fal_client  # reads the key from FAL_KEY
import fal_client.client as c

B = ${written(server, PYTHON)}
c.RUN_URL_FORMAT, c.QUEUE_URL_FORMAT = B + "/run/", B + "/queue/"
c.REST_URL, c.CDN_URL = B + "/rest", B + "/cdn"

result = fal_client.subscribe(
    ${written(endpointId, PYTHON)},
    arguments=${written(input, PYTHON, "    ")},
)
print(result)
`;
}

function javaScript(server, endpointId, input) {
  return `import { fal } from "@fal-ai/client";

fal.config({
  credentials: process.env.FAL_KEY,
  proxyUrl: { url: ${written(`${server}/api/fal/proxy`, JAVA_SCRIPT)}, when: "always" },
});

const { data } = await fal.subscribe(${written(endpointId, JAVA_SCRIPT)}, {
  input: ${javaScriptValue(input)},
});
console.log(data);
`;
}

/** Whole numbers that JavaScript cannot hold are sent as text, which the server reads as well. */
function javaScriptValue(input) {
  return written(asText(input), JAVA_SCRIPT, "  ");
}

function asText(value) {
  if (typeof value === "bigint") return String(value);
  if (Array.isArray(value)) return value.map(asText);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, asText(each)]));
}

function curl(server, endpointId, input) {
  return `curl ${shell(`${server}/run/${endpointId}`)} \\
  -H "Authorization: Key $FAL_KEY" -H 'Content-Type: application/json' \\
  -d ${shell(write(input, 2))}
`;
}

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
