"""Every endpoint in the registry, by its schema alone."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.gateway.validation import ignored, validate
from pipelines.registry import ENDPOINTS, endpoint
from schemas.endpoints import flux_general_rf_inversion as rf
from schemas.endpoints import lora_image_to_image as universal
from schemas.endpoints.flux_dev import Input, Output
from schemas.errors import InputError
from schemas.fields import MAX_URL
from schemas.settings import Limits

LIMITS = Limits()
UNIVERSAL, INVERSION = "fal-ai/lora/image-to-image", "fal-ai/flux-general/rf-inversion"
LONG = "https://there.example/" + "x" * MAX_URL


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


@pytest.mark.parametrize(
    ("endpoint_id", "fields", "place"),
    [
        ("fal-ai/flux-lora/image-to-image", {"image_url": LONG}, ["image_url"]),
        (INVERSION, {"fill_image": {"fill_image_url": LONG}}, ["fill_image", "fill_image_url"]),
        (INVERSION, {"fill_image": {"fill_image_url": ["x", LONG]}}, ["fill_image", "fill_image_url", 1]),
        (UNIVERSAL, {"image_url": LONG}, ["image_url"]),
    ],
)
def test_t16_no_url_of_a_picture_is_longer_than_urls_are(
    endpoint_id: str, fields: dict[str, Any], place: list[Any]
) -> None:
    """It would lie in the queue's database, however large the body that it came in."""
    schema = endpoint(endpoint_id).schema()
    assert refusals(schema.Input, schema.EXAMPLE | fields) == [(["body", *place], "string_too_long")]
    validate(schema.Input, schema.EXAMPLE | {"image_url": f"data:,{LONG}"}, LIMITS)


def test_t16_scales_are_no_place_for_books() -> None:
    adapter = {"path": "x", "ip_adapter_image_url": "x", "scale_json": {"down": {"block_1": [0.5] * 1000}}}
    schema = endpoint(UNIVERSAL).schema()
    validate(schema.Input, schema.EXAMPLE | {"ip_adapter": [adapter]}, LIMITS)
    long = adapter | {"scale_json": {"down": "x" * universal.MAX_SCALES}}
    found = refusals(schema.Input, schema.EXAMPLE | {"ip_adapter": [long]})
    assert found == [(["body", "ip_adapter", 0, "scale_json"], "too_long")]


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


def test_rf_inversion_has_exactly_the_fields_of_its_page_with_their_defaults() -> None:
    defaults = rf.Input(prompt="x", image_url="y").model_dump(mode="json")
    assert defaults == {
        "prompt": "x",
        "image_size": None,
        "num_inference_steps": 28,
        "seed": None,
        "loras": [],
        "control_loras": [],
        "controlnets": [],
        "controlnet_unions": [],
        "easycontrols": [],
        "fill_image": None,
        "guidance_scale": 3.5,
        "use_cfg_zero": False,
        "sync_mode": False,
        "num_images": 1,
        "enable_safety_checker": True,
        "reference_image_url": None,
        "reference_strength": 0.65,
        "reference_start": 0,
        "reference_end": 1,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "output_format": "png",
        "use_beta_schedule": False,
        "sigma_schedule": None,
        "scheduler": "euler",
        "image_url": "y",
        "controller_guidance_forward": 0.6,
        "controller_guidance_reverse": 0.75,
        "reverse_guidance_start": 0,
        "reverse_guidance_end": 8,
        "reverse_guidance_schedule": "constant",
    }


NET = {"path": "net", "control_image_url": "edges"}
UNION = {"control_image_url": "edges", "control_mode": "canny"}
EASY = {"control_method_url": "canny", "image_url": "z", "image_control_type": "spatial"}


def test_the_objects_of_rf_inversion_have_the_defaults_of_its_page() -> None:
    value = rf.Input.model_validate(
        {
            "prompt": "x",
            "image_url": "y",
            "loras": [{"path": "a"}, {"path": "b", "scale": None}, {"path": "c", "scale": {"x": -4}}],
            "control_loras": [{"path": "a", "control_image_url": "z"}],
            "controlnets": [NET | {"mask_image_url": None}],
            "controlnet_unions": [{"path": "net", "controls": [UNION]}],
            "easycontrols": [EASY],
            "fill_image": {},
        }
    ).model_dump(mode="json")
    control = {
        "start_percentage": 0,
        "end_percentage": 1,
        "mask_image_url": None,
        "mask_threshold": 0.5,
        "conditioning_scale": 1,
    }
    files = {"config_url": None, "variant": None}
    assert [each["scale"] for each in value["loras"]] == [1, 1, {"x": -4}]
    assert value["control_loras"] == [
        {"path": "a", "scale": 1, "control_image_url": "z", "preprocess": "None"}
    ]
    assert value["controlnets"] == [NET | control | files]
    assert value["controlnet_unions"] == [{"path": "net", "controls": [UNION | control], **files}]
    assert value["easycontrols"] == [EASY | {"scale": 1}]
    assert value["fill_image"] == {"fill_image_url": []}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loras": [{"scale": 1}]}, [(["body", "loras", 0, "path"], "missing")]),
        ({"loras": [{"path": "a", "scale": 5}]}, [(["body", "loras", 0, "scale"], "less_than_equal")]),
        (
            {"loras": [{"path": "a", "scale": {"x": -5}}]},
            [(["body", "loras", 0, "scale", "x"], "greater_than_equal")],
        ),
        ({"loras": [{"path": "a", "scale": "much"}]}, [(["body", "loras", 0, "scale"], "float_parsing")]),
        (
            {"control_loras": [{"path": "a", "control_image_url": "z", "preprocess": None}]},
            [],
        ),
        (
            {"control_loras": [{"path": "a", "control_image_url": "z", "preprocess": "pose"}]},
            [(["body", "control_loras", 0, "preprocess"], "literal_error")],
        ),
        ({"controlnets": [{"path": "net"}]}, [(["body", "controlnets", 0, "control_image_url"], "missing")]),
        (
            {"controlnets": [NET | {"variant": "../fp16"}]},
            [(["body", "controlnets", 0, "variant"], "string_pattern_mismatch")],
        ),
        (
            {"controlnet_unions": [{"path": "net"}]},
            [(["body", "controlnet_unions", 0, "controls"], "missing")],
        ),
        (
            {"controlnet_unions": [{"path": "net", "controls": [UNION | {"control_mode": "seg"}]}]},
            [(["body", "controlnet_unions", 0, "controls", 0, "control_mode"], "literal_error")],
        ),
        (
            {"easycontrols": [EASY | {"image_control_type": "both"}]},
            [(["body", "easycontrols", 0, "image_control_type"], "literal_error")],
        ),
        (
            {"fill_image": {"fill_image_url": 7}},
            [(["body", "fill_image", "fill_image_url"], "string_type")],
        ),
        (
            {"fill_image": {"fill_image_url": ["a", 7]}},
            [(["body", "fill_image", "fill_image_url", 1], "string_type")],
        ),
        # spans of steps that end before they begin
        ({"reverse_guidance_start": 8}, [(["body", "reverse_guidance_start"], "less_than")]),
        (
            {"num_inference_steps": 4, "reverse_guidance_start": 4},
            [(["body", "reverse_guidance_start"], "less_than")],
        ),
        ({"reference_start": 1, "reference_end": 0.5}, []),  # without a reference they mean nothing
        (
            {"reference_image_url": "z", "reference_start": 0.5, "reference_end": 0.5},
            [(["body", "reference_start"], "less_than")],
        ),
        (
            {"controlnets": [NET, NET | {"start_percentage": 0.6, "end_percentage": 0.5}]},
            [(["body", "controlnets", 1, "start_percentage"], "less_than")],
        ),
        (
            {"controlnet_unions": [{"path": "net", "controls": [UNION | {"start_percentage": 1}]}]},
            [(["body", "controlnet_unions", 0, "controls", 0, "start_percentage"], "less_than")],
        ),
    ],
)
def test_rf_inversion_refuses_with_the_path_of_the_field(
    fields: dict[str, Any], expected: list[tuple[list[Any], str]]
) -> None:
    sent = {"prompt": "x", "image_url": "y", **fields}
    if expected:
        assert refusals(rf.Input, sent) == expected
    else:
        validate(rf.Input, sent, LIMITS)


def test_the_universal_endpoint_has_exactly_the_fields_of_its_page_with_their_defaults() -> None:
    defaults = universal.Input(model_name="m", prompt="x").model_dump(mode="json")
    assert list(defaults.items()) == [
        ("model_name", "m"),
        ("unet_name", None),
        ("variant", None),
        ("prompt", "x"),
        ("negative_prompt", ""),
        ("prompt_weighting", False),
        ("image_url", None),
        ("noise_strength", 0.5),
        ("loras", []),
        ("embeddings", []),
        ("controlnets", []),
        ("controlnet_guess_mode", False),
        ("ip_adapter", []),
        ("image_encoder_path", None),
        ("image_encoder_subfolder", None),
        ("image_encoder_weight_name", "pytorch_model.bin"),
        ("ic_light_model_url", None),
        ("ic_light_model_background_image_url", None),
        ("ic_light_image_url", None),
        ("seed", None),
        ("num_inference_steps", 30),
        ("guidance_scale", 7.5),
        ("clip_skip", 0),
        ("scheduler", None),
        ("timesteps", {"method": "default", "array": []}),
        ("sigmas", {"method": "default", "array": []}),
        ("image_format", "png"),
        ("num_images", 1),
        ("enable_safety_checker", False),
        ("tile_width", 4096),
        ("tile_height", 4096),
        ("tile_stride_width", 2048),
        ("tile_stride_height", 2048),
        ("eta", 0),
        ("debug_latents", False),
        ("debug_per_pass_latents", False),
    ]
    assert list(universal.Output.model_fields) == [
        "images",
        "seed",
        "has_nsfw_concepts",
        "debug_latents",
        "debug_per_pass_latents",
    ]


def test_the_numbers_of_the_universal_endpoint_have_the_ranges_of_its_page() -> None:
    ranges = {name: (least, most) for known, name, least, most in bounded() if known == UNIVERSAL}
    assert ranges.pop("seed", None) in (None, (-(2**63), 2**63 - 1))
    assert ranges == {
        "noise_strength": (0, 1),
        "num_inference_steps": (1, 150),
        "guidance_scale": (0, 20),
        "clip_skip": (0, 2),
        "num_images": (1, 8),
        "tile_width": (128, 4096),
        "tile_height": (128, 4096),
        "tile_stride_width": (64, 2048),
        "tile_stride_height": (64, 2048),
        "eta": (0, 1),
    }


def test_the_objects_of_the_universal_endpoint_have_the_defaults_of_its_page() -> None:
    value = universal.Input.model_validate(
        {
            "model_name": "m",
            "prompt": "x",
            "loras": [{"path": "a"}, {"path": "b", "scale": 4}],
            "embeddings": [{"path": "a"}],
            "controlnets": [{"path": "net", "image_url": "z", "mask_url": None}],
            "ip_adapter": [{"path": "ip", "ip_adapter_image_url": ["y", "z"]}],
        }
    ).model_dump(mode="json")
    assert value["loras"] == [{"path": "a", "scale": 1}, {"path": "b", "scale": 4}]
    assert value["embeddings"] == [{"path": "a", "tokens": ["<s0>", "<s1>"]}]
    assert value["controlnets"] == [
        {
            "path": "net",
            "config_url": None,
            "variant": None,
            "image_url": "z",
            "mask_url": None,
            "conditioning_scale": 1,
            "start_percentage": 0,
            "end_percentage": 1,
            "ip_adapter_index": None,
        }
    ]
    assert value["ip_adapter"] == [
        {
            "ip_adapter_image_url": ["y", "z"],
            "ip_adapter_mask_url": None,
            "path": "ip",
            "model_subfolder": None,
            "weight_name": None,
            "insight_face_model_path": None,
            "scale": 1,
            "scale_json": {},
            "unconditional_noising_factor": 0,
            "image_projection_shortcut": True,
        }
    ]


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
