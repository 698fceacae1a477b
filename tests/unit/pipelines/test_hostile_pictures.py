"""Row 15 of the threat model, in the pipelines: the oddest sizes make a picture or a clear 422."""

from typing import Any

import pytest
import torch
from PIL import Image

from pipelines.flux.flux_general_rf_inversion import Pipeline as FluxPipeline
from pipelines.flux.model import FluxModel
from schemas.errors import InputError
from tests.support.rf_inversion import URL, finished, prepare, request
from tests.support.universal import START, Studio

SIZES = [(1, 1), (1, 2), (7, 9), (1, 3000), (3000, 1)]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {"net": made.controlnet(), "ip": made.ip_adapter(), "encoder": made.encoder()}
    made.files |= {"light": made.offsets(8)}
    return made


def fields(role: str) -> dict[str, Any]:
    """A request to the universal endpoint where the picture "odd" has one of its roles."""
    adapter = {"path": "ip", "ip_adapter_image_url": START}
    roles: dict[str, dict[str, Any]] = {
        "image_url": {"image_url": "odd"},
        "controlnets": {"controlnets": [{"path": "net", "image_url": "odd"}]},
        "controlnet mask": {"controlnets": [{"path": "net", "image_url": START, "mask_url": "odd"}]},
        "ip_adapter": {
            "ip_adapter": [adapter | {"ip_adapter_image_url": "odd"}],
            "image_encoder_path": "encoder",
        },
        "ip_adapter mask": {
            "ip_adapter": [adapter | {"ip_adapter_mask_url": "odd"}],
            "image_encoder_path": "encoder",
        },
        "ic_light": {"ic_light_model_url": "light", "ic_light_image_url": "odd"},
    }
    return roles[role]


ROLES = ["image_url", "controlnets", "controlnet mask", "ip_adapter", "ip_adapter mask", "ic_light"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("size", SIZES)
def test_t15_any_size_makes_a_picture_or_is_refused_by_its_field(
    role: str, size: tuple[int, int], studio: Studio
) -> None:
    odd = Image.new("RGB", size, "white")
    try:
        latents = studio.run({"odd": odd}, num_inference_steps=1, **fields(role))
        assert torch.isfinite(latents).all()
    except InputError as error:
        assert all(fault.loc[1] in fields(role) for fault in error.fields)
    assert studio.model.adapters.pins == 0


@pytest.mark.parametrize("role", ["image_url", "reference_image_url"])
@pytest.mark.parametrize("size", SIZES)
def test_t15_any_size_may_be_edited(role: str, size: tuple[int, int], flux: FluxModel, denoise: Any) -> None:
    odd = Image.new("RGB", size, "white")
    start = odd if role == "image_url" else Image.new("RGB", (64, 64))
    wish = request(num_inference_steps=1, **({} if role == "image_url" else {role: "odd"}))
    try:
        latents = finished(denoise, prepare(FluxPipeline(flux), start, wish, {URL: start, "odd": odd}))
        assert torch.isfinite(latents).all()
    except InputError as error:
        assert [fault.loc for fault in error.fields] in ([("body", role)], [("body", "image_size")])
