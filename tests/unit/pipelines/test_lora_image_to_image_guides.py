"""lora/image-to-image: ControlNets, IP-Adapters, faces and IC-Light, each alone, beside diffusers' own."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPImageProcessorPil

from pipelines.sd.base import plan_of
from pipelines.sd.grid import Grid, draw_noise
from pipelines.sd.ip_adapter import IpAdapterKind
from schemas.assets import AssetKind, assets
from schemas.endpoints.lora_image_to_image import Input
from tests.support import sd_ip_adapters
from tests.support.fields import shows
from tests.support.hub import serving
from tests.support.sd_ip_adapters import nested, vision
from tests.support.universal import KINDS, SIDE, START, UNIVERSAL, Studio, blocks, close, differ, grow, same
from tests.unit.deployments.places import Place, get, safetensors

EVERY = pytest.mark.parametrize("name", KINDS)
Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """With a net, an adapter and offsets of each kind."""
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {f"net-{name}": made.controlnet(name=name) for name in KINDS}
    made.files |= {f"ip-{name}": made.ip_adapter(name=name) for name in KINDS}
    made.files |= {f"instantid-{name}": made.ip_adapter("instantid", name=name) for name in KINDS}
    made.files |= {kind: made.ip_adapter(kind) for kind in ("plus", "full", "faceid", "faceid_plus")}
    made.files |= {"net": made.files["net-sd15"], "other net": made.controlnet(seed=4)}
    made.files |= {"ip": made.files["ip-sd15"], "other ip": made.ip_adapter(seed=4)}
    made.files |= {"encoder": made.encoder(), "deeper encoder": made.encoder(num_hidden_layers=4)}
    made.files |= {f"light-{channels}": made.offsets(channels) for channels in (8, 12)}
    made.files |= {f"dark-{channels}": made.offsets(channels, size=0) for channels in (8, 12)}
    made.look_for_faces()
    return made


def by_stock(pipe: Any, scheduler: Any, **words: Any) -> Tensor:
    """What diffusers' pipeline makes of the usual request in Euler's steps, [1, 4, rows, columns]."""
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    known = {"prompt": "a red square", "negative_prompt": "", "num_inference_steps": 3, "guidance_scale": 7.5}
    latents = draw_noise(Grid.of(SIDE, SIDE), 7)[None]
    sizes = {"height": SIDE, "width": SIDE, "output_type": "latent"}
    found: Tensor = pipe(**known | sizes | words, latents=latents).images
    return found


# -- ControlNets


@pytest.fixture
def controlled(studio: Studio) -> Run:
    """The latents under one ControlNet with these words, from START's noised latents."""

    def run(net: dict[str, Any] | None = None, **fields: Any) -> Tensor:
        wish = {"path": "net", "image_url": START, **(net or {})}
        return studio.run(controlnets=[wish], **{"image_url": START} | fields)

    return run


@shows(UNIVERSAL, "controlnets.path", "controlnets.image_url", "controlnets.conditioning_scale")
@shows(UNIVERSAL, "controlnets.start_percentage", "controlnets.end_percentage", "controlnet_guess_mode")
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("ours", "theirs", "more"),
    [
        ({}, {}, {}),
        ({"conditioning_scale": 0.6}, {"controlnet_conditioning_scale": 0.6}, {"guidance_scale": 3.0}),
        ({"start_percentage": 0.3}, {"control_guidance_start": 0.3}, {}),
        ({"end_percentage": 0.7}, {"control_guidance_end": 0.7}, {"guidance_scale": 1.0}),
        ({}, {"guess_mode": True}, {}),
        ({"conditioning_scale": 1.7}, {"controlnet_conditioning_scale": 1.7, "guess_mode": True}, {}),
        ({}, {"guess_mode": True}, {"guidance_scale": 1.0}),
    ],
)
def test_a_controlnet_acts_as_under_diffusers(
    studio: Studio, name: str, ours: dict[str, Any], theirs: dict[str, Any], more: dict[str, Any]
) -> None:
    pipes = {"sd15": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}
    stock = studio.stock[name]
    pipe = pipes[name](**stock.components, controlnet=studio.net(name=name))
    expected = by_stock(pipe, stock.scheduler, image=studio.files["square"], **theirs, **more)
    found = studio.run(
        model_name=name,
        scheduler="Euler",
        controlnets=[{"path": f"net-{name}", "image_url": "square", **ours}],
        controlnet_guess_mode=theirs.get("guess_mode", False),
        **more,
    )
    close(found, expected, atol=1e-3)
    differ(found, studio.run(model_name=name, scheduler="Euler", **more))


@shows(UNIVERSAL, "controlnets.conditioning_scale")
@EVERY
def test_scale_zero_is_no_controlnet(studio: Studio, controlled: Run, name: str) -> None:
    def scaled(scale: float, image: str = START) -> Tensor:
        net = {"path": f"net-{name}", "conditioning_scale": scale, "image_url": image}
        return controlled(net, model_name=name)

    plain = studio.run(model_name=name, image_url=START)
    same(scaled(0), scaled(0, "other"), plain)
    grow([scaled(scale) for scale in (0.02, 0.1, 0.5)], plain)


@shows(UNIVERSAL, "controlnets.path", "controlnets.image_url")
def test_controlnets_are_summed(studio: Studio, controlled: Run) -> None:
    differ(controlled(), controlled({"path": "other net"}))
    differ(controlled(), controlled({"image_url": "other"}))
    one, other = {"path": "net", "image_url": START}, {"path": "other net", "image_url": "other"}
    run = partial(studio.run, image_url=START)
    both = run(controlnets=[one, other])
    close(both, run(controlnets=[other, one]))
    same(run(controlnets=[one, other | {"conditioning_scale": 0}]), run(controlnets=[one]))
    close(
        run(controlnets=[one | {"conditioning_scale": 0.3}, one | {"conditioning_scale": 0.5}]),
        run(controlnets=[one | {"conditioning_scale": 0.8}]),
    )


@shows(UNIVERSAL, "controlnets.mask_url")
def test_a_mask_says_where_a_controlnet_acts(studio: Studio, controlled: Run) -> None:
    same(controlled({"mask_url": "black"}), studio.run(image_url=START))
    same(controlled({"mask_url": "white"}), controlled())
    once: dict[str, Any] = {"num_inference_steps": 1, "scheduler": "Euler"}
    studio.files["right"] = ImageOps.mirror(studio.files["left"])
    plain = studio.run(image_url=START, **once)
    left, right = (
        (controlled({"mask_url": mask}, **once) - plain)[0].norm(dim=0) for mask in ("left", "right")
    )
    assert left[:, :6].sum() / left.sum() > 0.5 > right[:, :6].sum() / right.sum()


@shows(UNIVERSAL, "controlnets.start_percentage", "controlnets.end_percentage")
@pytest.mark.parametrize(
    ("window", "steps"), [((0, 0.5), [0, 1]), ((0.5, 1), [2, 3]), ((0.25, 0.75), [1, 2]), ((0.3, 0.4), [])]
)
def test_a_controlnet_acts_in_its_steps_only(
    studio: Studio, window: tuple[float, float], steps: list[int]
) -> None:
    net = {"path": "net", "image_url": START, "start_percentage": window[0], "end_percentage": window[1]}
    fields: dict[str, Any] = {"image_url": START, "num_inference_steps": 4, "scheduler": "Euler"}
    [sample] = studio.prepare(controlnets=[net], **fields).samples
    plan, acting = plan_of(sample), []
    for step in range(plan.steps):
        prompted, negative = plan.rows(step, sample.latents)
        acting += [step] if prompted.controls and negative.controls else []
        sample.accept(plan.advance(step, sample.latents, torch.zeros_like(sample.latents), None))
    assert acting == steps
    picture = studio.run(controlnets=[net], **fields)
    if steps:
        differ(picture, studio.run(**fields))
    else:
        same(picture, studio.run(**fields))


@shows(UNIVERSAL, "controlnets.config_url")
def test_a_config_tells_what_the_tensors_do_not(studio: Studio, controlled: Run) -> None:
    config = dict(studio.net().config) | {"controlnet_conditioning_channel_order": "bgr"}
    red, green, blue = studio.files[START].split()
    studio.files["config"] = json.dumps(config).encode()
    studio.files["swapped"] = Image.merge("RGB", (blue, green, red))
    told = controlled({"config_url": "config", "image_url": "swapped"})
    same(told, controlled())
    differ(told, controlled({"image_url": "swapped"}))


@shows(UNIVERSAL, "controlnet_guess_mode")
def test_a_net_that_guesses_leaves_the_negative_row_alone(studio: Studio) -> None:
    net: dict[str, Any] = {"path": "net", "image_url": "square"}
    for guesses in (False, True):
        [sample] = studio.prepare(controlnets=[net], controlnet_guess_mode=guesses).samples
        prompted, negative = plan_of(sample).rows(0, sample.latents)
        assert [use.guess for use in prompted.controls] == [guesses]
        assert len(negative.controls) == (not guesses)


@shows(UNIVERSAL, "controlnets.ip_adapter_index")
@EVERY
def test_a_net_for_faces_reads_an_adapters_tokens(studio: Studio, name: str) -> None:
    """The adapters are off, so that the net alone sees the face."""

    def run(*people: str, index: int | None = 0, **fields: Any) -> Tensor:
        net = {"path": f"net-{name}", "image_url": "square", "ip_adapter_index": index}
        adapters = [
            {
                "path": f"instantid-{name}",
                "ip_adapter_image_url": START,
                "insight_face_model_path": person,
                "scale": 0,
            }
            for person in people
        ]
        return studio.run(model_name=name, controlnets=[net], ip_adapter=adapters, **fields)

    differ(run("ann"), run("bob"))
    same(run("ann", index=None), run("bob", index=None))
    differ(run("ann"), run("ann", index=None))
    same(run("bob", "ann", index=1), run("ann"))


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
    masks = [
        {"path": "ip", "ip_adapter_image_url": START, "ip_adapter_mask_url": each} for each in ("black",)
    ]
    beside = {"path": "other ip", "ip_adapter_image_url": "other"}
    run = partial(studio.run, image_url=START, image_encoder_path="encoder")
    close(run(ip_adapter=[*masks, beside]), run(ip_adapter=[beside]))


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
@pytest.mark.parametrize("kind", ["faceid", "faceid_plus", "instantid-sd15"])
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
    files = {"a": studio.lora()}
    lit = studio.run(files, ic_light_model_url="dark-8", ic_light_image_url="other", **more)
    same(lit, studio.run(files, **more))
    differ(lit, studio.run(image_url=START))


# -- which files


async def which(tmp_path: Path, **fields: Any) -> list[bytes]:
    """The weights that a request leads to in the repositories of a hub."""
    net = "diffusion_pytorch_model"
    stored = {f"models/{name}.safetensors": safetensors(fill=name.encode(), size=1) for name in "ab"}
    stored |= {"sdxl/a.safetensors": safetensors(1, b"c"), "config.json": b"{}"}
    stored |= {f"{net}.safetensors": safetensors(1, b"d"), f"{net}.fp16.safetensors": safetensors(1, b"e")}
    stored |= {f"enc/{name}.safetensors": safetensors(1, name[:1].encode()) for name in ("model", "small")}
    stored |= {"enc/config.json": b"{}", "other/model.safetensors": safetensors(1, b"o")}
    async with serving() as hub:
        hub.put_files("ann/all", stored)
        weights = Place(tmp_path, hub.url).open()
        request = Input.model_validate({"model_name": "ann/none", "prompt": "x"} | fields)
        found = []
        for asset in assets(request):
            if asset.asset.kind.is_weights and asset.asset.kind is not AssetKind.BASE:
                with await get(weights, asset.asset) as path:
                    inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
                    found += [each.read_bytes()[-1:] for each in inside]
    return found


@shows(UNIVERSAL, "ip_adapter.model_subfolder", "ip_adapter.weight_name")
@pytest.mark.parametrize(
    ("words", "file"),
    [
        ({"model_subfolder": "models", "weight_name": "a.safetensors"}, b"a"),
        ({"model_subfolder": "models", "weight_name": "b.safetensors"}, b"b"),
        ({"model_subfolder": "models", "weight_name": "b.bin"}, b"b"),  # the safetensors beside a pickle
        ({"model_subfolder": "sdxl"}, b"c"),
    ],
)
async def test_words_say_which_of_a_repositorys_adapters_is_meant(
    tmp_path: Path, words: dict[str, str], file: bytes
) -> None:
    adapter = {"path": "ann/all", "ip_adapter_image_url": START, **words}
    assert await which(tmp_path, ip_adapter=[adapter]) == [file]


@shows(UNIVERSAL, "image_encoder_subfolder", "image_encoder_weight_name")
@pytest.mark.parametrize(
    ("words", "file"),
    [
        ({"image_encoder_subfolder": "enc"}, b"m"),
        ({"image_encoder_subfolder": "enc", "image_encoder_weight_name": "small.safetensors"}, b"s"),
        ({"image_encoder_subfolder": "other"}, b"o"),
    ],
)
async def test_words_say_which_of_a_repositorys_encoders_is_meant(
    tmp_path: Path, words: dict[str, str], file: bytes
) -> None:
    assert await which(tmp_path, image_encoder_path="ann/all", **words) == [file]


@shows(UNIVERSAL, "controlnets.variant")
@pytest.mark.parametrize(("words", "file"), [({}, b"d"), ({"variant": "fp16"}, b"e")])
async def test_a_variant_is_of_a_controlnets_files(
    tmp_path: Path, words: dict[str, str], file: bytes
) -> None:
    net = {"path": "ann/all", "image_url": START, **words}
    assert await which(tmp_path, controlnets=[net]) == [file]
