"""lora/image-to-image: IP-Adapters, faces and IC-Light, each alone, beside diffusers' own."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import ImageOps
from torch import Tensor
from transformers import CLIPImageProcessorPil

from pipelines.sd.base import plan_of
from pipelines.sd.ip_adapter import IpAdapterKind
from tests.support import sd_ip_adapters
from tests.support.fields import shows
from tests.support.sd_ip_adapters import nested, vision
from tests.support.universal import (
    KINDS,
    SIDE,
    START,
    UNIVERSAL,
    Studio,
    blocks,
    by_stock,
    close,
    differ,
    grow,
    same,
)

EVERY = pytest.mark.parametrize("name", KINDS)
Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """With adapters and offsets of each kind."""
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {f"ip-{name}": made.ip_adapter(name=name) for name in KINDS}
    made.files |= {kind: made.ip_adapter(kind) for kind in ("plus", "faceid", "faceid_plus", "instantid")}
    made.files |= {"ip": made.files["ip-sd15"], "other ip": made.ip_adapter(seed=4)}
    made.files |= {"encoder": made.encoder(), "deeper encoder": made.encoder(num_hidden_layers=4)}
    made.files |= {f"light-{channels}": made.offsets(channels) for channels in (8, 12)}
    made.files |= {f"dark-{channels}": made.offsets(channels, size=0) for channels in (8, 12)}
    made.look_for_faces()
    return made


# -- IP-Adapters


@pytest.fixture
def shown(studio: Studio) -> Run:
    """The latents under one IP-Adapter with these words, from START's noised latents."""

    def run(adapter: dict[str, Any] | None = None, **fields: Any) -> Tensor:
        wish = {"path": "ip", "ip_adapter_image_url": START, **(adapter or {})}
        known = {"image_url": START, "image_encoder_path": "encoder"}
        return studio.run(ip_adapter=[wish], **known | fields)

    return run


def stock_with_adapters(studio: Studio, name: str, *adapters: sd_ip_adapters.Tensors) -> Any:
    """diffusers' pipeline with these IP-Adapters and the image encoder."""
    pipe, side = deepcopy(studio.stock[name]), 32
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pipe.register_modules(image_encoder=vision(), feature_extractor=CLIPImageProcessorPil(**sizes))
    empty = [""] * len(adapters)
    pipe.load_ip_adapter(
        [nested(each) for each in adapters], subfolder=empty, weight_name=empty, image_encoder_folder=None
    )
    return pipe


@shows(UNIVERSAL, "ip_adapter.path", "ip_adapter.ip_adapter_image_url", "ip_adapter.scale")
@shows(UNIVERSAL, "image_encoder_path")
@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@EVERY
def test_ip_adapters_act_as_under_diffusers(studio: Studio, name: str, kind: IpAdapterKind) -> None:
    unet = studio.stock[name].unet
    files = {"one": studio.ip_adapter(kind, 5, name), "two": studio.ip_adapter("plain", 6, name)}
    tensors = sd_ip_adapters.adapter(kind, unet, 5), sd_ip_adapters.adapter("plain", unet, 6)
    pipe = stock_with_adapters(studio, name, *tensors)
    pipe.set_ip_adapter_scale([0.8, 0.5])
    pictures = [blocks(seed, (40, 40)) for seed in range(3)]
    expected = by_stock(
        pipe, studio.stock[name].scheduler, ip_adapter_image=[pictures[:2], pictures[2]], guidance_scale=3.0
    )
    files |= {f"picture {index}": picture for index, picture in enumerate(pictures)}  # type: ignore[misc]
    fields: dict[str, Any] = {"model_name": name, "scheduler": "Euler", "guidance_scale": 3}
    both = ["picture 0", "picture 1"]
    found = studio.run(
        files,
        ip_adapter=[
            {"path": "one", "ip_adapter_image_url": both, "scale": 0.8},
            {"path": "two", "ip_adapter_image_url": "picture 2", "scale": 0.5},
        ],
        image_encoder_path="encoder",
        **fields,
    )
    close(found, expected, atol=1e-3)
    differ(found, studio.run(**fields))


@shows(UNIVERSAL, "ip_adapter.ip_adapter_mask_url")
def test_a_mask_acts_as_under_diffusers(studio: Studio) -> None:
    pipe = stock_with_adapters(studio, "sd15", sd_ip_adapters.adapter("plain", studio.stock["sd15"].unet, 1))
    half = ImageOps.pad(studio.files["left"].crop((0, 0, 64, 64)), (SIDE, SIDE))
    picture = blocks(5, half.size)
    masks = IPAdapterMaskProcessor().preprocess([half], height=SIDE, width=SIDE)
    expected = by_stock(
        pipe,
        studio.stock["sd15"].scheduler,
        ip_adapter_image=picture,
        cross_attention_kwargs={"ip_adapter_masks": masks},
    )
    files = {"half": half, "picture": picture}
    adapter = {"path": "ip", "ip_adapter_image_url": "picture", "ip_adapter_mask_url": "half"}
    found = studio.run(files, ip_adapter=[adapter], image_encoder_path="encoder", scheduler="Euler")
    # diffusers' mask has pixels, ours cells: the same but for the rounding at the edge
    unmasked = studio.run(
        files,
        ip_adapter=[adapter | {"ip_adapter_mask_url": None}],
        image_encoder_path="encoder",
        scheduler="Euler",
    )
    assert (found - expected).norm() < 0.2 * (found - unmasked).norm()


@shows(UNIVERSAL, "ip_adapter.ip_adapter_mask_url")
def test_a_black_mask_is_no_adapter_and_a_white_one_no_mask(studio: Studio, shown: Run) -> None:
    close(shown({"ip_adapter_mask_url": "black"}), studio.run(image_url=START))
    close(shown({"ip_adapter_mask_url": "white"}), shown())
    differ(shown({"ip_adapter_mask_url": "left"}), shown())
    masked = {"path": "ip", "ip_adapter_image_url": START, "ip_adapter_mask_url": "black"}
    beside = {"path": "other ip", "ip_adapter_image_url": "other"}
    run = partial(studio.run, image_url=START, image_encoder_path="encoder")
    close(run(ip_adapter=[masked, beside]), run(ip_adapter=[beside]))


@shows(UNIVERSAL, "ip_adapter.scale")
@EVERY
def test_scale_zero_is_no_ip_adapter(studio: Studio, shown: Run, name: str) -> None:
    run = partial(shown, model_name=name)
    plain = studio.run(model_name=name, image_url=START)
    same(run({"path": f"ip-{name}", "scale": 0}), plain)
    grow([run({"path": f"ip-{name}", "scale": scale}) for scale in (0.05, 0.2, 0.8)], plain)


@shows(UNIVERSAL, "ip_adapter.scale_json")
def test_scales_by_block_go_before_the_scale(shown: Run) -> None:
    def run(scales: dict[str, Any], scale: float = 1) -> Tensor:
        return shown({"scale_json": scales, "scale": scale})

    everywhere = {"down": 0.4, "mid": 0.4, "up": 0.4}
    same(run(everywhere), run(everywhere, scale=0), shown({"scale": 0.4}))
    same(run({"down": {"block_0": [0.4]}, "mid": 0.4, "up": {"block_1": 0.4}}), run(everywhere))
    same(run({"mid": 0}), shown({"scale": 0}))
    same(run({}, scale=0.4), shown({"scale": 0.4}))
    parts = [run({part: 0.4}) for part in ("down", "mid", "up")]
    for one in range(3):
        differ(parts[one], parts[one - 1])


@shows(UNIVERSAL, "ip_adapter.path", "ip_adapter.ip_adapter_image_url", "image_encoder_path")
def test_an_adapter_sees_its_pictures_through_its_encoder(shown: Run) -> None:
    plain = shown()
    differ(plain, shown({"path": "other ip"}))
    differ(plain, shown({"ip_adapter_image_url": "other"}))
    differ(plain, shown(image_encoder_path="deeper encoder"))
    same(plain, shown({"ip_adapter_image_url": [START]}))
    differ(plain, shown({"ip_adapter_image_url": [START, "other"]}))
    close(
        shown({"ip_adapter_image_url": [START, "other"]}), shown({"ip_adapter_image_url": ["other", START]})
    )
    close(plain, shown({"ip_adapter_image_url": [START, START]}))


@shows(UNIVERSAL, "ip_adapter.unconditional_noising_factor")
def test_the_negative_row_may_be_shown_noise(shown: Run) -> None:
    """What it is shown matters where there is such a row, more with more noise, and by the seed."""

    def run(factor: float, **fields: Any) -> Tensor:
        return shown({"path": "plus", "unconditional_noising_factor": factor}, **fields)

    grow([run(factor) for factor in (0.01, 0.1, 1)], run(0))
    same(run(0, guidance_scale=1), run(1, guidance_scale=1))
    same(run(1), run(1))


@shows(UNIVERSAL, "ip_adapter.unconditional_noising_factor", "num_images")
def test_image_i_is_shown_the_noise_of_its_own_seed(shown: Run) -> None:
    noisy = {"path": "plus", "unconditional_noising_factor": 0.8}
    together = shown(noisy, num_images=3, noise_strength=1)
    close(together, torch.cat([shown(noisy, seed=7 + i, noise_strength=1) for i in range(3)]))


# -- faces


@pytest.fixture
def like(shown: Run) -> Run:
    """The latents with someone's face."""

    def run(person: str = "ann", kind: str = "faceid", **fields: Any) -> Tensor:
        words = {name: fields.pop(name) for name in ("scale", "image_projection_shortcut") if name in fields}
        return shown({"path": kind, "insight_face_model_path": person, **words}, **fields)

    return run


@shows(UNIVERSAL, "ip_adapter.insight_face_model_path")
@pytest.mark.parametrize("kind", ["faceid", "faceid_plus", "instantid"])
def test_a_face_is_found_by_the_analysis_that_is_named(studio: Studio, like: Run, kind: str) -> None:
    differ(like("ann", kind), like("bob", kind))
    same(like("ann", kind, scale=0), like("bob", kind, scale=0), studio.run(image_url=START))


@shows(UNIVERSAL, "ip_adapter.insight_face_model_path")
@pytest.mark.parametrize(("kind", "reads"), [("faceid", False), ("faceid_plus", True)])
def test_only_faceid_plus_looks_at_the_picture_as_well(like: Run, kind: str, reads: bool) -> None:
    if reads:
        differ(like(kind=kind), like(kind=kind, image_encoder_path="deeper encoder"))
    else:
        same(like(kind=kind), like(kind=kind, image_encoder_path=None))


@shows(UNIVERSAL, "ip_adapter.image_projection_shortcut")
def test_the_shortcut_tells_the_versions_of_faceid_plus_apart(like: Run) -> None:
    differ(like(kind="faceid_plus"), like(kind="faceid_plus", image_projection_shortcut=False))
    same(like(kind="faceid_plus"), like(kind="faceid_plus", image_projection_shortcut=True))
    same(like(kind="faceid"), like(kind="faceid", image_projection_shortcut=False))


def test_faceids_own_lora_stands_beside_those_of_the_request(studio: Studio, like: Run) -> None:
    files = {"a": studio.lora()}
    studio.files |= files
    styled = like(loras=[{"path": "a", "scale": 0.5}])
    differ(styled, like())
    same(
        like(scale=0, loras=[{"path": "a", "scale": 0.5}]),
        studio.run(image_url=START, loras=[{"path": "a", "scale": 0.5}]),
    )
    bare = sd_ip_adapters.adapter("faceid", studio.stock["sd15"].unet, lora=False)
    studio.files["bare"] = sd_ip_adapters.write(studio.root / "bare.safetensors", bare)
    differ(like(kind="bare"), like())
    assert studio.model.base._bank.pins == 0


# -- IC-Light


@shows(UNIVERSAL, "ic_light_model_url", "ic_light_image_url", "ic_light_model_background_image_url")
@pytest.mark.parametrize("channels", [8, 12])
def test_light_falls_from_the_offsets_by_the_pictures(studio: Studio, channels: int) -> None:
    def run(kind: str = "light", front: str = START, back: str = "other", **fields: Any) -> Tensor:
        words = {"ic_light_model_url": f"{kind}-{channels}", "ic_light_image_url": front}
        if channels == 12:
            words["ic_light_model_background_image_url"] = back
        return studio.run(image_url=START, **words, **fields)

    plain = studio.run(image_url=START)
    same(run("dark"), run("dark", front="other", back="square"), plain)
    differ(run(), plain)
    differ(run(), run(front="square"))
    if channels == 12:
        differ(run(), run(back="square"))
    same(run(), run())
    same(studio.run(image_url=START), plain)  # the base is as it was


@shows(UNIVERSAL, "ic_light_image_url", "ic_light_model_background_image_url")
@pytest.mark.parametrize("channels", [8, 12])
def test_the_unet_reads_the_foreground_before_the_background(studio: Studio, channels: int) -> None:
    words = {"ic_light_model_url": f"light-{channels}", "ic_light_image_url": "other"}
    if channels == 12:
        words["ic_light_model_background_image_url"] = "square"
    generation = studio.prepare(image_url=START, **words)
    [sample] = generation.samples
    plan = plan_of(sample)
    pictures = [studio.files["other"], studio.files["square"]][: channels // 4 - 1]
    expected = [plan.base.encode_image(picture, plan.grid) for picture in pictures]
    for row in plan.rows(0, sample.latents):
        same(row.latents[4:], torch.cat(expected))
    generation.resources.close()


@shows(UNIVERSAL, "ic_light_model_url")
def test_what_is_lit_may_have_all_else_beside_it(studio: Studio) -> None:
    """Zero offsets change nothing, so each of these acts on the new UNet as on the old."""
    net: dict[str, Any] = {"path": "net", "image_url": START}
    more: dict[str, Any] = {
        "image_url": START,
        "controlnets": [net],
        "ip_adapter": [{"path": "ip", "ip_adapter_image_url": "other"}],
        "image_encoder_path": "encoder",
        "loras": [{"path": "a", "scale": 0.4}],
        "tile_width": 128,
        "prompt_weighting": True,
    }
    files = {"a": studio.lora(), "net": studio.controlnet()}
    lit = studio.run(files, ic_light_model_url="dark-8", ic_light_image_url="other", **more)
    same(lit, studio.run(files, **more))
    differ(lit, studio.run(image_url=START))


def test_light_upon_light_leaves_nothing_on_the_text_encoders(studio: Studio) -> None:
    def hooks() -> int:
        return sum(len(each._forward_hooks) for each in encoder.modules())

    words = {"ic_light_model_url": "light-8", "ic_light_image_url": "other", "image_url": START}
    generation = studio.prepare({"a": studio.lora()}, loras=[{"path": "a"}], **words)
    with generation.resources:
        base = plan_of(generation.samples[0]).base
        assert base is not studio.model.base
        encoder = base._parts.text_encoders[0]
        before = hooks()
        offsets = studio.model.base.read_ic_light(studio.files["light-8"])
        with studio.model.base.lit_anew("another", offsets).holding({}):
            assert hooks() == before
