"""lora/image-to-image: requests that share forwards end as they do alone."""

from typing import Any

import pytest

from pipelines.base import Generation
from pipelines.engine.engine import Engine
from pipelines.sd.base import plan_of
from schemas.settings import Limits
from tests.support.engine import Ears, turn
from tests.support.universal import KINDS, START, Studio, blocks, close, same

EVERY = pytest.mark.parametrize("name", KINDS)
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """With adapters of each kind for each model."""
    made = Studio(tmp_path_factory.mktemp("studio"), limits=Limits(max_pixels=256 * 128))
    for name in KINDS:
        made.files |= {f"lora-{seed}-{name}": made.lora(seed, name) for seed in (0, 1)}
        made.files |= {f"net-{seed}-{name}": made.controlnet(seed, name) for seed in (2, 3)}
        made.files |= {f"plain-{name}": made.ip_adapter("plain", 1, name)}
        made.files |= {f"plus-{name}": made.ip_adapter("plus", 2, name)}
        made.files |= {f"faceid-{name}": made.ip_adapter("faceid", 3, name)}
    made.files |= {"encoder": made.encoder(), "wide": blocks(1, (256, 128)), "tile": blocks(2, (128, 128))}
    made.look_for_faces()
    return made


def lora(name: str, seed: int = 0, scale: float = 1.0) -> Fields:
    return {"path": f"lora-{seed}-{name}", "scale": scale}


def net(name: str, seed: int = 2, **words: Any) -> Fields:
    return {"path": f"net-{seed}-{name}", "image_url": START, **words}


def shown(name: str, kind: str = "plain", picture: Any = START, **words: Any) -> Fields:
    return {"path": f"{kind}-{name}", "ip_adapter_image_url": picture, **words}


def different(name: str) -> list[Fields]:
    """Requests of one size that have nothing else in common."""
    return [
        {},
        {"scheduler": "Euler A", "num_inference_steps": 5, "guidance_scale": 1, "seed": 3},
        {"scheduler": "DPM++ 2M SDE Karras", "guidance_scale": 0, "negative_prompt": "grey"},
        {"scheduler": "DDIM", "eta": 1, "noise_strength": 0.9, "clip_skip": 1, "num_images": 2},
        {"scheduler": "LCM", "num_inference_steps": 2, "prompt": "blue", "loras": [lora(name, 0, 0.5)]},
        {"loras": [lora(name, 1), lora(name, 0, 0.3)], "controlnets": [net(name, 3, conditioning_scale=0.4)]},
        {"controlnets": [net(name), net(name, 3, image_url="other", mask_url="left")], "guidance_scale": 2},
        {"controlnets": [net(name, start_percentage=0.5)], "controlnet_guess_mode": True},
        {
            "ip_adapter": [shown(name, scale=0.7), shown(name, "plus", ["other", START])],
            "image_encoder_path": "encoder",
        },
        {
            "ip_adapter": [shown(name, "plus", ip_adapter_mask_url="left")],
            "image_encoder_path": "encoder",
            "controlnets": [net(name)],
            "guidance_scale": 1,
        },
        {"ip_adapter": [shown(name, "faceid", insight_face_model_path="ann")], "scheduler": "TCD"},
        {"prompt_weighting": True, "prompt": "a (red:1.4) square"},
        {"debug_latents": True, "scheduler": "Euler (trailing timesteps)", "noise_strength": 0.2},
    ]


@pytest.fixture
def prepared(studio: Studio) -> Any:
    def prepared(name: str, wishes: list[Fields]) -> list[Generation]:
        return [studio.prepare(**{"model_name": name, "image_url": START} | wish) for wish in wishes]

    return prepared


@EVERY
def test_a_batch_of_different_requests_equals_separate_runs(studio: Studio, prepared: Any, name: str) -> None:
    wishes = different(name)
    first = prepared(name, wishes)
    assert len({sample.key for each in first for sample in each.samples}) == 1  # so they share forwards
    together = studio.finish(*first)
    alone = [studio.finish(each)[0] for each in prepared(name, wishes)]
    for mixed, single in zip(together, alone, strict=True):
        close(mixed, single, atol=5e-4)


@EVERY
def test_long_prompts_share_forwards_with_those_padded_alike(
    studio: Studio, prepared: Any, name: str
) -> None:
    words = " ".join(["word"] * 20)
    wishes: list[Fields] = [
        {"prompt_weighting": True, "prompt": words},
        {"prompt_weighting": True, "prompt": "short", "negative_prompt": words},
        {"prompt_weighting": True, "prompt": words[::-1], "guidance_scale": 1},
        {"prompt": words},  # cut: its text is shorter, so it runs apart
    ]
    first = prepared(name, wishes)
    keys = [sample.key for each in first for sample in each.samples]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    together = studio.finish(*first)
    for mixed, single in zip(together, prepared(name, wishes), strict=True):
        close(mixed, studio.finish(single)[0], atol=5e-4)


@pytest.mark.parametrize("turns", [1, 2, 4])
@EVERY
def test_a_request_that_joins_midway_ends_as_it_does_alone(
    studio: Studio, prepared: Any, name: str, turns: int
) -> None:
    early: Fields = {"num_inference_steps": 6, "loras": [lora(name)], "controlnets": [net(name)]}
    late: Fields = {"scheduler": "DPM++ 2M Karras", "guidance_scale": 3, "loras": [lora(name, 1)], "seed": 2}
    late |= {"ip_adapter": [shown(name)], "image_encoder_path": "encoder"}
    generations = prepared(name, [early, late])
    first, second = (each.samples[0] for each in generations)
    engine, ears = Engine(studio.model.predict, 1 << 20), Ears()
    engine.add(first, ears)
    for _ in range(turns):
        turn(engine)
    engine.add(second, ears)
    while len(engine):
        turn(engine)
    assert set(ears.ends.values()) == {None} and second.company > second.step, "they shared steps"
    for generation, sample, alone in zip(
        generations, (first, second), prepared(name, [early, late]), strict=True
    ):
        generation.resources.close()
        close(sample.latents[None], studio.finish(alone)[0], atol=5e-4)


@EVERY
def test_tiles_share_forwards_with_pictures_of_their_size(studio: Studio, prepared: Any, name: str) -> None:
    wishes: list[Fields] = [
        {"image_url": "wide", "tile_width": 128, "tile_stride_width": 64},
        {"image_url": "tile", "scheduler": "Euler"},
        {"image_url": "tile", "controlnets": [net(name)]},
        {"image_url": "wide"},  # of another size: runs apart
    ]
    first = prepared(name, wishes)
    keys = [sample.key for each in first for sample in each.samples]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert [len(plan_of(each.samples[0]).tiles) for each in first] == [3, 1, 1, 1]
    for mixed, single in zip(studio.finish(*first), prepared(name, wishes), strict=True):
        close(mixed, studio.finish(single)[0], atol=5e-4)


def test_models_never_share_a_forward(studio: Studio, prepared: Any) -> None:
    studio.files["light"] = studio.offsets(8)
    lit: Fields = {"ic_light_model_url": "light", "ic_light_image_url": "other"}
    wishes: list[tuple[str, Fields]] = [("sd15", {}), ("sd2", {}), ("sdxl", {}), ("sd15", lit)]
    first = [generation for name, wish in wishes for generation in prepared(name, [wish])]
    assert len({each.samples[0].key for each in first}) == 4
    together = studio.finish(*first)
    for mixed, (name, wish) in zip(together, wishes, strict=True):
        [alone] = prepared(name, [wish])
        close(mixed, studio.finish(alone)[0], atol=5e-4)


@EVERY
def test_a_forward_of_few_rows_at_a_time_makes_the_same(studio: Studio, prepared: Any, name: str) -> None:
    """The settings bound what one forward holds."""
    tight = Studio(studio.root / "tight", limits=studio.limits, batch_tokens=1)
    fields: Fields = {"model_name": name, "image_url": "wide", "tile_width": 128, "num_images": 2}
    tight.files |= {"wide": studio.files["wide"]}
    close(tight.run(**fields), studio.run(**fields), atol=5e-4)


def test_a_step_that_is_run_again_gives_the_same_bytes(studio: Studio, prepared: Any) -> None:
    """A batch in which one row fails is run again row by row."""
    wishes: list[Fields] = [{"scheduler": "Euler A"}, {"scheduler": "DPM++ 2M SDE"}, {"seed": 3}]
    generations = prepared("sd15", wishes)
    samples = [each.samples[0] for each in generations]

    def predict(batch: Any) -> Any:
        answers = studio.model.predict(batch)
        if len(batch) > 1:
            for sample, answer in zip(batch, answers, strict=True):
                plan_of(sample).advance(sample.step, sample.latents, answer, None)
            raise RuntimeError("no memory")
        return answers

    engine, ears = Engine(predict, 1 << 20), Ears()
    for sample in samples:
        engine.add(sample, ears)
    while len(engine):
        turn(engine)
    assert set(ears.ends.values()) == {None}
    for generation, sample, alone in zip(generations, samples, prepared("sd15", wishes), strict=True):
        generation.resources.close()
        same(sample.latents[None], studio.finish(alone)[0])
