"""What the trained embedded models can do, beside what is asked of them, over 200 seeds.

The judges know no model: they tell from pixels what a picture shows (`pipelines/zoo/judges.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.measure import Row, arguments, header, show
from pipelines import zoo
from pipelines.zoo import judges, world
from pipelines.zoo.training.controlnet import edges
from pipelines.zoo.world import Pixels
from tests.support import flux_world, sd_world
from tests.support.world import asked, distances, edge_iou, prompts, scene, scenes

SEEDS, FEW = 200, 48
WANTED = {"background": 0.95, "colour": 0.90, "position": 0.75, "shape": 0.75}
CHANCE = {name: 1 / len(values) for name, values in world.ATTRIBUTES.items()}
GUIDANCES = (1, 2, 3.5, 5, 7.5)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)

Draw = Callable[..., list[Pixels]]  # prompts, the first seed, fields of the request


def main() -> None:
    file = arguments(str(__doc__)).json
    caption = (
        f"{SEEDS} seeds each at {world.SIDE_PX} px, {flux_world.STEPS} steps, the endpoints' own guidance"
    )
    rows: list[Row] = [{"of 1": "asked of them", **WANTED}, {"of 1": "chance", **CHANCE}]
    rows += [{"of 1": name, **by_attribute(draw)} for name, draw in models(512).items()]
    show("pictures that show what was asked", rows, caption, file)
    caption = f"{FEW} seeds each; the sum of the four, of 4"
    rows = [by_guidance(name, draw) for name, draw in models(32).items()]
    show("agreement by guidance", rows, caption, file)
    show("image to image by strength", list(by_strength()), f"{FEW} seeds each", file)
    show("adapters and edits", list(adapters()), f"{FEW} seeds each", file)


def models(max_sequence_length: int) -> dict[str, Draw]:
    """Those that are shipped; FLUX pads prompts to so many tokens."""
    known: Mapping[str, Draw] = {
        "flux-world": partial(flux_world.drawn, max_sequence_length=max_sequence_length),
        "sd15-world": partial(sd_world.drawn, "sd15"),
        "sdxl-world": partial(sd_world.drawn, "sdxl"),
    }
    return {name: draw for name, draw in known.items() if name in zoo.trained()}


def by_attribute(draw: Draw) -> dict[str, float]:
    seen = agreement(draw, SEEDS)
    return {name: seen[name] for name in WANTED}


def agreement(draw: Draw, count: int, **fields: Any) -> dict[str, float]:
    wanted = asked(count, seed=10_000)
    return judges.agreement(draw(prompts(wanted), 20_000, **fields), wanted)


def by_guidance(name: str, draw: Draw) -> Row:
    sums = {scale: sum(agreement(draw, FEW, guidance_scale=scale).values()) for scale in GUIDANCES}
    return {"": name, **{f"guidance {scale}": each for scale, each in sums.items()}}


def by_strength() -> Iterator[Row]:
    wanted, starts = asked(FEW, seed=30_000), scenes(FEW, seed=40_000)
    remakes: dict[str, Draw] = {"flux-world": flux_world.remade}
    if "sd15-world" in zoo.trained():
        remakes["sd15-world"] = partial(sd_world.remade, "sd15")
    for name, draw in remakes.items():
        field = "strength" if name == "flux-world" else "noise_strength"
        for strength in STRENGTHS:
            made = draw(prompts(wanted), starts, 50_000, **{field: strength})
            yield {
                "": name,
                "strength": strength,
                "distance to the start, of 255": float(np.mean(distances(made, starts))),
                "agreement with the prompt, of 4": sum(judges.agreement(made, wanted).values()),
            }


def adapters() -> Iterator[Row]:
    for family, draw in STYLED.items():
        for style in world.STYLES[1:]:
            if f"{family}-world-{style}" in zoo.trained():
                yield {"": f"{family}, LoRA {style}: share of it at 1; at 0", **pair(shares(draw, style))}
    yield {"": "FLUX, rf-inversion: the new colour; the old shape", **pair(inversion())}
    yield {"": "FLUX, reference at 0.65; at 0: agreement with it, of 4", **pair(reference())}
    for name, follow in FOLLOWERS.items():
        if f"{name}-world-canny" in zoo.trained():
            yield {"": f"{name}, canny: edge IoU at 1; at 0", **pair(edge_ious(follow))}


def pair(values: Sequence[float]) -> Row:
    return dict(zip(("this", "beside"), values, strict=True))


def flux_styled(prompts: Sequence[str], seed: int, style: str, scale: float) -> list[Pixels]:
    lora = zoo.locate(f"flux-world-{style}") / f"flux-world-{style}.safetensors"
    named = {"strength": 1, "loras": [{"path": "style", "scale": scale}]}
    return flux_world.remade(prompts, scenes(len(prompts), seed=60_000), seed, lora, **named)


STYLED: Mapping[str, Draw] = {
    "flux": flux_styled,
    "sd15": partial(sd_world.styled, "sd15"),
    "sdxl": partial(sd_world.styled, "sdxl"),
}


def shares(draw: Draw, style: str) -> list[float]:
    wanted = asked(FEW, seed=60_000)
    return [
        float(
            np.mean(
                [judges.look(each).style == style for each in draw(prompts(wanted), 70_000, style, scale)]
            )
        )
        for scale in (1, 0)
    ]


def inversion() -> list[float]:
    before = asked(FEW, seed=80_000)
    after = flux_world.recoloured(before)
    starts = [world.draw(scene(each, seed)) for seed, each in enumerate(before)]
    seen = judges.agreement(
        flux_world.inverted(prompts(after), starts, 90_000, reverse_guidance_end=2), after
    )
    return [seen["colour"], seen["shape"]]


def reference() -> list[float]:
    wanted = asked(FEW, seed=130_000)
    likes = [world.draw(scene(each, seed)) for seed, each in enumerate(wanted)]
    sums = []
    for strength in (0.65, 0):
        named = {"reference_image_url": "like", "reference_strength": strength}
        made = flux_world.shown("a shape", likes, 140_000, **named)
        sums.append(sum(judges.agreement(made, wanted).values()))
    return sums


def along_edges(prompts: Sequence[str], pictures: Sequence[Pixels], seed: int, scale: float) -> list[Pixels]:
    return sd_world.along_edges(prompts, pictures, seed, controlnet_conditioning_scale=scale)


def along(draw: Draw) -> Draw:
    """What reads edge maps, for pictures."""
    return lambda prompts, pictures, *more: draw(prompts, [*edges(np.stack(pictures))], *more)


FOLLOWERS: Mapping[str, Draw] = {
    "flux": along(flux_world.sketched),
    "sd15": along(sd_world.sketched),
    "sdxl": along_edges,
}


def edge_ious(follow: Draw) -> list[float]:
    wanted, pictures = asked(FEW, seed=100_000), scenes(FEW, seed=110_000)
    said = [f"a {each['colour']} shape on a {each['background']} background" for each in wanted]
    return [edge_iou(follow(said, pictures, 120_000, scale), pictures) for scale in (1, 0)]


if __name__ == "__main__":
    header()
    main()
