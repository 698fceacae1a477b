"""What rf-inversion is given to look at: each guide by what it does, alone and in company."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as Picture
from torch import Tensor

from pipelines import preprocess
from pipelines.base import Generation
from pipelines.engine.sample import Sample
from pipelines.flux.flux_general_rf_inversion import Pipeline
from pipelines.flux.lora_keys import WIDE
from pipelines.flux.model import FluxModel
from schemas.errors import InputError
from tests.support import controlnets, easycontrols, lora_files
from tests.support.fields import shows
from tests.support.rf_inversion import RF, STEPS, finished, prepare, request

Run = Callable[..., Tensor]
Denoise = Callable[..., list[Sample]]
Files = dict[str, Any]


def noise_picture(seed: int, size: tuple[int, int] = (96, 64)) -> Picture:
    noise = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def halves(left: int, right: int) -> Picture:
    picture = Image.new("RGB", (96, 64), (left,) * 3)
    picture.paste((right,) * 3, (48, 0, 96, 64))
    return picture


def write_control_lora(flux: FluxModel, path: Path, seed: int) -> Path:
    rows, columns = flux.targets[WIDE]
    shapes = {name: shape for name, shape in flux.targets.items() if name.startswith("transformer.")}
    layers = lora_files.draw({**shapes, WIDE: (rows, 2 * columns)}, biased=True)
    generator = torch.Generator().manual_seed(seed)
    layers[WIDE].down.copy_(torch.randn(layers[WIDE].down.shape, generator=generator) / 4)
    return lora_files.write(path, lora_files.SPELLINGS["original"], layers)


@pytest.fixture(scope="module")
def files(flux: FluxModel, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Everything that the requests below name."""
    folder = tmp_path_factory.mktemp("guides")
    nets = {kind: controlnets.build(kind) for kind in ("InstantX", "union", "XLabs")}
    nets["other"] = controlnets.build("InstantX", seed=9)
    found: Files = {
        name: controlnets.write(folder / name, controlnets.in_diffusers_names(net))
        for name, net in nets.items()
    }
    found |= {
        name: easycontrols.write(folder / name, easycontrols.draw(seed))
        for seed, name in enumerate(("easy", "easier"))
    }
    found |= {name: write_control_lora(flux, folder / name, seed) for seed, name in enumerate(("cl", "cl2"))}
    found |= {f"picture {seed}": noise_picture(seed) for seed in range(1, 4)}
    found |= {"white": halves(255, 255), "black": halves(0, 0), "grey": halves(128, 128)}
    found |= {"left": halves(255, 0), "right": halves(0, 255)}
    return found


@pytest.fixture
def look(run: Run, files: Files) -> Run:
    """`run` with the files above at hand."""
    return lambda **fields: run(files, **fields)


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-3


def net(path: str = "InstantX", image: str = "picture 1", **fields: Any) -> dict[str, Any]:
    return {"controlnets": [{"path": path, "control_image_url": image, **fields}]}


def union(mode: str = "canny", image: str = "picture 1", **fields: Any) -> dict[str, Any]:
    control = {"control_mode": mode, "control_image_url": image, **fields}
    return {"controlnet_unions": [{"path": "union", "controls": [control]}]}


def easy(kind: str = "spatial", method: str = "easy", image: str = "picture 1", scale: float = 1) -> Any:
    return {
        "control_method_url": method,
        "image_url": image,
        "image_control_type": kind,
        "scale": scale,
    }


def control_lora(path: str = "cl", image: str = "picture 1", **fields: Any) -> dict[str, Any]:
    return {"path": path, "control_image_url": image, **fields}


BOTH = pytest.mark.parametrize("control", [net, union], ids=["controlnet", "union"])

# One of each guide, alone.
GUIDES: dict[str, dict[str, Any]] = {
    "controlnet": net(),
    "XLabs controlnet": net("XLabs"),
    "union": union(),
    "easycontrol": {"easycontrols": [easy()]},
    "fill_image": {"fill_image": {"fill_image_url": "picture 1"}},
    "reference": {"reference_image_url": "picture 1"},
}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_a_guide_acts_on_the_way_back_only(
    edit: Pipeline, start: Picture, denoise: Denoise, files: Files, guide: dict[str, Any]
) -> None:
    plain = finished(denoise, prepare(edit, start, request(), files))
    guided = prepare(edit, start, request(**guide), files)
    assert guided.samples[0].plan.steps == STEPS  # the inversion is that of the plain request
    differ(finished(denoise, guided), plain)


@shows(RF, "control_loras.path")
def test_a_control_lora_acts_on_both_ways(
    edit: Pipeline, start: Picture, denoise: Denoise, files: Files
) -> None:
    plain = finished(denoise, prepare(edit, start, request(), files))
    guided = prepare(edit, start, request(control_loras=[control_lora()]), files)
    assert guided.samples[0].plan.steps == 2 * STEPS
    rows = [guided.samples[0].plan.row(step) for step in range(2 * STEPS)]  # type: ignore[attr-defined]
    assert [row.embedding is not None for row in rows] == [False] * STEPS + [True] * STEPS
    assert all(row.adapters.loras for row in rows)
    differ(finished(denoise, guided), plain)


@shows(
    RF,
    *(f"controlnets.{name}" for name in ("conditioning_scale", "control_image_url", "path")),
    *(f"controlnet_unions.controls.{name}" for name in ("conditioning_scale", "control_image_url")),
    "controlnet_unions.path",
)
@BOTH
def test_a_controlnet_acts_by_its_scale_and_its_image(look: Run, control: Any) -> None:
    plain = look()
    assert torch.equal(look(**control(conditioning_scale=0)), plain)
    effects = [(look(**control(conditioning_scale=s)) - plain).norm() for s in (0.05, 0.2, 0.8)]
    assert effects == sorted(effects)
    differ(look(**control()), look(**control(image="picture 2")))


def test_another_controlnet_acts_otherwise(look: Run) -> None:
    differ(look(**net()), look(**net("other")))


def test_controlnets_are_summed_in_any_order(look: Run) -> None:
    one, other = net()["controlnets"][0], net("other", "picture 2", conditioning_scale=0.5)["controlnets"][0]
    both = look(controlnets=[one, other])
    close(both, look(controlnets=[other, one]))
    differ(both, look(controlnets=[one]))
    off = other | {"conditioning_scale": 0}
    assert torch.equal(look(controlnets=[one, off]), look(controlnets=[one]))


@shows(
    RF,
    *(f"controlnets.{name}" for name in ("mask_image_url", "mask_threshold")),
    *(f"controlnet_unions.controls.{name}" for name in ("mask_image_url", "mask_threshold")),
)
@BOTH
def test_a_controlnet_acts_where_its_mask_is_bright_enough(look: Run, control: Any) -> None:
    plain, whole = look(), look(**control())
    assert torch.equal(look(**control(mask_image_url="black")), plain)
    assert torch.equal(look(**control(mask_image_url="white")), whole)
    assert torch.equal(look(**control(mask_image_url="grey", mask_threshold=0.45)), whole)
    assert torch.equal(look(**control(mask_image_url="grey", mask_threshold=0.55)), plain)
    differ(look(**control(mask_image_url="left")), look(**control(mask_image_url="right")))


@shows(
    RF,
    *(f"controlnets.{name}" for name in ("start_percentage", "end_percentage")),
    *(f"controlnet_unions.controls.{name}" for name in ("start_percentage", "end_percentage")),
)
@BOTH
def test_a_controlnet_acts_in_the_steps_inside_its_window(
    edit: Pipeline, start: Picture, files: Files, look: Run, control: Any
) -> None:
    def steps(**window: float) -> list[int]:
        wish = request(**control(**window))
        with (generation := prepare(edit, start, wish, files)).resources:
            plan: Any = generation.samples[0].plan
            return [step - STEPS for step in range(2 * STEPS) if plan.row(step).controls]

    assert steps() == [0, 1, 2, 3]
    assert steps(start_percentage=0.5) == [2, 3]
    assert steps(end_percentage=0.5) == [0, 1]
    assert steps(start_percentage=0.25, end_percentage=0.75) == [1, 2]
    assert torch.equal(look(**control(start_percentage=0.3, end_percentage=0.4)), look())


@shows(RF, "controlnet_unions.controls.control_mode")
def test_the_modes_of_a_union_differ(look: Run) -> None:
    modes = ("canny", "tile", "depth", "blur", "pose", "gray", "low-quality")
    ends = [look(**union(mode)) for mode in modes]
    for index, one in enumerate(ends):
        for other in ends[index + 1 :]:
            assert (one - other).abs().max() > 1e-4


def test_several_controls_of_a_union_are_summed(look: Run) -> None:
    one, other = (union(mode, image) for mode, image in (("canny", "picture 1"), ("pose", "picture 2")))
    [both] = one["controlnet_unions"]
    both = both | {"controls": both["controls"] + other["controlnet_unions"][0]["controls"]}
    apart = look(controlnet_unions=one["controlnet_unions"] + other["controlnet_unions"])
    close(look(controlnet_unions=[both]), apart)
    differ(apart, look(**one))


@shows(RF, "controlnets.config_url", "controlnet_unions.config_url")
@pytest.mark.parametrize(
    ("field", "kind", "wrong"),
    [("controlnets", "InstantX", "guidance_embeds"), ("controlnet_unions", "union", "num_mode")],
)
def test_a_config_must_fit_the_weights(run: Run, files: Files, field: str, kind: str, wrong: str) -> None:
    config = controlnets.WIDTHS | controlnets.KINDS[kind]
    wish = net() if field == "controlnets" else union()
    named = {field: [wish[field][0] | {"config_url": "config"}]}
    right = json.dumps(config).encode()
    assert torch.equal(run(files | {"config": right}, **named), run(files, **wish))
    for text in (json.dumps(config | {wrong: 3}).encode(), b'{"num_layers": "many"}'):
        with pytest.raises(InputError) as raised:
            run(files | {"config": text}, **named)
        assert raised.value.fields[0].loc == ("body", field, 0, "config_url")


@shows(
    RF,
    *(f"easycontrols.{name}" for name in ("control_method_url", "image_url", "image_control_type", "scale")),
)
def test_easycontrol_acts_by_method_image_kind_and_scale(look: Run) -> None:
    plain, usual = look(), look(easycontrols=[easy()])
    assert torch.equal(look(easycontrols=[easy(scale=0)]), plain)
    for other in (
        easy("subject"),
        easy(method="easier"),
        easy(image="picture 2"),
        easy(scale=0.5),
    ):
        differ(look(easycontrols=[other]), usual)


def test_easycontrols_act_together_in_any_order(look: Run) -> None:
    one, other = easy(), easy("subject", "easier", "picture 2")
    both = look(easycontrols=[one, other])
    close(both, look(easycontrols=[other, one]))
    differ(both, look(easycontrols=[one]))


@shows(RF, "fill_image.fill_image_url")
def test_pictures_beside_the_prompt_act_by_what_they_show(look: Run) -> None:
    plain = look()
    one = look(fill_image={"fill_image_url": "picture 1"})
    assert torch.equal(look(fill_image={}), plain)
    assert torch.equal(look(fill_image={"fill_image_url": []}), plain)
    assert torch.equal(look(fill_image={"fill_image_url": ["picture 1"]}), one)
    close(look(fill_image={"fill_image_url": ["picture 1", "picture 1"]}), one)
    differ(look(fill_image={"fill_image_url": ["picture 1", "picture 2"]}), one)
    differ(look(fill_image={"fill_image_url": "picture 2"}), one)


@shows(RF, "reference_image_url", "reference_strength")
def test_a_reference_acts_by_its_strength_and_against_it_below_zero(look: Run) -> None:
    def like(strength: float, image: str = "picture 1") -> Tensor:
        return look(reference_image_url=image, reference_strength=strength)

    plain = look()
    assert torch.equal(like(0), plain)
    effects = [(like(strength) - plain).norm() for strength in (0.1, 0.5, 1.5, 3)]
    assert effects == sorted(effects)
    toward, away = like(0.05) - plain, like(-0.05) - plain
    assert torch.cosine_similarity(toward.flatten(), away.flatten(), dim=0) < -0.99
    differ(like(1), like(1, "picture 2"))


@shows(RF, "reference_start", "reference_end")
def test_a_reference_acts_in_the_steps_that_begin_inside_its_window(
    edit: Pipeline, start: Picture, files: Files, look: Run
) -> None:
    def steps(**window: float) -> list[int]:
        wish = request(reference_image_url="picture 1", **window)
        plan: Any = prepare(edit, start, wish, files).samples[0].plan
        return [step - STEPS for step in range(2 * STEPS) if plan.row(step).reference]

    assert steps() == [0, 1, 2, 3]
    assert steps(reference_start=0.5) == [2, 3]
    assert steps(reference_end=0.5) == [0, 1]
    late = {"reference_start": 0.8, "reference_end": 0.9}
    assert torch.equal(look(reference_image_url="picture 1", **late), look())


@shows(RF, "control_loras.scale", "control_loras.control_image_url")
def test_a_control_lora_acts_by_its_scale_and_its_image(look: Run) -> None:
    def controlled(**fields: Any) -> Tensor:
        return look(control_loras=[control_lora(**fields)])

    plain = look()
    assert torch.equal(controlled(scale=0), plain)
    effects = [(controlled(scale=scale) - plain).norm() for scale in (0.02, 0.1, 0.5)]
    assert effects == sorted(effects)
    differ(controlled(scale=0.5), controlled(scale=0.5, image="picture 2"))
    differ(controlled(scale=0.5), controlled(scale=-0.5))
    close(controlled(scale={"transformer": 0.5}), controlled(scale=0.5))
    blind = {"x_embedder": 0}  # the layer that reads the control image
    assert torch.equal(controlled(scale=blind), controlled(scale=blind, image="picture 2"))


@shows(RF, "control_loras.preprocess")
def test_the_control_image_may_be_made_of_edges_or_depth_first(
    run: Run, files: Files, flux: FluxModel
) -> None:
    source = files["picture 1"]
    made = {"edges": preprocess.canny(source), "depth map": flux.depth_of(source)}
    for how, image in (("canny", "edges"), ("depth", "depth map")):
        by_server = run(files, control_loras=[control_lora(preprocess=how)])
        assert torch.equal(by_server, run(files | made, control_loras=[control_lora(image=image)]))
        differ(by_server, run(files, control_loras=[control_lora()]))


def test_each_control_lora_reads_an_image_of_its_own(look: Run) -> None:
    one, other = control_lora(scale=0.5), control_lora("cl2", "picture 2", scale=0.3)
    both = look(control_loras=[one, other])
    close(both, look(control_loras=[other, one]))
    differ(both, look(control_loras=[one | {"control_image_url": "picture 2"}, other]))
    differ(both, look(control_loras=[one]))


EVERYTHING = {
    **net("XLabs", mask_image_url="left", end_percentage=0.8),
    **union("depth", "picture 3", conditioning_scale=0.4),
    "easycontrols": [easy(), easy("subject", "easier", "picture 2", 0.7)],
    "control_loras": [control_lora(scale=0.3)],
    "fill_image": {"fill_image_url": ["picture 1", "picture 3"]},
    "reference_image_url": "picture 2",
}


def test_every_guide_counts_among_all_of_them(
    look: Run, lora_files: dict[str, Path], run: Run, files: Files
) -> None:
    wish = EVERYTHING | {"loras": [{"path": "a", "scale": 0.4}], "scheduler": "dpmpp_2m"}
    everything = run(files | lora_files, **wish)
    assert everything.isfinite().all()
    for left_out in EVERYTHING.keys() | {"loras"}:
        less = run(files | lora_files, **{name: value for name, value in wish.items() if name != left_out})
        differ(everything, less)


def test_a_batch_of_rows_with_different_guides_equals_separate_runs(
    edit: Pipeline, start: Picture, denoise: Denoise, files: Files
) -> None:
    wishes = [
        request(),
        *(request(**{**guide, "seed": seed}) for seed, guide in enumerate(GUIDES.values())),
        request(control_loras=[control_lora(scale=0.4)], num_inference_steps=3),
        request(**EVERYTHING, num_inference_steps=5),
    ]

    def prepared() -> list[Generation]:
        edit.model.noises.clear()
        return [prepare(edit, start, wish, files) for wish in wishes]

    together = prepared()
    denoise([sample for generation in together for sample in generation.samples])
    for generation in together:
        generation.resources.close()
    for mixed, alone in zip(together, prepared(), strict=True):
        close(mixed.samples[0].latents[None], finished(denoise, alone), atol=2e-5)


WRONG: dict[str, tuple[dict[str, Any], tuple[str | int, ...]]] = {
    "a LoRA as a ControlNet": (net("a"), ("controlnets", 0, "path")),
    "a ControlNet as a LoRA": ({"loras": [{"path": "InstantX"}]}, ("loras", 0, "path")),
    "a control LoRA as a LoRA": ({"loras": [{"path": "a"}, {"path": "cl"}]}, ("loras", 1, "path")),
    "a LoRA as a control LoRA": ({"control_loras": [control_lora("a")]}, ("control_loras", 0, "path")),
    "a ControlNet of another width": (
        {"controlnets": [net()["controlnets"][0], net("wide")["controlnets"][0]]},
        ("controlnets", 1, "path"),
    ),
    "a union as a ControlNet": (net("union"), ("controlnets", 0, "path")),
    "a web page as a ControlNet": (net("page"), ("controlnets", 0, "path")),
    "a mask of another size": (net(mask_image_url="small"), ("controlnets", 0, "mask_image_url")),
    "a union's mask of another size": (
        union(mask_image_url="small"),
        ("controlnet_unions", 0, "controls", 0, "mask_image_url"),
    ),
    "a LoRA as an EasyControl": (
        {"easycontrols": [easy(method="a")]},
        ("easycontrols", 0, "control_method_url"),
    ),
    "a mode that the union lacks": (
        {"controlnet_unions": [{**union("low-quality")["controlnet_unions"][0], "path": "two modes"}]},
        ("controlnet_unions", 0, "controls", 0, "control_mode"),
    ),
    "a scale for a layer that is not there": (
        {"loras": [{"path": "a", "scale": {"layer 7": 1}}]},
        ("loras", 0, "scale"),
    ),
}


@pytest.mark.parametrize(("fields", "loc"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_with_the_path_of_its_field(
    edit: Pipeline,
    start: Picture,
    files: Files,
    lora_files: dict[str, Path],
    tmp_path: Path,
    fields: dict[str, Any],
    loc: tuple[str | int, ...],
) -> None:
    page = tmp_path / "page"
    page.write_text("<!doctype html><title>Sign in</title>")
    wide = controlnets.build("InstantX", num_attention_heads=4)
    two_modes = controlnets.build("union", num_mode=2)
    made: Files = {"page": page, "small": ImageOps.contain(files["white"], (48, 32))}
    for name, made_net in (("wide", wide), ("two modes", two_modes)):
        made[name] = controlnets.write(tmp_path / name, controlnets.in_diffusers_names(made_net))
    with pytest.raises(InputError) as raised:
        prepare(edit, start, request(**fields), files | lora_files | made)
    assert raised.value.fields[0].loc == ("body", *loc)
    assert edit.model.adapters.pins == edit.model._bank.pins == 0


def test_what_a_request_held_is_given_back(edit: Pipeline, start: Picture, files: Files) -> None:
    generation = prepare(edit, start, request(**EVERYTHING), files)
    assert edit.model.adapters.pins == 2
    assert edit.model._bank.pins == 1
    generation.resources.close()
    assert edit.model.adapters.pins == edit.model._bank.pins == 0
    edit.model.adapters.check_integrity()
