"""Control LoRAs: the ordinary transformer under them answers as diffusers' widened one.

The transformers run in double precision here, so that a difference is one of meaning, not of rounding.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from pipelines.adapters import lora
from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.adapters.norms import Norms
from pipelines.flux import lora_keys
from pipelines.flux.lora_keys import WIDE
from tests.support import lora_files
from tests.support.lora_files import SPELLINGS, Shapes, Spelling

PROJ_OUT = "transformer.proj_out"

# The spellings that control LoRAs may come in: Black Forest Labs', bare or with a prefix, and diffusers'.
KINDS = ["original", "ComfyUI", "peft, original names", "diffusers", "diffusers, without transformer", "peft"]


@dataclass(frozen=True)
class Model:
    """What a transformer has places for."""

    shapes: Shapes
    norms: dict[str, int]

    @classmethod
    def of(cls, transformer: Any) -> "Model":
        nothing = nn.Module()
        return cls(lora_keys.targets(transformer, nothing, nothing), dict(lora_keys.norms(transformer)))

    @property
    def wide_shapes(self) -> Shapes:
        rows, columns = self.shapes[WIDE]
        return {**self.shapes, WIDE: (rows, 2 * columns)}

    def load(self, path: Path) -> Lora:
        translate = lora_keys.translator(self.shapes, self.norms)
        return lora.load(path, translate, self.shapes, norms=self.norms, wide=WIDE)


@dataclass(frozen=True)
class ControlLora:
    """One before it is written."""

    layers: dict[str, LoraLayer]
    norms: dict[str, Tensor]

    @classmethod
    def draw(cls, model: Model) -> "ControlLora":
        """A bias on every layer; the last has a smaller rank, as in the files of Black Forest Labs."""
        layers = lora_files.draw(model.wide_shapes, biased=True)
        last = layers[PROJ_OUT]
        layers[PROJ_OUT] = LoraLayer(last.down[:2], last.up[:, :2], last.bias)
        return cls(layers, lora_files.draw_norms(model.norms))

    def write(self, path: Path, spelling: Spelling, *, with_norms: bool = True) -> Path:
        return lora_files.write(path, spelling, self.layers, self.norms if with_norms else {})


@pytest.fixture(scope="module")
def model(stock: Any) -> Model:
    return Model.of(stock.transformer)


@pytest.fixture(scope="module")
def base(stock: Any) -> Any:
    return copy.deepcopy(stock.transformer).double()


@pytest.fixture(scope="module")
def drawn(model: Model) -> ControlLora:
    return ControlLora.draw(model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_loads_to_the_same_control_lora(
    kind: str, model: Model, drawn: ControlLora, tmp_path: Path
) -> None:
    loaded = model.load(drawn.write(tmp_path / "a", SPELLINGS[kind]))

    expected = {
        name: lora_files.scaled(layer, lora_files.ALPHA / layer.rank) for name, layer in drawn.layers.items()
    }
    assert loaded.control is not None
    assert torch.equal(torch.cat([loaded.layers[WIDE].down, loaded.control.down], 1), expected[WIDE].down)
    assert torch.equal(loaded.control.up, expected[WIDE].up) and loaded.control.bias is None
    assert loaded.layers.keys() == model.shapes.keys()
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.up, expected[name].up)
        assert torch.equal(present(layer.bias), present(expected[name].bias))
        assert name == WIDE or torch.equal(layer.down, expected[name].down)
    assert loaded.norms.keys() == drawn.norms.keys()
    assert all(torch.equal(weight, drawn.norms[name]) for name, weight in loaded.norms.items())
    up, norms = expected[WIDE].up.nbytes, sum(weight.nbytes for weight in drawn.norms.values())
    assert loaded.nbytes == sum(layer.nbytes for layer in expected.values()) + up + norms


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def test_a_plain_lora_reads_no_control_image(model: Model, tmp_path: Path) -> None:
    loaded = model.load(
        lora_files.write(tmp_path / "a", SPELLINGS["original"], lora_files.draw(model.shapes))
    )

    assert loaded.control is None and not loaded.norms


def test_a_full_size_file_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    """diffusers converts Black Forest Labs' names for the sizes of FLUX.1-dev only."""
    with torch.device("meta"):
        model = Model.of(FluxTransformer2DModel(guidance_embeds=True))
    layers = lora_files.draw(model.wide_shapes, rank=2, biased=True)
    path = ControlLora(layers, lora_files.draw_norms(model.norms)).write(
        tmp_path / "a.safetensors", SPELLINGS["original"]
    )

    ours = model.load(path)
    theirs = FluxPipeline.lora_state_dict(str(tmp_path), weight_name=path.name, local_files_only=True)

    tensors = {f"{name}.weight": weight for name, weight in ours.norms.items()}
    for name, layer in ours.layers.items():
        halves = [layer.down] if name != WIDE or ours.control is None else [layer.down, ours.control.down]
        tensors[f"{name}.lora_A.weight"] = torch.cat(halves, 1)
        tensors |= {f"{name}.lora_B.weight": layer.up, f"{name}.lora_B.bias": present(layer.bias)}
    assert tensors.keys() == theirs.keys()
    # diffusers 0.42.1 swaps the halves of down's ranks there, as if they were up's rows, and so pairs
    # each rank with another one's rows
    assert different(tensors, theirs) == ["transformer.norm_out.linear.lora_A.weight"]
    assert torch.equal(
        ours.layers["transformer.norm_out.linear"].down, layers["transformer.norm_out.linear"].down
    )


def different(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


@dataclass(frozen=True)
class Wish:
    """What one row of a batch asks for."""

    uses: Sequence[LoraUse] = ()
    norms: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None


class Transformer:
    """The tiny FLUX as it was loaded, with what stands beside it."""

    def __init__(self, transformer: Any, model: Model, loras: dict[str, Lora]) -> None:
        self._transformer = copy.deepcopy(transformer)
        self._bank = LoraBank({name: self._module(name) for name in model.shapes}, rank=16)
        self._norms = Norms({name: self._module(name) for name in model.norms})
        self._bank.hold(loras)

    def _module(self, name: str) -> Any:
        return self._transformer.get_submodule(name.removeprefix("transformer."))

    def __call__(self, tokens: Tensor, rows: Sequence[Wish]) -> Tensor:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            embeddings = [0 if row.embedding is None else row.embedding for row in rows]
            return torch.stack([each + extra for each, extra in zip(output, embeddings, strict=True)])

        hook = self._transformer.x_embedder.register_forward_hook(add)
        with self._bank.rows([row.uses for row in rows]), self._norms.rows([row.norms for row in rows]):
            out = answer(self._transformer, tokens)
        hook.remove()
        return out


@torch.inference_mode()
def answer(transformer: Any, tokens: Tensor) -> Tensor:
    rows = len(tokens)
    generator = torch.Generator("cpu").manual_seed(5)
    out: Tensor = transformer(
        hidden_states=tokens,
        encoder_hidden_states=torch.randn(1, 4, 32, generator=generator).double().expand(rows, -1, -1),
        pooled_projections=torch.randn(1, 32, generator=generator).double().expand(rows, -1),
        timestep=torch.full([rows], 0.5).double(),
        guidance=torch.full([rows], 3.5).double(),
        txt_ids=torch.zeros(4, 3),
        img_ids=torch.zeros(tokens.shape[1], 3),
        return_dict=False,
    )[0]
    return out


def tokens(seed: int, rows: int = 1) -> Tensor:
    """Of latents or of a control image."""
    return torch.randn(rows, 6, 64, generator=torch.Generator("cpu").manual_seed(seed)).double()


@pytest.fixture(scope="module")
def widened(stock: Any) -> Callable[[Path, float], Any]:
    """diffusers' own transformer with a file loaded at a scale."""
    pytest.importorskip("peft")
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {name: getattr(stock, name) for name in names}

    def load(path: Path, scale: float) -> Any:
        pipe = FluxControlPipeline(**parts, transformer=copy.deepcopy(stock.transformer))
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="control")
        pipe.set_adapters(["control"], [scale])
        return pipe.transformer.double()

    return load


@pytest.mark.parametrize("scale", [1, 0.7, -0.5])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("kind", ["original", "diffusers"])
def test_the_transformer_answers_as_diffusers_widened_one(
    kind: str,
    with_norms: bool,
    scale: float,
    base: Any,
    model: Model,
    drawn: ControlLora,
    widened: Callable[[Path, float], Any],
    tmp_path: Path,
) -> None:
    x, c = tokens(1), tokens(2)
    path = drawn.write(tmp_path / "theirs.safetensors", SPELLINGS["diffusers"], with_norms=with_norms)
    theirs = answer(widened(path, scale), torch.cat([x, c], -1))

    control = model.load(drawn.write(tmp_path / "ours", SPELLINGS[kind], with_norms=with_norms))
    wish = Wish([LoraUse("control", scale)], dict(control.norms), control.control_embedding(c[0], scale))
    ours = Transformer(base, model, {"control": control})(x, [wish])

    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # the bank keeps scales in 32 bits
    assert (ours - answer(base, x)).abs().max() > 0.01


def test_the_embedding_is_linear_in_the_control_image_and_the_scale(
    model: Model, drawn: ControlLora, tmp_path: Path
) -> None:
    control = model.load(drawn.write(tmp_path / "a", SPELLINGS["original"]))
    assert not control.control_embedding(tokens(2)[0], 0).any()
    one, other = (control.control_embedding(tokens(seed)[0], 0.7) for seed in (2, 3))
    both = control.control_embedding(tokens(2)[0] + tokens(3)[0], 0.7)
    torch.testing.assert_close(one + other, both)
    assert control.control_embedding(tokens(2)[0].bfloat16(), 1).dtype == torch.bfloat16


def test_a_batch_with_one_control_lora_equals_separate_runs(
    base: Any, model: Model, drawn: ControlLora, tmp_path: Path
) -> None:
    control = model.load(drawn.write(tmp_path / "control", SPELLINGS["original"]))
    plain_layers = lora_files.draw(model.shapes, rank=3)
    plain = model.load(lora_files.write(tmp_path / "plain", SPELLINGS["diffusers"], plain_layers))
    transformer = Transformer(base, model, {"control": control, "plain": plain})
    embedding = control.control_embedding(tokens(2)[0], 0.7)
    rows = [
        Wish([LoraUse("control", 0.7)], dict(control.norms), embedding),
        Wish([LoraUse("plain", -0.5)]),
        Wish(),
        Wish([LoraUse("plain", 1.0), LoraUse("control", 0.7)], dict(control.norms), embedding),
    ]
    x = tokens(1, rows=len(rows))

    together = transformer(x, rows)

    apart = torch.cat([transformer(x[row : row + 1], [wish]) for row, wish in enumerate(rows)])
    torch.testing.assert_close(together, apart, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(together[2:3], answer(base, x[2:3]), atol=1e-9, rtol=1e-9)
