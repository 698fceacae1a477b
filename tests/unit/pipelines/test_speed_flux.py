"""FLUX made fast gives the pictures that it gives by itself: alone, in mixed batches, with LoRAs."""

import logging
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipelines.adapters.bank import LoraUse
from pipelines.base import Assets
from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample
from pipelines.flux import flux_lora_image_to_image
from pipelines.flux.first_block import begin, end, others
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from pipelines.flux.plan import Adapters, Conditioning, Denoising, FluxPlan
from pipelines.flux.sampling import Grid, draw_noise, schedule
from pipelines.speed import regions
from pipelines.speed.regions import graphs
from schemas.endpoints.flux_dev import Input
from schemas.endpoints.flux_lora_image_to_image import Input as EditInput
from schemas.settings import ModelSettings, PictureSize, SpeedSettings
from tests.support.engine import run_to_end
from tests.support.loras import write_lora

TEXT = 32
TOLERANCE = 1e-5  # float32; the order of sums differs
SIZE = PictureSize(width=80, height=64)


def load(folder: Path, **speed: Any) -> FluxModel:
    options = ModelSettings(
        model=str(folder),
        endpoints=("any",),
        max_sequence_length=TEXT,
        lora_rank=16,
        speed=SpeedSettings(sizes=(SIZE,), rows=(1, 2), cache=str(folder / "compiled"), **speed),
    )
    return FluxModel.load(options, Path)


@pytest.fixture(scope="module")
def compiled(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FluxModel:
    """Warm, with graphs that torch runs as they are: tested is what they hold, and when they are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setattr(regions, "BACKEND", "eager")
        model = load(flux_folder, compile="regional", attention="auto")
        model.warm()
    return model


@pytest.fixture(scope="module")
def plain(flux_folder: Path) -> FluxModel:
    return load(flux_folder)


def sample(
    seed: int,
    *,
    side: int = 4,
    steps: int = 3,
    loras: tuple[LoraUse, ...] = (),
    reuse: float | None = None,
) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    text = Conditioning(torch.randn(TEXT, 32, generator=draw), torch.randn(32, generator=draw))
    grid = Grid(side, 5)
    leg = Denoising(text, schedule(steps, 0.8), 3.5, Adapters(loras), reuse=reuse)
    return Sample(str(seed), FluxPlan(grid, leg), draw_noise(grid, seed))


def predict(model: FluxModel, *samples: Sample) -> Tensor:
    with torch.inference_mode():
        return torch.stack(list(model.predict(samples)))


def hold(model: FluxModel, tmp_path: Path) -> list[str]:
    """Two LoRAs of different ranks beside the model, for good; their names."""
    names = []
    for seed, rank in enumerate((4, 9)):
        path = write_lora(model, tmp_path / f"lora-{seed}", seed, rank)
        model.holding({path.name: model.read_lora(path)}).__enter__()
        names.append(path.name)
    return names


def test_compiled_blocks_give_what_they_give_by_themselves_and_wait_for_no_graph(
    compiled: FluxModel, plain: FluxModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model in (compiled, plain):
        a, b = hold(model, tmp_path)
    before = graphs()
    batches = [
        [sample(0)],
        [sample(1, side=7), sample(2, side=7)],
        [sample(3, loras=(LoraUse(a),))],
        [sample(4, side=6), sample(5, side=6, loras=(LoraUse(b, 0.5),)), sample(6, side=6)],
        [sample(seed, side=3, loras=(LoraUse(a), LoraUse(b, 2.0))[: seed - 6]) for seed in (7, 8, 9, 6)],
    ]

    def check() -> None:
        for batch in batches:
            torch.testing.assert_close(
                predict(compiled, *batch), predict(plain, *batch), atol=TOLERANCE, rtol=TOLERANCE
            )

    with caplog.at_level(logging.WARNING, "pipelines.speed"):
        check()
        thread = Thread(target=check)  # the engine's is another than the one that warms
        thread.start()
        thread.join()
    assert graphs() == before
    assert not [each for each in caplog.records if each.name.startswith("pipelines")]


def test_what_graphs_do_not_know_runs_as_it_is(compiled: FluxModel, plain: FluxModel, tmp_path: Path) -> None:
    for model in (compiled, plain):
        a, _ = hold(model, tmp_path)
    layer = next(name for name in compiled.targets if name.endswith("transformer_blocks.0.attn.to_q"))
    batch = [sample(0, loras=(LoraUse(a, 1.0, {layer: 0.25}),)), sample(1)]
    before = graphs()
    torch.testing.assert_close(predict(compiled, *batch), predict(plain, *batch), atol=0, rtol=0)
    assert graphs() == before


def test_it_says_how_it_runs(compiled: FluxModel, plain: FluxModel) -> None:
    assert compiled.attention in ("sdpa (flash)", "sdpa (math)")
    assert plain.attention == "sdpa"
    assert (plain.precision, plain.float8_layers) == (None, 0)


# acceleration


def finished(model: FluxModel, *samples: Sample) -> list[Tensor]:
    run_to_end(Engine(model.predict, 1 << 20), samples)
    return [each.latents for each in samples]


def psnr(ours: Tensor, expected: Tensor) -> float:
    """Decibels, over the range of the expected."""
    span = float(expected.max() - expected.min())
    return float(10 * torch.log10(span**2 / (ours - expected).square().mean()))


def test_reuse_at_threshold_zero_is_the_whole_forward_to_the_bit(plain: FluxModel) -> None:
    whole, split = sample(0, steps=6), sample(0, steps=6, reuse=0.0)
    assert torch.equal(*finished(plain, whole), *finished(plain, split))
    assert split.reused == frozenset()


def test_reuse_skips_and_stays_near(plain: FluxModel) -> None:
    whole, near, far = (sample(0, steps=12, reuse=each) for each in (0.0, 0.1, 0.5))
    [expected], [ours], [coarse] = (finished(plain, each) for each in (whole, near, far))
    assert 0 < len(near.reused) < len(far.reused) < 12
    assert psnr(ours, expected) > 30
    assert psnr(coarse, expected) > 15


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(2, 9), st.sampled_from([None, 0.0, 0.05, 0.3, 2.0])), min_size=2, max_size=4
    )
)
@example([(6, 0.05), (6, 2.0), (4, None)])
def test_a_row_that_reuses_is_the_same_alone_and_in_any_company(
    plain: FluxModel, wishes: list[tuple[int, float | None]]
) -> None:
    def make() -> list[Sample]:
        return [sample(seed, steps=steps, reuse=threshold) for seed, (steps, threshold) in enumerate(wishes)]

    alone, together = make(), make()
    expected = [finished(plain, each)[0] for each in alone]
    for ours, theirs in zip(finished(plain, *together), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert [each.reused for each in together] == [each.reused for each in alone]


def test_rows_that_reuse_run_compiled_beside_others_with_loras(
    compiled: FluxModel, plain: FluxModel, tmp_path: Path
) -> None:
    for model in (compiled, plain):
        a, b = hold(model, tmp_path)

    def batch() -> list[Sample]:
        return [
            sample(0, steps=5, reuse=0.3, loras=(LoraUse(a),)),
            sample(1, steps=5),
            sample(2, steps=5, reuse=1e3, loras=(LoraUse(b, 0.5),)),
        ]

    ours, theirs = batch(), batch()
    for one, other in zip(finished(compiled, *ours), finished(plain, *theirs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [each.reused for each in ours] == [each.reused for each in theirs]
    assert len(ours[2].reused) == 4


def test_a_step_that_runs_again_does_not_reuse_itself(plain: FluxModel) -> None:
    one = sample(0, steps=4, reuse=2.0)
    first = predict(plain, one)
    assert torch.equal(predict(plain, one), first)
    assert one.reused == frozenset()


@pytest.mark.parametrize(("acceleration", "threshold"), [("none", None), ("regular", 0.08), ("high", 0.15)])
def test_requests_are_accelerated_only_where_the_operator_says_so(
    flux_folder: Path, acceleration: str, threshold: float | None
) -> None:
    model = load(flux_folder, acceleration=acceleration)
    wish: dict[str, Any] = {"prompt": "a", "image_size": {"width": 64, "height": 64}, "seed": 1}
    [made] = Pipeline(model).prepare(Input.model_validate(wish), Assets(), 0).samples
    edit = EditInput.model_validate(wish | {"image_url": "http://pictures/start.png", "strength": 1})
    assets = Assets({("body", "image_url"): Image.new("RGB", (64, 64), "navy")})
    [remade] = flux_lora_image_to_image.Pipeline(model).prepare(edit, assets, 0).samples
    for each in (made, remade):
        assert isinstance(each.plan, FluxPlan)
        assert each.plan.row(0).reuse == threshold


def test_the_parts_of_a_forward_with_controls_are_the_whole_for_some_rows_as_for_all(
    plain: FluxModel,
) -> None:
    transformer = plain._parts.transformer
    counts = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    grid, draw = Grid(4, 5), torch.Generator().manual_seed(0)
    plans = [sample(seed).plan for seed in range(3)]
    rows = [each.row(0) for each in plans if isinstance(each, FluxPlan)]
    with torch.inference_mode():
        inputs = plain._transformer._inputs(rows, [draw_noise(grid, seed) for seed in range(3)], grid)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        blocks, singles = (
            [torch.randn(3, grid.tokens, width, generator=draw) for _ in range(count)] for count in counts
        )
        [expected] = transformer(
            **inputs,
            controlnet_block_samples=blocks,
            controlnet_single_block_samples=singles,
            return_dict=False,
        )
        under, _ = begin(transformer, inputs, blocks)
        for some in ([0, 1, 2], [2, 0]):
            image = others(transformer, under, some, blocks, singles)
            ours = end(transformer, image, under.time[some])
            torch.testing.assert_close(ours, expected[some], atol=TOLERANCE, rtol=TOLERANCE)
