"""Inputs drawn at random from an endpoint's OpenAPI document: valid by it, in every form that it allows."""

import random
import string
from collections.abc import Mapping
from typing import Any

# Words as people and attackers write them; what is pasted into a page must come out as it went in.
_WORDS = (
    "a cat",
    "Ünï©ode ☃ 🦊",
    '</script><img src=x onerror="alert(1)">',
    'it\'s "quoted" \\ $HOME `id`',
    "{}",
    "0",
)
_PATTERN = string.ascii_letters + string.digits  # which every pattern of ours takes


def draw(schema: Mapping[str, Any], document: Mapping[str, Any], rng: random.Random) -> Any:
    """A value of a schema in the document. Optional fields are there half of the time."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return draw(document["components"]["schemas"][name], document, rng)
    for word in ("allOf", "anyOf", "oneOf"):
        if options := [each for each in schema.get(word, []) if each.get("enum") != [None]]:
            return draw(rng.choice(options), document, rng)
    if "enum" in schema:
        return rng.choice([each for each in schema["enum"] if each is not None])
    match schema.get("type"):
        case "boolean":
            return rng.random() < 0.5
        case "integer":
            return rng.choice(_whole(schema))
        case "number":
            least, most = schema.get("minimum", -10.0), schema.get("maximum", 10.0)
            return rng.choice([least, most, rng.uniform(least, most), round(rng.uniform(least, most), 2)])
        case "string":
            return _text(schema, rng)
        case "array":
            most = min(schema.get("maxItems", 4), 4)
            count = rng.randint(schema.get("minItems", 0), most)
            return [draw(schema["items"], document, rng) for _ in range(count)]
        case _:
            return _object(schema, document, rng)


def _whole(schema: Mapping[str, Any]) -> list[int]:
    least = schema.get("minimum", -1000) + bool(schema.get("exclusiveMinimum"))
    most = schema.get("maximum", least + 1000) - bool(schema.get("exclusiveMaximum"))
    return [least, most, least + 1, (least + most) // 2]


def _text(schema: Mapping[str, Any], rng: random.Random) -> str:
    if "pattern" in schema:
        return "".join(rng.choices(_PATTERN, k=8))
    return rng.choice(_WORDS)[: schema.get("maxLength", 100)]


def _object(schema: Mapping[str, Any], document: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping):
        return {word: draw(others, document, rng) for word in rng.sample(_WORDS, 2)}
    required = schema.get("required", [])
    return {
        name: draw(each, document, rng)
        for name, each in schema.get("properties", {}).items()
        if name in required or rng.random() < 0.5
    }
