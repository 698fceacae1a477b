"""lora/image-to-image: schedulers beside diffusers' pipelines, arrays, tiles, and what is kept of the way."""

from functools import partial
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from pipelines.base import Generation, Outcome
from pipelines.engine.sample import Sample
from pipelines.sd.base import plan_of
from pipelines.sd.grid import Grid, draw_noise
from pipelines.sd.schedule import step_seed
from pipelines.sd.tiles import Tile
from schemas.endpoints.lora_image_to_image import Scheduler
from schemas.errors import InputError
from schemas.fields import File
from schemas.settings import Limits
from tests.support.fields import shows
from tests.support.universal import KINDS, SIDE, START, UNIVERSAL, Studio, blocks, close, differ, same

EVERY = pytest.mark.parametrize("name", KINDS)

# The API's names, and what a user of diffusers writes for them. LCMScheduler has no trailing timesteps.
STOCK: dict[str | None, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler A": ("EulerAncestralDiscreteScheduler", {}),
    "Euler (trailing timesteps)": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "LCM": ("LCMScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
# Without noise at the steps: diffusers draws the first noise and that of the steps from one generator.
STEADY = ["DPM++ 2M", "DPM++ 2M Karras", "Euler", "Euler (trailing timesteps)", "DDIM", "TCD"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A server that makes larger pictures, and a start picture of two tiles and of six."""
    studio = Studio(tmp_path_factory.mktemp("wide"), limits=Limits(max_pixels=320 * 256))
    studio.files |= {"wide": blocks(1, (256, 128)), "large": blocks(1, (320, 256))}
    return studio


def timesteps(*array: int) -> dict[str, Any]:
    return {"timesteps": {"method": "array", "array": list(array)}}


def sigmas(*array: float) -> dict[str, Any]:
    return {"sigmas": {"method": "array", "array": list(array)}}


def stock(studio: Studio, name: str, scheduler: str | None, kind: Any = None) -> Any:
    """diffusers' pipeline with a scheduler of the API, or the checkpoint's own."""
    pipe = studio.stock[name]
    pipe = (kind or type(pipe))(**pipe.components)
    if scheduler is not None:
        own, options = STOCK[scheduler]
        pipe.scheduler = getattr(diffusers, own).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


WORDS: dict[str, Any] = {"prompt": "a red square", "negative_prompt": "grey", "guidance_scale": 5.0}


@shows(UNIVERSAL, "scheduler", "num_inference_steps", "eta")
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("scheduler", [None, *STOCK])
@EVERY
def test_each_scheduler_makes_the_picture_that_diffusers_makes(
    studio: Studio, name: str, scheduler: str | None, steps: int
) -> None:
    eta = 0.6 if scheduler in ("DDIM", "TCD") else 0.0
    fields = {**WORDS, "num_inference_steps": steps, "eta": eta}
    expected = stock(studio, name, scheduler)(
        **fields,
        latents=draw_noise(Grid.of(SIDE, SIDE), 7)[None],
        generator=torch.Generator().manual_seed(step_seed(7)),
        height=SIDE,
        width=SIDE,
        output_type="latent",
    ).images
    close(studio.run(model_name=name, scheduler=scheduler, **fields), expected, atol=1e-3)


@shows(UNIVERSAL, "noise_strength", "num_inference_steps")
@pytest.mark.parametrize(("strength", "total"), [(0.5, 6), (0.75, 4), (0.3, 10)])
@pytest.mark.parametrize("scheduler", STEADY)
@EVERY
def test_a_start_picture_is_remade_as_under_diffusers_by_as_many_steps_as_are_asked_for(
    studio: Studio,
    name: str,
    scheduler: str,
    strength: float,
    total: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # diffusers draws from the posterior; we take its mode
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    kind = StableDiffusionXLImg2ImgPipeline if name == "sdxl" else StableDiffusionImg2ImgPipeline
    expected = stock(studio, name, scheduler, kind)(
        **WORDS,
        image=studio.files[START],
        num_inference_steps=total,
        strength=3 / total,  # three of them
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    found = studio.run(
        model_name=name, scheduler=scheduler, image_url=START, noise_strength=strength, **WORDS
    )
    close(found, expected, atol=1e-3)


@shows(UNIVERSAL, "scheduler")
@EVERY
def test_no_two_schedulers_make_the_same_picture(studio: Studio, name: str) -> None:
    """All names are told apart; without one, it is the model's own."""
    names = get_args(Scheduler)
    run = partial(studio.run, model_name=name, num_inference_steps=7, eta=0.5)
    found = {each: run(scheduler=each) for each in names}
    assert len(found) == 11
    alike = {
        (one, other)
        for at, one in enumerate(names)
        for other in names[at + 1 :]
        if torch.allclose(found[one], found[other], atol=1e-3)
    }
    assert alike == set()
    own = {"sd2": "DDIM", "sdxl": "Euler"}.get(name)
    if own:
        same(run(), found[own])
    else:
        assert not any(torch.allclose(run(), each, atol=1e-3) for each in found.values())


@shows(UNIVERSAL, "num_inference_steps", "noise_strength")
@pytest.mark.parametrize("strength", [0.01, 0.5, 0.9, 1])
def test_thirty_steps_are_thirty_whatever_the_strength(studio: Studio, strength: float) -> None:
    for scheduler in ("Euler", "DPM++ 2M Karras", "DDIM"):
        fields: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": 30}
        [sample] = studio.prepare(image_url=START, noise_strength=strength, **fields).samples
        # of a thousand timesteps a hundredth are ten
        assert plan_of(sample).steps == (30 if strength > 0.03 else 9)
    [sample] = studio.prepare(num_inference_steps=30).samples
    assert plan_of(sample).steps == 31  # PNDM calls the model once more


# -- arrays


def schedule_of(sample: Sample) -> Any:
    schedule = plan_of(sample)._schedule
    assert schedule is not None
    return schedule


@shows(UNIVERSAL, "timesteps.method", "timesteps.array")
@pytest.mark.parametrize("scheduler", ["DPM++ 2M", "DPM++ 2M SDE", "Euler", "LCM", "TCD"])
@EVERY
def test_the_schedulers_own_timesteps_change_nothing(studio: Studio, name: str, scheduler: str) -> None:
    fields = {"model_name": name, "scheduler": scheduler}
    [sample] = studio.prepare(**fields).samples
    own = [round(each) for each in schedule_of(sample).timesteps]
    plain = studio.run(**fields)
    close(studio.run(**fields, **timesteps(*own), num_inference_steps=9), plain)
    differ(studio.run(**fields, **timesteps(900, 500, 40)), plain)
    same(studio.run(**fields, timesteps={"method": "default", "array": [900, 40]}), plain)
    same(studio.run(**fields, timesteps={"method": "array"}), plain)


@shows(UNIVERSAL, "sigmas.method", "sigmas.array")
@pytest.mark.parametrize("scheduler", ["Euler", "Euler (trailing timesteps)"])
@EVERY
def test_the_schedulers_own_sigmas_change_nothing(studio: Studio, name: str, scheduler: str) -> None:
    fields = {"model_name": name, "scheduler": scheduler}
    [sample] = studio.prepare(**fields).samples
    own = schedule_of(sample)._states[0].scheduler.sigmas.tolist()
    plain = studio.run(**fields)
    close(studio.run(**fields, **sigmas(*own), num_inference_steps=9), plain, atol=1e-3)
    differ(studio.run(**fields, **sigmas(12, 5, 1, 0)), plain)
    same(studio.run(**fields, sigmas={"method": "default", "array": [12, 0]}), plain)
    same(studio.run(**fields, sigmas={"method": "array"}), plain)


@shows(UNIVERSAL, "timesteps.array", "sigmas.array", "noise_strength")
def test_of_an_array_a_start_picture_goes_through_the_end(studio: Studio) -> None:
    for array in (timesteps(900, 700, 500, 300), sigmas(10, 5, 2, 1, 0)):
        for strength, steps in ((0.5, 2), (0.8, 3), (1, 4), (0.1, 1)):
            fields: dict[str, Any] = {"scheduler": "Euler", "image_url": START, **array}
            [sample] = studio.prepare(noise_strength=strength, **fields).samples
            assert plan_of(sample).steps == steps
    [sample] = studio.prepare(scheduler="Euler", image_url=START, **timesteps(900, 700, 500, 300)).samples
    assert schedule_of(sample).timesteps == (500, 300)


# -- eta


@shows(UNIVERSAL, "eta")
@EVERY
def test_eta_is_how_much_noise_ddim_adds(studio: Studio, name: str) -> None:
    ddim = partial(studio.run, model_name=name, scheduler="DDIM", num_inference_steps=4)
    differ(ddim(eta=0), ddim(eta=0.5))
    differ(ddim(eta=0.5), ddim(eta=1))
    same(ddim(eta=1), ddim(eta=1))
    for scheduler in ("Euler", "DPM++ 2M SDE", "LCM"):  # these have none
        run = partial(studio.run, model_name=name, scheduler=scheduler)
        same(run(eta=0), run(eta=1))


# -- tiles


def tiles_of(studio: Studio, **fields: Any) -> tuple[Tile, ...]:
    [sample] = studio.prepare(image_url="large", **fields).samples
    return plan_of(sample).tiles


@shows(UNIVERSAL, "tile_width", "tile_height", "tile_stride_width", "tile_stride_height")
def test_tiles_lie_as_far_apart_as_is_asked_for(wide: Studio) -> None:
    """The picture has 320 × 256 pixels: 40 × 32 cells."""
    assert tiles_of(wide) == (Tile(0, 0, 32, 40),)
    assert tiles_of(wide, tile_width=128) == tuple(Tile(0, left, 32, 16) for left in (0, 16, 24))
    assert tiles_of(wide, tile_height=128) == tuple(Tile(top, 0, 16, 40) for top in (0, 16))
    across = tiles_of(wide, tile_width=128, tile_stride_width=64)
    assert across == tuple(Tile(0, left, 32, 16) for left in (0, 8, 16, 24))
    down = tiles_of(wide, tile_height=128, tile_stride_height=64)
    assert down == tuple(Tile(top, 0, 16, 40) for top in (0, 8, 16))
    both = tiles_of(wide, tile_width=128, tile_height=128)
    assert {(tile.top, tile.left) for tile in both} == {
        (top, left) for top in (0, 16) for left in (0, 16, 24)
    }


def test_t16_tiles_count_as_the_work_that_they_are(tmp_path: Path) -> None:
    """2048 × 2048 pixels in tiles of 1024, 64 apart, are 72 pictures."""
    studio = Studio(tmp_path, limits=Limits(max_pixels=320 * 256, max_megapixel_steps=4))
    studio.files |= {"large": blocks(1, (320, 256))}
    asked = {"tile_width": 128, "tile_height": 128, "num_inference_steps": 30}
    assert len(tiles_of(studio, **asked)) == 6
    with pytest.raises(InputError) as raised:
        tiles_of(studio, **asked, tile_stride_width=64, tile_stride_height=64)
    [fault] = raised.value.fields
    assert (fault.loc, fault.type) == (("body", "tile_stride_width"), "less_than_equal")
    assert "12 tiles" in fault.msg


@shows(UNIVERSAL, "tile_width", "tile_height", "tile_stride_width", "tile_stride_height")
@EVERY
def test_a_tile_as_large_as_the_picture_is_none(wide: Studio, name: str) -> None:
    run = partial(wide.run, model_name=name, image_url="large", num_inference_steps=2)
    plain = run()
    same(run(tile_width=320, tile_height=256, tile_stride_width=64, tile_stride_height=64), plain)
    tiled = [run(tile_width=width, tile_height=height) for width, height in ((128, 256), (320, 128))]
    differ(tiled[0], plain)
    differ(tiled[1], plain)
    differ(tiled[0], tiled[1])
    differ(run(tile_width=128, tile_stride_width=64), run(tile_width=128))
    differ(run(tile_height=128, tile_stride_height=64), run(tile_height=128))


@shows(UNIVERSAL, "tile_width", "tile_stride_width")
@pytest.mark.parametrize("scheduler", ["Euler", "DPM++ 2M Karras", None])
def test_tiles_side_by_side_are_pictures_of_their_own(wide: Studio, scheduler: str | None) -> None:
    """With their parts of the noise, the control image and the masks."""
    files = {"net": wide.controlnet(), "ip": wide.ip_adapter(), "encoder": wide.encoder()}
    start, mask = wide.files["wide"], blocks(6, (256, 128))

    def prepared(box: tuple[int, int, int, int]) -> Generation:
        grey = Image.new(
            "RGB", (box[2] - box[0], box[3] - box[1]), "grey"
        )  # a part of it is the same to CLIP
        shown = files | {"start": start.crop(box), "mask": mask.crop(box), "grey": grey}
        net = {"path": "net", "image_url": "start", "mask_url": "mask"}
        adapter = {"path": "ip", "ip_adapter_image_url": "grey", "ip_adapter_mask_url": "mask"}
        return wide.prepare(
            shown,
            image_url="start",
            noise_strength=1,
            controlnets=[net],
            ip_adapter=[adapter],
            image_encoder_path="encoder",
            scheduler=scheduler,
            tile_width=128,
        )

    whole = prepared((0, 0, 256, 128))
    assert len(plan_of(whole.samples[0]).tiles) == 2
    parts = {left: prepared((8 * left, 0, 8 * left + 128, 128)) for left in (0, 16)}
    for left, part in parts.items():
        part.samples[0].latents = whole.samples[0].latents[..., left : left + 16].clone()
    together, *alone = wide.finish(whole, *parts.values())
    close(together, torch.cat(alone, dim=-1))


@EVERY
def test_sdxl_is_told_where_a_tile_lies(wide: Studio, name: str) -> None:
    [sample] = wide.prepare(
        model_name=name, image_url="large", tile_width=256, tile_height=128, guidance_scale=1
    ).samples
    told = [row.time_ids for row in plan_of(sample).rows(0, sample.latents)]
    assert told == [(256, 320, top, left, 128, 256) for top in (0, 128) for left in (0, 64)]


# -- what is kept of the way


@shows(UNIVERSAL, "debug_latents", "debug_per_pass_latents")
@EVERY
def test_the_way_is_kept_step_by_step_and_tile_by_tile(wide: Studio, name: str) -> None:
    fields: dict[str, Any] = {"model_name": name, "image_url": "large", "num_images": 2, "tile_width": 128}
    fields |= {"scheduler": "Euler A"}
    plain = wide.run(**fields)
    generation = wide.prepare(**fields, debug_latents=True, debug_per_pass_latents=True)
    [latents] = wide.finish(generation)
    same(latents, plain)
    traces = {
        field: {glimpse.name: glimpse.picture for glimpse in trace}
        for field, trace in wide.pipe.traces(generation).items()
    }
    assert list(traces["debug_latents"]) == [f"{i:04}_{k:04}" for i in range(2) for k in range(3)]
    assert list(traces["debug_per_pass_latents"]) == [
        f"{i:04}_{k:04}_{t:04}" for i in range(2) for k in range(3) for t in range(3)
    ]
    assert {each.size for each in traces["debug_latents"].values()} == {(320, 256)}
    assert {each.size for each in traces["debug_per_pass_latents"].values()} == {(128, 256)}
    for number, sample in enumerate(generation.samples):
        assert traces["debug_latents"][f"{number:04}_0002"].tobytes() == wide.pipe.finish(sample).tobytes()


@shows(UNIVERSAL, "debug_latents", "debug_per_pass_latents")
def test_what_is_not_asked_for_is_not_kept(studio: Studio) -> None:
    for fields in ({}, {"debug_latents": True}, {"debug_per_pass_latents": True}):
        generation = studio.prepare(**fields)
        studio.finish(generation)
        assert list(studio.pipe.traces(generation)) == list(fields)


@shows(UNIVERSAL, "debug_per_pass_latents")
def test_of_a_single_tile_each_pass_is_the_step(studio: Studio) -> None:
    generation = studio.prepare(debug_latents=True, debug_per_pass_latents=True, scheduler="DPM++ 2M SDE")
    studio.finish(generation)
    steps, passes = (list(trace) for trace in studio.pipe.traces(generation).values())
    assert [each.name for each in passes] == [f"{each.name}_0000" for each in steps]
    assert [each.picture.tobytes() for each in passes] == [each.picture.tobytes() for each in steps]


def test_the_answer_leads_to_what_was_kept(studio: Studio) -> None:
    def file(url: str) -> File:
        return File(url=url, content_type="application/x-tar", file_name="a.tar", file_size=1)

    wish = studio.wish()
    traces = {"debug_latents": file("a"), "debug_per_pass_latents": file("b")}
    told = studio.pipe.answer(wish, Outcome((), 7, (), {}, traces)).model_dump()
    assert (told["debug_latents"]["url"], told["debug_per_pass_latents"]["url"]) == ("a", "b")
    bare = studio.pipe.answer(wish, Outcome((), 7, (), {})).model_dump()
    assert bare["debug_latents"] is bare["debug_per_pass_latents"] is None


def test_without_steps_there_is_a_way_of_no_steps(studio: Studio) -> None:
    generation = studio.prepare(image_url=START, noise_strength=0, debug_latents=True)
    studio.finish(generation)
    assert {field: list(each) for field, each in studio.pipe.traces(generation).items()} == {
        "debug_latents": []
    }
