"""What a request may ask for at most, field by field as the schemas say, and in all."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from pipelines.registry import ENDPOINTS, endpoint
from schemas.settings import Limits
from tests.support.gateway import Place

UNIVERSAL = "fal-ai/lora/image-to-image"
EVERY = pytest.mark.parametrize("endpoint_id", ENDPOINTS)
Path = tuple[str, ...]
SMALL = {"width": 64, "height": 64}

# bounded by another field as well
TIED = {"start_percentage", "end_percentage", "ip_adapter_index", "reverse_guidance_end"}


@dataclass(frozen=True)
class Number:
    """A numeric field: the path of names to it, and its bounds."""

    path: Path
    schema: Mapping[str, Any]

    @property
    def step(self) -> float:
        return 1 if self.schema["type"] == "integer" else 0.001

    @property
    def least(self) -> Any:
        return self.schema.get("minimum", self.schema.get("exclusiveMinimum", -1) + 1)

    def bounds(self) -> Iterator[tuple[Any, bool]]:
        """Values at the bounds, and whether each is allowed."""
        schema = self.schema
        if "minimum" in schema:
            yield from [(schema["minimum"] - self.step, False), (schema["minimum"], True)]
        if "exclusiveMinimum" in schema:
            yield from [(schema["exclusiveMinimum"], False), (schema["exclusiveMinimum"] + 1, True)]
        if "maximum" in schema:
            yield from [(schema["maximum"], True), (schema["maximum"] + self.step, False)]
        if "exclusiveMaximum" in schema:
            yield from [(schema["exclusiveMaximum"] - 1, True), (schema["exclusiveMaximum"], False)]


def document(endpoint_id: str) -> dict[str, Any]:
    return endpoint(endpoint_id).input_type().model_json_schema()


def options(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The forms that a value may have, references followed."""
    if "$ref" in schema:
        yield from options(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    elif forms := schema.get("anyOf", schema.get("oneOf")):
        for each in forms:
            yield from options(each, root)
    else:
        yield schema


def numbers(schema: Mapping[str, Any], root: Mapping[str, Any], path: Path = ()) -> Iterator[Number]:
    """Every numeric field, in objects and in lists of objects too."""
    for form in options(schema, root):
        match form.get("type"):
            case "integer" | "number" if path:
                yield Number(path, form)
            case "object":
                for name, each in form.get("properties", {}).items():
                    yield from numbers(each, root, (*path, name))
            case "array" if form["items"].get("type") not in ("integer", "number"):
                yield from numbers(form["items"], root, path)


def smallest(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """A value that the schema allows."""
    form = next(options(schema, root))
    match form.get("type"):
        case "object":
            required = form.get("required", [])
            return {name: smallest(form["properties"][name], root) for name in required}
        case "array":
            return [smallest(form["items"], root)]
        case "string":
            return form.get("enum", ["x"])[0]
    return form.get("minimum", 1)


def wish(schema: Mapping[str, Any], root: Mapping[str, Any], path: Path, value: Any) -> Any:
    """The smallest value, with `value` at the path."""
    if not path:
        return value
    for form in options(schema, root):
        if form.get("type") == "array":
            return [wish(form["items"], root, path, value)]
        if path[0] in form.get("properties", {}):
            whole = SMALL if path[0] in SMALL else smallest(form, root)
            return {**whole, path[0]: wish(form["properties"][path[0]], root, path[1:], value)}
    raise AssertionError(f"the schema has no {path}")


def requests(endpoint_id: str) -> Iterator[tuple[Number, Any]]:
    root = document(endpoint_id)
    for number in numbers(root, root):
        yield number, lambda value, path=number.path: wish(root, root, path, value)


def text(value: Any, raw: str | None) -> str:
    """JSON; where it says RAW, there stands what JSON's writer would not write."""
    return json.dumps(value).replace('"RAW"', raw or "")


def path_of(loc: list[Any]) -> Path:
    return tuple(part for part in loc[1:] if isinstance(part, str))


@EVERY
async def test_t16_numbers_beyond_their_bounds_are_refused_by_name_before_any_work(
    endpoint_id: str, place: Place, alice: httpx.AsyncClient
) -> None:
    checked = 0
    for number, asking in requests(endpoint_id):
        wrong = [value for value, allowed in number.bounds() if not allowed]
        bodies = [text(asking(value), None) for value in wrong]
        bodies += [text(asking("RAW"), raw) for raw in ("NaN", "1e999", "-1e999", '"x"', "[]", '[{"a":1}]')]
        if "maximum" in number.schema or "exclusiveMaximum" in number.schema:
            bodies.append(text(asking(10**30), None))
        for body in bodies:
            answer = await alice.post(f"/queue/{endpoint_id}", content=body)
            assert answer.status_code == 422, (number.path, body)
            fault = answer.json()["detail"][0]
            assert {"loc", "msg", "type"} <= set(fault)
            assert path_of(fault["loc"])[: len(number.path)] == number.path, (fault, body)
            checked += 1
    assert checked > 40
    assert place.model.order == []


@EVERY
async def test_t16_every_number_at_its_bounds_is_taken(
    endpoint_id: str, place: Place, alice: httpx.AsyncClient
) -> None:
    for number, asking in requests(endpoint_id):
        for value in [value for value, allowed in number.bounds() if allowed]:
            answer = await alice.post(f"/queue/{endpoint_id}", json=asking(value))
            expected = (200, 422) if number.path[-1] in TIED else (200,)
            assert answer.status_code in expected, (number.path, value, answer.text)


@EVERY
async def test_t16_other_ways_to_write_a_number_are_read_as_at_fal_or_refused(
    endpoint_id: str, place: Place, alice: httpx.AsyncClient
) -> None:
    for number, asking in requests(endpoint_id):
        for raw in ("true", '"1"', "-0.0", "null", "{}", "1.5", "1e1", f"{10**30}", '"NaN"', '"1e999"'):
            answer = await alice.post(f"/queue/{endpoint_id}", content=text(asking("RAW"), raw))
            assert answer.status_code in (200, 422), (number.path, raw)
            if raw in ('"NaN"', '"1e999"'):
                assert answer.status_code == 422, (number.path, raw)


def long_list(field: str, item: Any) -> dict[str, Any]:
    return {"prompt": "x", "model_name": "x", "image_url": "x", "control_image_url": "x", field: item}


MANY = 10**6
LONG = {
    "loras": long_list("loras", [{"path": "x"}] * MANY),
    "numbers for loras": long_list("loras", [1] * MANY),
    "controlnets": long_list("controlnets", [{"path": "x"}] * MANY),
    "timesteps": long_list("timesteps", {"method": "array", "array": [5] * MANY}),
    "scale_json": long_list(
        "ip_adapter", [{"path": "x", "ip_adapter_image_url": "x", "scale_json": {"a": [1] * MANY}}]
    ),
    "an unknown field": long_list("nonsense", [[]] * MANY),
    "lists in lists": long_list("nonsense", [[1] * 4000] * 1000),
    "prompt": long_list("prompt", "a, b " * (2 * MANY)),
    "negative_prompt": long_list("negative_prompt", "x" * (10 * MANY)),
}


@pytest.mark.parametrize("name", LONG)
async def test_t16_lists_and_texts_without_end_are_refused_within_a_cpu_second(
    name: str, place: Place, alice: httpx.AsyncClient
) -> None:
    body = json.dumps(LONG[name])
    began = time.process_time()
    answer = await alice.post(f"/queue/{UNIVERSAL}", content=body)
    spent = time.process_time() - began
    assert answer.status_code == 422
    assert len(answer.content) < 10_000
    assert answer.json()["detail"][0]["loc"][0] == "body"
    assert place.model.order == []
    assert spent < 20  # 1 on a core of its own, with the client's sending; by the square, hours


MOST = {"width": 2048, "height": 2048}


@pytest.mark.parametrize(
    ("endpoint_id", "fields", "field"),
    [
        ("fal-ai/flux/dev", {"image_size": MOST}, None),
        ("fal-ai/flux/dev", {"image_size": MOST, "num_images": 4, "num_inference_steps": 50}, None),
        ("fal-ai/flux-general/rf-inversion", {"image_size": MOST, "num_images": 10}, None),
        (
            "fal-ai/flux-general/rf-inversion",
            {"image_size": MOST, "num_images": 10, "num_inference_steps": 50},
            "num_images",
        ),
    ],
)
async def test_t16_pixels_images_and_steps_together_have_a_bound(
    endpoint_id: str,
    fields: dict[str, Any],
    field: str | None,
    place: Place,
    alice: httpx.AsyncClient,
) -> None:
    known = {"prompt": "x", "image_url": "x"}
    answer = await alice.post(f"/queue/{endpoint_id}", json=known | fields)
    if field is None:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 422
        [fault] = answer.json()["detail"]
        assert fault["loc"] == ["body", field]
        assert fault["ctx"] == {"le": Limits().max_megapixel_steps}
        assert "fewer images" in fault["msg"]
        assert place.model.order == []


@EVERY
async def test_t16_the_examples_of_the_endpoints_are_taken(
    endpoint_id: str, alice: httpx.AsyncClient
) -> None:
    example = endpoint(endpoint_id).schema().EXAMPLE
    assert (await alice.post(f"/queue/{endpoint_id}", json=example)).status_code == 200
