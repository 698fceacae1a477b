"""The files that a request names, found by the marks of their fields."""

from pydantic import BaseModel

from schemas.assets import Asset, AssetKind, AssetRef, assets, takes_weights, weights
from schemas.endpoints.flux_general_rf_inversion import Input
from schemas.fields import ControlNetPath, EasyControlPath, ImageUrl, LoraPath, LoraWeight


def test_every_field_that_names_a_file_is_found_and_no_other() -> None:
    request = Input.model_validate(
        {
            "prompt": "x",
            "image_url": "start",
            "reference_image_url": "like",
            "loras": [{"path": "a"}, {"path": "b", "scale": {"layer": 1}}],
            "control_loras": [{"path": "c", "control_image_url": "edges", "preprocess": "canny"}],
            "controlnets": [
                {
                    "path": "net",
                    "variant": "fp16",
                    "config_url": "config",
                    "control_image_url": "pose",
                    "mask_image_url": "mask",
                }
            ],
            "controlnet_unions": [
                {"path": "net", "controls": [{"control_image_url": "tile", "control_mode": "tile"}]}
            ],
            "easycontrols": [
                {"control_method_url": "canny", "image_url": "lines", "image_control_type": "spatial"}
            ],
            "fill_image": {"fill_image_url": ["one", "two"]},
        }
    )
    assert {ref.loc[1:]: ref.asset for ref in assets(request)} == {
        ("image_url",): Asset(AssetKind.IMAGE, "start"),
        ("reference_image_url",): Asset(AssetKind.IMAGE, "like"),
        ("loras", 0, "path"): Asset(AssetKind.LORA, "a"),
        ("loras", 1, "path"): Asset(AssetKind.LORA, "b"),
        ("control_loras", 0, "path"): Asset(AssetKind.LORA, "c"),
        ("control_loras", 0, "control_image_url"): Asset(AssetKind.IMAGE, "edges"),
        ("controlnets", 0, "path"): Asset(AssetKind.CONTROLNET, "net", "fp16"),
        ("controlnets", 0, "config_url"): Asset(AssetKind.CONFIG, "config"),
        ("controlnets", 0, "control_image_url"): Asset(AssetKind.IMAGE, "pose"),
        ("controlnets", 0, "mask_image_url"): Asset(AssetKind.IMAGE, "mask"),
        ("controlnet_unions", 0, "path"): Asset(AssetKind.CONTROLNET, "net"),
        ("controlnet_unions", 0, "controls", 0, "control_image_url"): Asset(AssetKind.IMAGE, "tile"),
        ("easycontrols", 0, "control_method_url"): Asset(AssetKind.EASYCONTROL, "canny"),
        ("easycontrols", 0, "image_url"): Asset(AssetKind.IMAGE, "lines"),
        ("fill_image", "fill_image_url", 0): Asset(AssetKind.IMAGE, "one"),
        ("fill_image", "fill_image_url", 1): Asset(AssetKind.IMAGE, "two"),
    }


def test_one_picture_needs_no_list() -> None:
    request = Input.model_validate(
        {"prompt": "x", "image_url": "start", "fill_image": {"fill_image_url": "one"}}
    )
    assert list(assets(request)) == [
        AssetRef(("body", "fill_image", "fill_image_url"), Asset(AssetKind.IMAGE, "one")),
        AssetRef(("body", "image_url"), Asset(AssetKind.IMAGE, "start")),
    ]


class Style(BaseModel):
    path: LoraPath | None = None


class Plain(BaseModel):
    image_url: ImageUrl
    prompt: str = ""


class Direct(BaseModel):
    path: ControlNetPath


class Deep(BaseModel):
    plain: Plain | None = None
    styles: list[Style] | None = None


def test_weights_are_named_once_and_pictures_are_none() -> None:
    control = {"path": "net", "config_url": "config", "control_image_url": "pose"}
    named = {
        "prompt": "x",
        "image_url": "start",
        "loras": [{"path": "a"}, {"path": "b"}, {"path": "a"}],
        "controlnets": [control, control | {"variant": "fp16"}],
        "easycontrols": [
            {"control_method_url": "canny", "image_url": "lines", "image_control_type": "spatial"}
        ],
    }
    assert weights(Input.model_validate(named)) == [
        Asset(AssetKind.LORA, "a"),
        Asset(AssetKind.LORA, "b"),
        Asset(AssetKind.CONTROLNET, "net"),
        Asset(AssetKind.CONTROLNET, "net", "fp16"),
        Asset(AssetKind.EASYCONTROL, "canny"),
    ]
    assert weights(Plain(image_url="start")) == []


def test_a_type_tells_whether_it_has_a_field_for_weights() -> None:
    class Method(BaseModel):
        url: EasyControlPath

    assert [takes_weights(kind) for kind in (Style, Direct, Deep, Method, LoraWeight, Input)] == [True] * 6
    assert not takes_weights(Plain)
