"""The training of the embedded models: it can be interrupted, and what it relies on holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines import zoo
from pipelines.zoo.training import flux, lora, stable_diffusion, workshop
from pipelines.zoo.training.loop import Draw, Job, fit
from pipelines.zoo.training.muon import orthogonal


def silent(name: str, done: int, total: int) -> None:
    pass


def job(stop_at: int | None = None) -> Job:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(draw: Draw) -> Tensor:
        if draw.step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 4, generator=draw.torch)
        lost: Tensor = (model(inputs)[:, 0] - inputs.sum(1)).square().mean()
        return lost

    return Job("toy", model, loss, steps=30, warm_up=2)


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = fit(job(), tmp_path / "whole", silent)
    with pytest.raises(KeyboardInterrupt):
        fit(job(stop_at=17), tmp_path / "parts", silent, checkpoint_s=0)
    steps: list[int] = []
    resumed = fit(job(), tmp_path / "parts", lambda name, done, total: steps.append(done))

    assert steps == list(range(18, 31))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_training_lowers_its_loss(tmp_path: Path) -> None:
    losses = []
    toy = job()
    for steps in (1, 200):
        trained = fit(Job("toy", toy.model, toy.loss, steps), tmp_path / str(steps), silent)
        inputs = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
        losses.append(float((trained(inputs)[:, 0] - inputs.sum(1)).square().mean().detach()))

    assert losses[1] < losses[0] / 2


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_muons_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_one_token_with_a_weight_stands_for_many_alike() -> None:
    """What lets FLUX be trained at 24 tokens for prompts of 512."""
    transformer = flux.make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        transformer.proj_out.weight.normal_(generator=generator)
    noisy = torch.randn(2, 16, 64, generator=generator)
    tokens = torch.randn(2, 5, 64, generator=generator)
    pooled = torch.randn(2, 64, generator=generator)
    sigma, guidance = torch.tensor([0.9, 0.3]), torch.tensor([3.5, 1.0])
    padding = tokens[:, -1:].expand(-1, 100, -1)

    with torch.no_grad():
        one = flux.Said(tokens, torch.tensor([101.0, 101.0]), pooled)
        few = flux.velocity(transformer, noisy, sigma, one, guidance)
        written_out = flux.Said(torch.cat([tokens, padding], 1), torch.ones(2), pooled)
        many = flux.velocity(transformer, noisy, sigma, written_out, guidance)

    assert (few - many).abs().max() < 1e-4 * many.abs().max()


def test_guidance_is_no_guidance_at_1_and_grows() -> None:
    scales = flux.strength(torch.tensor([0.0, 1.0, 3.5, 8.0]))

    assert scales[1] == 1
    assert (scales.diff() > 0).all()


def test_xl_begins_as_its_elder() -> None:
    elder, younger = stable_diffusion.make("sd15"), stable_diffusion.make("sdxl")
    with torch.no_grad():
        for weight in elder.parameters():
            weight.normal_()
    stable_diffusion.begin_as(younger, elder)

    assert torch.equal(younger.conv_in.weight, elder.conv_in.weight)
    ours, theirs = (unet.mid_block.attentions[0] for unet in (younger, elder))
    assert torch.equal(ours.proj_in.weight, theirs.proj_in.weight[:, :, 0, 0])
    to_k = [each.transformer_blocks[0].attn2.to_k.weight for each in (ours, theirs)]
    assert torch.equal(to_k[0][:, : to_k[1].shape[1]], to_k[1])


def test_a_lora_does_nothing_before_it_is_trained_and_is_named_as_peft_does() -> None:
    torch.manual_seed(1)
    resnets = nn.ModuleDict({"conv1": nn.Conv2d(6, 3, 3, stride=2)})
    layers = {"attn": nn.Linear(6, 3), "norm": nn.Linear(6, 3), "resnets": resnets}
    model = nn.ModuleDict({"block": nn.ModuleDict(layers)})
    inputs = {"block.attn": torch.randn(2, 6), "block.resnets.conv1": torch.randn(2, 6, 8, 8)}
    before = {path: model.get_submodule(path)(each) for path, each in inputs.items()}
    pairs = lora.LowRank(model, lora.wanted, rank=2)

    assert all(torch.equal(model.get_submodule(path)(each), before[path]) for path, each in inputs.items())
    shapes = {name: tuple(each.shape) for name, each in pairs.tensors("unet").items()}
    assert shapes == {
        "unet.block.attn.lora_A.weight": (2, 6),
        "unet.block.attn.lora_B.weight": (3, 2),
        "unet.block.resnets.conv1.lora_A.weight": (2, 6, 3, 3),
        "unet.block.resnets.conv1.lora_B.weight": (3, 2, 1, 1),
    }


def test_a_build_replaces_a_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workshop.STEPS, "checker", 2)
    (tmp_path / "into" / "world-safety-checker").mkdir(parents=True)
    (tmp_path / "into" / "world-safety-checker" / "old").touch()
    made = zoo.train(["world-safety-checker"], silent, checkpoints=tmp_path / "ck", into=tmp_path / "into")

    assert made == [tmp_path / "into" / "world-safety-checker"]
    assert sorted(each.name for each in made[0].iterdir()) == ["feature_extractor", "safety_checker"]
    tensors = load_file(made[0] / "safety_checker" / "model.safetensors")
    assert {each.dtype for each in tensors.values() if each.is_floating_point()} == {torch.float16}


def test_what_is_not_trained_is_told_what_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'flux'; known: flux-world, "):
        zoo.train(["flux"], silent, checkpoints=tmp_path, into=tmp_path)
