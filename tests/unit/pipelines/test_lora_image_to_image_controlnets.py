"""lora/image-to-image: ControlNets beside diffusers' own, their masks, windows and configs."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.sd.base import plan_of
from tests.support.fields import shows
from tests.support.universal import (
    KINDS,
    START,
    UNIVERSAL,
    Studio,
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
    """With a net for each model."""
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {f"net-{name}": made.controlnet(name=name) for name in KINDS}
    made.files |= {f"instantid-{name}": made.ip_adapter("instantid", name=name) for name in KINDS}
    made.files |= {"net": made.files["net-sd15"], "other net": made.controlnet(seed=4)}
    made.look_for_faces()
    return made


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


@shows(UNIVERSAL, "controlnets.config_url")
@pytest.mark.parametrize("guesses", [False, True])
def test_a_net_that_pools_acts_on_the_prompts_row_as_under_diffusers(studio: Studio, guesses: bool) -> None:
    """As that for shuffled pictures does, which its config tells."""
    stock, net = studio.stock["sd15"], studio.net()
    net.register_to_config(global_pool_conditions=True)
    pipe = StableDiffusionControlNetPipeline(**stock.components, controlnet=net)
    expected = by_stock(pipe, stock.scheduler, image=studio.files["square"], guess_mode=guesses)
    studio.files["pooling"] = json.dumps(dict(net.config)).encode()
    found = studio.run(
        scheduler="Euler",
        controlnets=[{"path": "net", "image_url": "square", "config_url": "pooling"}],
        controlnet_guess_mode=guesses,
    )
    close(found, expected, atol=1e-3)


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
