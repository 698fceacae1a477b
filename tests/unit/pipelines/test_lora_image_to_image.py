"""lora/image-to-image: which model, which words, which LoRAs, from which picture to how many."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel

from pipelines import images
from pipelines.sd import loading
from pipelines.sd.base import plan_of
from pipelines.sd.grid import Grid
from pipelines.sd.model import SdModel
from pipelines.sd.parts import Kind
from schemas.errors import InputError
from schemas.settings import BaseSettings, Limits, ModelSettings
from tests.support import sd_files
from tests.support.assets import given
from tests.support.fields import shows
from tests.support.sd_controlnets import stirred
from tests.support.universal import KINDS, START, UNIVERSAL, Studio, blocks, close, differ, grow, same

EVERY = pytest.mark.parametrize("name", KINDS)
SD_KINDS: dict[str, Kind] = {"sd15": "sd1", "sd2": "sd2", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"))


# -- the model


@shows(UNIVERSAL, "model_name")
def test_each_model_draws_its_own_picture(studio: Studio) -> None:
    pictures = [studio.run(model_name=name) for name in KINDS]
    for one in range(3):
        differ(pictures[one], pictures[one - 1])


@shows(UNIVERSAL, "model_name")
@EVERY
def test_a_model_in_one_file_draws_what_its_folder_does(
    studio: Studio, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file does not say is taken from configs, here those of the embedded models."""
    configs = {kind: studio.folders[name] for name, kind in SD_KINDS.items()}
    monkeypatch.setattr(loading, "inspect", partial(loading.inspect, configs=configs))
    parts = loading.inspect(studio.folders[name], torch.float32).load("cpu")
    file = sd_files.write(parts, tmp_path / "model.safetensors")
    fields = {"image_url": START, "clip_skip": 1, "negative_prompt": "grey"}
    close(studio.run({"file": file}, model_name="file", **fields), studio.run(model_name=name, **fields))


@shows(UNIVERSAL, "unet_name")
@EVERY
def test_another_unet_takes_the_place_of_the_models_own(studio: Studio, name: str, tmp_path: Path) -> None:
    unet = stirred(type(studio.stock[name].unet).from_config(studio.stock[name].unet.config), 9)
    files = {"whole": studio.changed(f"other-unet-{name}", name, unet=unet), "folder": tmp_path / "folder"}
    unet.save_pretrained(tmp_path / "folder")
    files |= {"file": tmp_path / "folder" / "diffusion_pytorch_model.safetensors"}
    files |= {"original": tmp_path / "original.safetensors"}
    save_file(sd_files.unet(unet), tmp_path / "original.safetensors")
    expected = studio.run(files, model_name="whole")
    differ(expected, studio.run(model_name=name))
    for way in ("folder", "file", "original"):
        same(studio.run(files, model_name=name, unet_name=way), expected)


@shows(UNIVERSAL, "variant")
def test_the_variant_says_which_files_of_a_folder_are_read(studio: Studio, tmp_path: Path) -> None:
    unet = stirred(type(studio.stock["sd15"].unet).from_config(studio.stock["sd15"].unet.config), 9)
    files = {"other": studio.changed("other-unet", unet=unet), "both": tmp_path / "both"}
    shutil.copytree(studio.folders["sd15"], files["both"])
    stem = "unet/diffusion_pytorch_model"
    shutil.copy(files["other"] / f"{stem}.safetensors", files["both"] / f"{stem}.fp16.safetensors")
    run = partial(studio.run, files, model_name="both")
    same(run(variant="fp16"), studio.run(files, model_name="other"))
    same(run(), studio.run())
    swapped = tmp_path / "swapped"  # a UNet alone: here the plain files are the other ones
    shutil.copytree(files["other"] / "unet", swapped)
    plain = studio.folders["sd15"] / f"{stem}.safetensors"
    shutil.copy(plain, swapped / "diffusion_pytorch_model.fp16.safetensors")
    with_unet = partial(studio.run, files | {"swapped": swapped}, model_name="both", unet_name="swapped")
    same(with_unet(variant="fp16"), run())
    same(with_unet(), run(variant="fp16"))


# -- the words


@shows(UNIVERSAL, "prompt", "negative_prompt", "guidance_scale")
@EVERY
def test_guidance_leads_towards_the_prompt_and_away_from_the_negative_one(studio: Studio, name: str) -> None:
    run = partial(studio.run, model_name=name, num_inference_steps=1, scheduler="Euler")
    towards, away = run(guidance_scale=1), run(guidance_scale=1, prompt="grey")
    differ(towards, away)
    differ(run(), run(prompt="blue"))
    # one step of Euler is linear in the prediction
    close(run(guidance_scale=4, negative_prompt="grey"), away + 4 * (towards - away), atol=1e-3)


@shows(UNIVERSAL, "guidance_scale", "negative_prompt")
def test_up_to_guidance_one_the_negative_prompt_means_nothing(studio: Studio) -> None:
    same(studio.run(guidance_scale=0), studio.run(guidance_scale=1, negative_prompt="blue"))
    differ(studio.run(guidance_scale=1.5), studio.run(guidance_scale=1.5, negative_prompt="blue"))


@shows(UNIVERSAL, "prompt_weighting")
@EVERY
def test_weights_are_read_if_they_are_asked_for(studio: Studio, name: str) -> None:
    read = partial(studio.run, model_name=name, prompt_weighting=True)
    written = partial(studio.run, model_name=name)
    plain = written(prompt="a red square")
    same(read(prompt="a red square"), read(prompt="(a:1) red square"), plain)
    differ(read(prompt="a (red:1.5) square"), plain)
    differ(read(prompt="a (red:1.5) square"), written(prompt="a (red:1.5) square"))
    differ(read(negative_prompt="(blue:1.5)"), read(negative_prompt="blue"))


@shows(UNIVERSAL, "prompt_weighting")
@EVERY
def test_with_weights_prompts_may_be_of_any_length(studio: Studio, name: str) -> None:
    """The embedded tokenizer makes a token of each letter."""
    words = " ".join(["word"] * 60)  # 240 letters: four chunks
    for field in ("prompt", "negative_prompt"):
        ends = [{"model_name": name, field: f"{words} {end}"} for end in ("red", "blue")]
        differ(*(studio.run(prompt_weighting=True, **each) for each in ends))
        same(*(studio.run(**each) for each in ends))
    both = studio.prepare(model_name=name, prompt=words, negative_prompt="x", prompt_weighting=True)
    [row, other] = plan_of(both.samples[0]).rows(0, both.samples[0].latents)
    assert len(row.text.tokens) == len(other.text.tokens) == 4 * 77


@shows(UNIVERSAL, "clip_skip")
@pytest.mark.parametrize("name", ["sd15", "sd2"])
@pytest.mark.parametrize("skip", [1, 2])
def test_skipping_is_a_text_encoder_without_its_last_layers(studio: Studio, name: str, skip: int) -> None:
    encoder = studio.stock[name].text_encoder
    config = type(encoder.config)(**encoder.config.to_dict() | {"num_hidden_layers": 3 - skip})
    short = CLIPTextModel(config)
    short.load_state_dict(encoder.state_dict(), strict=False)
    files = {"short": studio.changed(f"short-{name}-{skip}", name, text_encoder=short)}
    fields = {"prompt": "a red square", "negative_prompt": "grey"}
    skipped = studio.run(model_name=name, clip_skip=skip, **fields)
    same(skipped, studio.run(files, model_name="short", **fields))
    differ(skipped, studio.run(model_name=name, **fields))


@shows(UNIVERSAL, "clip_skip")
def test_skipping_acts_on_both_text_encoders_of_sdxl(studio: Studio) -> None:
    """SDXL reads the last layer but one: it changes with each skip, what is pooled does not."""
    texts = []
    for skip in (0, 1):
        sample = studio.prepare(model_name="sdxl", clip_skip=skip).samples[0]
        texts.append(plan_of(sample).prompting.prompt.text)
    plain, skipped = texts
    assert plain.pooled is not None and skipped.pooled is not None
    same(plain.pooled, skipped.pooled)
    width = studio.stock["sdxl"].text_encoder.config.hidden_size
    for part in (slice(0, width), slice(width, None)):
        differ(plain.tokens[:, part], skipped.tokens[:, part])
    differ(*(studio.run(model_name="sdxl", clip_skip=skip) for skip in (0, 1)))


@shows(UNIVERSAL, "embeddings.path", "embeddings.tokens")
@EVERY
def test_a_learned_word_is_read_as_its_vectors(studio: Studio, name: str) -> None:
    """The vectors are those of words of the model's own, so that it is known what they mean."""
    files = {"words": studio.embedding("q w", name), "others": studio.embedding("z x", name)}

    def run(prompt: str, path: str = "words", **fields: Any) -> torch.Tensor:
        return studio.run(files, model_name=name, prompt=prompt, embeddings=[{"path": path, **fields}])

    expected = studio.run(model_name=name, prompt="a q w b")
    same(run("a <s0><s1> b"), run("a toy b", tokens=["toy"]), expected)
    same(run("a <s0> w b"), run("a q two b", tokens=["one", "two"]), expected)
    same(run("a <s0><s1> b", "others"), studio.run(model_name=name, prompt="a z x b"))
    differ(expected, studio.run(model_name=name, prompt="a <s0><s1> b"))
    with_weights = {"prompt": "a <s0><s1> (b:1.3)", "prompt_weighting": True}
    differ(
        studio.run(files, model_name=name, embeddings=[{"path": "words"}], **with_weights),
        studio.run(model_name=name, **with_weights),
    )


@shows(UNIVERSAL, "embeddings.tokens")
def test_a_learned_word_may_stand_in_the_negative_prompt(studio: Studio) -> None:
    files = {"words": studio.embedding("q w")}
    learned = studio.run(files, negative_prompt="<s1>", embeddings=[{"path": "words"}])
    same(learned, studio.run(negative_prompt="w"))


@shows(UNIVERSAL, "prompt", "negative_prompt")
@EVERY
def test_no_words_are_words_too(studio: Studio, name: str) -> None:
    silent = partial(studio.run, model_name=name, prompt="")
    same(silent(), silent(negative_prompt=""), silent(prompt_weighting=True))
    close(silent(), silent(guidance_scale=1), atol=1e-3)  # both rows are told the same
    differ(silent(), silent(negative_prompt="grey"))


# -- LoRAs


@shows(UNIVERSAL, "loras.path", "loras.scale")
@EVERY
def test_a_lora_acts_by_its_scale(studio: Studio, name: str) -> None:
    files = {letter: studio.lora(seed, name) for seed, letter in enumerate("ab")}

    def run(*loras: tuple[str, float]) -> torch.Tensor:
        wishes = [{"path": path, "scale": scale} for path, scale in loras]
        return studio.run(files, model_name=name, loras=wishes)

    plain = studio.run(model_name=name)
    same(run(("a", 0)), plain)
    grow([run(("a", scale)) for scale in (0.02, 0.1, 0.4)], plain)
    differ(run(("a", 1)), run(("b", 1)))
    close(run(("a", 0.5), ("b", 1)), run(("b", 1), ("a", 0.5)))
    close(run(("a", 0.3), ("a", 0.4)), run(("a", 0.7)))
    differ(run(("a", 4)), run(("a", 3)))
    same(studio.run(files, model_name=name, loras=[{"path": "a"}]), run(("a", 1)))


# -- the picture


@shows(UNIVERSAL, "image_url")
def test_without_a_start_picture_one_of_1024_pixels_a_side_is_made(tmp_path: Path) -> None:
    studio = Studio(tmp_path, limits=Limits())
    [sample] = studio.prepare().samples
    assert sample.latents.shape == (4, 128, 128)
    assert (plan_of(sample).grid.width, plan_of(sample).grid.height) == (1024, 1024)


@shows(UNIVERSAL, "image_url")
@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((96, 64), (96, 64)),
        ((100, 71), (96, 64)),  # cells are of 8 pixels
        ((10, 90), (64, 88)),  # and at least 8 a side
        ((1920, 480), (192, 64)),  # more pixels than this server makes: 192 × 48 are as many as it does
    ],
)
def test_the_picture_has_the_size_of_the_start_picture(
    studio: Studio, start: tuple[int, int], size: tuple[int, int]
) -> None:
    generation = studio.prepare({"start": blocks(3, start)}, image_url="start", num_inference_steps=1)
    studio.finish(generation)
    assert studio.pipe.finish(generation.samples[0]).size == size


@shows(UNIVERSAL, "image_url", "noise_strength")
@EVERY
def test_less_noise_stays_nearer_to_the_start(studio: Studio, name: str) -> None:
    def run(strength: float, start: str = START) -> torch.Tensor:
        fields = {"model_name": name, "guidance_scale": 1, "num_inference_steps": 6}
        return studio.run(image_url=start, noise_strength=strength, **fields)

    with studio.base(name) as base:
        origin = base.encode_image(studio.files[START], Grid.of(96, 64))[None]
    same(run(0), origin)  # and the picture is what the VAE makes of it
    differ(run(0.3), run(0.3, "other"))
    grow([run(strength) for strength in (0.1, 0.4, 1)], origin)


@shows(UNIVERSAL, "noise_strength")
def test_without_noise_nothing_is_predicted(studio: Studio) -> None:
    generation = studio.prepare(image_url=START, noise_strength=0, num_images=2)
    assert all(sample.is_done for sample in generation.samples)
    with studio.base("sd15") as base:
        origin = base.decode(base.encode_image(studio.files[START], Grid.of(96, 64)))
    for sample in generation.samples:
        assert studio.pipe.finish(sample).tobytes() == images.from_tensor(origin).tobytes()


@shows(UNIVERSAL, "noise_strength")
@pytest.mark.parametrize("scheduler", [None, "Euler", "DPM++ 2M Karras", "DDIM", "LCM", "Euler A"])
@EVERY
def test_nothing_but_noise_is_a_picture_from_words(studio: Studio, name: str, scheduler: str | None) -> None:
    fields = {"model_name": name, "scheduler": scheduler}
    same(studio.run(image_url="square", noise_strength=1, **fields), studio.run(**fields))


@shows(UNIVERSAL, "seed")
def test_the_seed_decides_and_zero_is_one(studio: Studio) -> None:
    for scheduler in ("Euler", "Euler A"):
        run = partial(studio.run, scheduler=scheduler)
        same(run(seed=0), run(seed=0), run(seed=None))  # in the place of none this server draws; here 0
        differ(run(seed=0), run(seed=1))
        differ(run(seed=-1), run(seed=1))
    assert [studio.prepare(seed=seed).seed for seed in (0, 5, None)] == [0, 5, 0]


@shows(UNIVERSAL, "seed")
@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_whole_range_of_seeds_works(studio: Studio, seed: int) -> None:
    assert studio.run(seed=seed, num_images=2, scheduler="Euler A").isfinite().all()


@shows(UNIVERSAL, "num_images")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_url": START, "noise_strength": 0.7},
        {"scheduler": "Euler A"},
        {"model_name": "sdxl", "scheduler": "DDIM", "eta": 1},
    ],
)
def test_image_i_of_n_is_the_single_image_of_seed_plus_i(studio: Studio, fields: dict[str, Any]) -> None:
    together = studio.run(num_images=3, **fields)
    close(together, torch.cat([studio.run(**fields | {"seed": 7 + i}) for i in range(3)]))
    differ(together[0], together[1])


@shows(UNIVERSAL, "image_format")
@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_the_pictures_format_is_the_one_asked_for(studio: Studio, format: str) -> None:
    assert studio.prepare(image_format=format).format == format
    assert studio.prepare().format == "png"


def test_a_preview_is_small(studio: Studio) -> None:
    generation = studio.prepare({"long": blocks(4, (384, 24))}, image_url="long", noise_strength=0.2)
    studio.finish(generation)
    [sample] = generation.samples
    assert studio.pipe.finish(sample).size == (384, 64)
    assert studio.pipe.preview(sample).size == (256, 40)


def test_what_a_request_held_is_given_back(studio: Studio) -> None:
    files = {"a": studio.lora(), "net": studio.controlnet()}
    fields: dict[str, Any] = {
        "model_name": "sd2",
        "loras": [{"path": "a"}],
        "controlnets": [{"path": "net", "image_url": START}],
    }
    files |= {"a": studio.lora(name="sd2"), "net": studio.controlnet(name="sd2")}
    model, before = studio.model, studio.model._bases.pins
    wish = studio.wish(**fields)
    held = studio.pipe.hold(wish, given(wish, studio.files | files))
    assert (model._bases.pins, model.adapters.pins) == (before + 1, 1)
    generation = studio.prepare(files, **fields)
    assert (model._bases.pins, model.adapters.pins) == (before + 2, 2)
    held.close()
    studio.finish(generation)
    assert (model._bases.pins, model.adapters.pins) == (before, 0)
    with studio.base("sd2") as base:
        assert base._bank.pins == base._text_bank.pins == 0
    for resident in (model._bases, model.adapters):
        resident.check_integrity()


def test_a_base_that_does_not_fit_beside_the_settings_own_is_refused(tmp_path: Path) -> None:
    sizes = {
        name: loading.inspect(path, torch.float32).nbytes for name, path in Studio(tmp_path).folders.items()
    }
    studio = Studio(tmp_path, bases=BaseSettings(memory_bytes=sizes["sd2"] + 1000))
    with pytest.raises(InputError) as refusal:
        studio.run(model_name="sd2")
    [fault] = refusal.value.fields
    assert (fault.loc, fault.type) == (("body", "model_name"), "file_too_large")
    studio.run(model_name="sd15")


def test_requests_for_the_settings_model_run_on_it_whatever_came_between(tmp_path: Path) -> None:
    studio = Studio(tmp_path)
    sizes = [loading.inspect(each, torch.float32).nbytes for each in studio.folders.values()]
    bases = BaseSettings(memory_bytes=sizes[0] + max(sizes))  # room for it and another
    studio = Studio(tmp_path, bases=bases)
    for name in ("sd2", "sdxl"):
        studio.run(model_name=name)
    with studio.base("sd15") as base:
        assert base is studio.model.base


def test_the_settings_own_model_is_known_by_its_word_there_and_by_its_place(studio: Studio) -> None:
    folder = studio.folders["sd15"]
    model = SdModel.load(ModelSettings(model="of the house", endpoints=("any",)), lambda word: folder)
    assert {"of the house", str(folder)} <= model.on_device()
