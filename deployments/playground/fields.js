// The field for each kind of spec.

import { FileField, Picture } from "./files.js";
import { List, MapField, ObjectField, Union } from "./groups.js";
import { Choice, Json, NumberField, Numbers, Switch, Text } from "./scalars.js";

const KINDS = {
  text: Text,
  picture: Picture,
  file: FileField,
  integer: NumberField,
  number: NumberField,
  boolean: Switch,
  choice: Choice,
  numbers: Numbers,
  json: Json,
  object: ObjectField,
  list: List,
  map: MapField,
  union: Union,
};

/** `place`: {name, isRequired, changed, upload}: its name, whether it must have a value, what to call when that has
 * changed, and what sends a file and gives its address. */
export function make(spec, place) {
  return new KINDS[spec.kind]({ ...spec }, { ...place, make });
}
