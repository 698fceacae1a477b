// What an endpoint takes, read from its OpenAPI document into specs, which fields are made from.
//
// A spec has a `kind`, a `description`, a `default` and what its kind needs:
//   text       isLong, most: characters
//   picture    text that names a picture
//   file       text that names another file: a LoRA …
//   integer, number    min, max: NaN where there is none; isOpen: min itself is too small
//   boolean
//   choice     values
//   object     fields: [{name, spec, isRequired}]
//   list       item, most
//   numbers    a list of numbers; item, most
//   map        names → item
//   json       anything
//   union      options: specs, the first that fits a value takes it

const SCHEMAS = "#/components/schemas/";
const ASSET = "x-darkroom-asset";
const LONG = 4096; // characters; what may be longer is prose

/** The spec of what is submitted, and its example. */
export function input(document) {
  const submit = Object.values(document.paths).find((path) => path.post).post;
  const schema = resolved(submit.requestBody.content["application/json"].schema, document);
  return { spec: read(schema, document), example: schema.example ?? {} };
}

/** Whether a value is of a spec's kind; its bounds are the server's to check. */
export function fits(spec, value) {
  switch (spec.kind) {
    case "choice":
      return spec.values.includes(value);
    case "text":
    case "picture":
    case "file":
      return typeof value === "string";
    case "integer":
    case "number":
      return typeof value === "number" || typeof value === "bigint";
    case "boolean":
      return typeof value === "boolean";
    case "list":
    case "numbers":
      return Array.isArray(value);
    case "union":
      return spec.options.some((option) => fits(option, value));
    default:
      return typeof value === "object" && value !== null && !Array.isArray(value);
  }
}

function read(given, document) {
  const schema = resolved(given, document);
  const common = { description: schema.description ?? "", default: schema.default };
  return { ...common, ...kindOf(schema, document) };
}

/** What a schema says together with all that it refers to; what it says itself goes before. */
function resolved(schema, document) {
  const { $ref, allOf = [], ...own } = schema;
  const named = $ref ? [document.components.schemas[$ref.slice(SCHEMAS.length)]] : [];
  const whole = Object.assign({}, ...[...named, ...allOf].map((each) => resolved(each, document)), own);
  const { anyOf = [], oneOf = [], ...rest } = whole;
  const options = [...anyOf, ...oneOf]
    .map((each) => resolved(each, document))
    .filter((each) => !isNull(each));
  const flat = options.flatMap((each) => each.options ?? [each]);
  if (flat.length > 1) return { ...rest, options: flat.map((each) => marked(each, whole[ASSET])) };
  return flat.length ? { ...flat[0], ...rest } : rest;
}

const isNull = (schema) => schema.enum?.length === 1 && schema.enum[0] === null;

/** The same, if it is text or a list of texts, as the name of a file. */
function marked(schema, asset) {
  if (asset === undefined) return schema;
  return schema.type === "array"
    ? { ...schema, items: { ...schema.items, [ASSET]: asset } }
    : { ...schema, [ASSET]: asset };
}

function kindOf(schema, document) {
  if (schema.options) return { kind: "union", options: schema.options.map((each) => read(each, document)) };
  if (schema.enum) return { kind: "choice", values: schema.enum.filter((each) => each !== null) };
  switch (schema.type) {
    case "boolean":
      return { kind: "boolean" };
    case "integer":
    case "number":
      return {
        kind: schema.type,
        min: Number(schema.minimum),
        max: Number(schema.maximum),
        isOpen: schema.exclusiveMinimum === true,
      };
    case "array":
      return listOf(read(marked(schema.items, schema[ASSET]), document), schema.maxItems);
    case "string":
      return textOf(schema);
    default:
      return objectOf(schema, document);
  }
}

function listOf(item, most) {
  return { kind: ["integer", "number"].includes(item.kind) ? "numbers" : "list", item, most };
}

function textOf(schema) {
  if (schema[ASSET]) return { kind: schema[ASSET] === "image" ? "picture" : "file" };
  return { kind: "text", isLong: schema.maxLength > LONG, most: schema.maxLength };
}

function objectOf(schema, document) {
  const { properties, additionalProperties: others, required = [] } = schema;
  if (properties) {
    const names = schema["x-fal-order-properties"] ?? Object.keys(properties);
    const fields = names.map((name) => ({
      name,
      spec: read(properties[name], document),
      isRequired: required.includes(name),
    }));
    return { kind: "object", fields };
  }
  return typeof others === "object" ? { kind: "map", item: read(others, document) } : { kind: "json" };
}
