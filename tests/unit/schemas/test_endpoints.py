"""Every endpoint in the registry, by its schema alone."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.gateway.validation import ignored, validate
from pipelines.registry import ENDPOINTS, endpoint
from schemas.endpoints.flux_dev import Input, Output
from schemas.errors import InputError
from schemas.settings import Limits

LIMITS = Limits()


def refusals(kind: type[Any], fields: dict[str, Any], limits: Limits = LIMITS) -> list[tuple[list[Any], str]]:
    with pytest.raises(InputError) as raised:
        validate(kind, fields, limits)
    assert all(fault.msg for fault in raised.value.fields)
    return [(list(fault.loc), fault.type) for fault in raised.value.fields]


def bounded() -> Iterator[tuple[str, str, float, float]]:
    """Each numeric field with bounds, of every endpoint, from the schema that clients are shown."""
    for known in ENDPOINTS.values():
        for name, spec in known.input_type().model_json_schema()["properties"].items():
            options = [spec, *spec.get("anyOf", [])]
            found = next((o for o in options if "minimum" in o and "maximum" in o), None)
            if found:
                yield known.id, name, found["minimum"], found["maximum"]


@pytest.mark.parametrize("endpoint_id", list(ENDPOINTS))
def test_the_example_is_valid(endpoint_id: str) -> None:
    schema = endpoint(endpoint_id).schema()
    validate(schema.Input, schema.EXAMPLE, LIMITS)


@pytest.mark.parametrize(("endpoint_id", "name", "least", "most"), list(bounded()))
def test_bounds_hold_to_the_number(endpoint_id: str, name: str, least: float, most: float) -> None:
    schema = endpoint(endpoint_id).schema()
    for good in (least, most):
        validate(schema.Input, schema.EXAMPLE | {name: good}, LIMITS)
    for bad, kind in ((least - 1, "greater_than_equal"), (most + 1, "less_than_equal")):
        assert refusals(schema.Input, schema.EXAMPLE | {name: bad}) == [(["body", name], kind)]


@pytest.mark.parametrize("endpoint_id", list(ENDPOINTS))
def test_null_means_absent_for_every_optional_field(endpoint_id: str) -> None:
    schema = endpoint(endpoint_id).schema()
    required = {n: v for n, v in schema.EXAMPLE.items() if schema.Input.model_fields[n].is_required()}
    nulls = {n: None for n, f in schema.Input.model_fields.items() if not f.is_required()}
    assert validate(schema.Input, required | nulls, LIMITS) == validate(schema.Input, required, LIMITS)


@pytest.mark.parametrize("endpoint_id", list(ENDPOINTS))
def test_unknown_fields_are_ignored_and_named(endpoint_id: str) -> None:
    schema = endpoint(endpoint_id).schema()
    sent = schema.EXAMPLE | {"promt": "x", "zzz": 1}
    assert validate(schema.Input, sent, LIMITS) == validate(schema.Input, schema.EXAMPLE, LIMITS)
    assert ignored(schema.Input, sent) == ["promt", "zzz"]


@pytest.mark.parametrize("endpoint_id", list(ENDPOINTS))
def test_an_input_survives_the_queue(endpoint_id: str) -> None:
    schema = endpoint(endpoint_id).schema()
    value = validate(schema.Input, schema.EXAMPLE, LIMITS)
    assert schema.Input.model_validate(value.model_dump(mode="json", exclude_none=True)) == value


def test_an_unknown_endpoint_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="fal-ai/flux/dev"):
        endpoint("fal-ai/nope")


def test_flux_dev_has_exactly_the_fields_of_its_page_with_their_defaults() -> None:
    defaults = Input(prompt="x").model_dump(mode="json")
    assert defaults == {
        "prompt": "x",
        "image_size": "landscape_4_3",
        "num_inference_steps": 28,
        "seed": None,
        "guidance_scale": 3.5,
        "sync_mode": False,
        "num_images": 1,
        "enable_safety_checker": True,
    }
    assert list(Output.model_fields) == ["images", "timings", "seed", "has_nsfw_concepts", "prompt"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(["body", "prompt"], "missing")]),
        ({"prompt": None}, [(["body", "prompt"], "missing")]),
        ({"prompt": 5}, [(["body", "prompt"], "string_type")]),
        ({"prompt": "x" * 40_000}, [(["body", "prompt"], "string_too_long")]),
        ({"prompt": "x", "image_size": "huge"}, [(["body", "image_size"], "enum")]),
        ({"prompt": "x", "image_size": 5}, [(["body", "image_size"], "image_size")]),
        ({"prompt": "x", "image_size": []}, [(["body", "image_size"], "image_size")]),
        (
            {"prompt": "x", "image_size": {"width": 0}},
            [(["body", "image_size", "width"], "greater_than")],
        ),
        (
            {"prompt": "x", "image_size": {"width": 14143, "height": "a"}},
            [
                (["body", "image_size", "width"], "less_than_equal"),
                (["body", "image_size", "height"], "int_parsing"),
            ],
        ),
        # the schema allows it, this server does not
        (
            {"prompt": "x", "image_size": {"width": 14142, "height": 14142}},
            [(["body", "image_size"], "less_than_equal")],
        ),
        ({"prompt": "x", "seed": 2**63}, [(["body", "seed"], "less_than")]),
        ({"prompt": "x", "seed": 1.5}, [(["body", "seed"], "int_from_float")]),
        ({"prompt": "x", "sync_mode": "maybe"}, [(["body", "sync_mode"], "bool_parsing")]),
    ],
)
def test_flux_dev_refuses_with_the_path_of_the_field(
    fields: dict[str, Any], expected: list[tuple[list[Any], str]]
) -> None:
    assert refusals(Input, fields) == expected


def test_a_custom_size_may_leave_a_side_out() -> None:
    value = validate(Input, {"prompt": "x", "image_size": {"width": 64}}, LIMITS)
    assert value.model_dump()["image_size"] == {"width": 64, "height": 512}


def test_numbers_as_text_are_read_as_fal_reads_them() -> None:
    value = validate(Input, {"prompt": "x", "seed": "7", "guidance_scale": "2.5"}, LIMITS)
    assert (value.seed, value.guidance_scale) == (7, 2.5)


def test_a_wrong_value_is_not_echoed_when_it_is_large() -> None:
    with pytest.raises(InputError) as raised:
        validate(Input, {"prompt": "x" * 40_000}, LIMITS)
    assert raised.value.fields[0].input is None


def test_an_input_pickles() -> None:
    value = Input(prompt="x", seed=3)
    assert pickle.loads(pickle.dumps(value)) == value
