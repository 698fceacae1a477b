"""Redux's tokens are diffusers', an average over pictures, and as wide as the base model's."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from PIL.Image import Image as Picture
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from pipelines import zoo
from pipelines.flux.redux import Redux


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.locate("flux-redux", tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def redux(folder: Path) -> Redux:
    return Redux.load(folder, "cpu", torch.float32, text_width=32)


def noise(seed: int, width: int = 96, height: int = 64) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [
    noise(1),
    Image.new("RGB", (40, 90), "red"),
    Image.linear_gradient("L").convert("RGB"),
]


@pytest.fixture(scope="module")
def prior(folder: Path, stock: Any) -> Any:
    """diffusers' own Redux on the same weights, with the embedded FLUX's text encoders."""
    return FluxPriorReduxPipeline.from_pretrained(
        folder,
        text_encoder=stock.text_encoder,
        tokenizer=stock.tokenizer,
        text_encoder_2=stock.text_encoder_2,
        tokenizer_2=stock.tokenizer_2,
    )


@torch.inference_mode()
def encode(stock: Any, prompt: str, length: int = 32) -> tuple[Tensor, Tensor]:
    """T5's tokens [1, length, 32] and CLIP's pooled embedding [1, 32]."""
    tokens, pooled, _ = stock.encode_prompt(prompt, None, max_sequence_length=length)
    return tokens, pooled


@pytest.mark.parametrize("count", [1, 2, 3])
def test_diffusers_appends_the_same_tokens_to_the_prompts(
    redux: Redux, prior: Any, stock: Any, count: int
) -> None:
    pictures = PICTURES[:count]
    shares = [1 / count] * count
    theirs = prior(pictures, "a red fox", prompt_embeds_scale=shares, pooled_prompt_embeds_scale=shares)

    text, pooled = encode(stock, "a red fox", 512)
    assert_close(torch.cat([text[0], redux.tokens(pictures)]), theirs.prompt_embeds[0])
    assert_close(pooled, theirs.pooled_prompt_embeds)  # which pictures leave alone


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_given_twice_counts_once(redux: Redux, picture: Picture) -> None:
    assert torch.equal(redux.tokens([picture, picture]), redux.tokens([picture]))


def test_several_pictures_are_averaged_in_any_order(redux: Redux) -> None:
    mean = torch.stack([redux.tokens([picture]) for picture in PICTURES]).mean(0)

    assert_close(redux.tokens(PICTURES), mean)
    assert_close(redux.tokens(PICTURES[::-1]), mean)


def test_other_pictures_make_other_tokens(redux: Redux) -> None:
    red, gradient, noisy = (redux.tokens([picture]) for picture in PICTURES)

    for one, other in [(red, gradient), (gradient, noisy), (noisy, red)]:
        assert rms(one - other) > 0.5


def test_patches_keep_their_places(redux: Redux) -> None:
    half = Image.new("RGB", (64, 64), "white")
    half.paste("black", (0, 32, 64, 64))
    rows = redux.tokens([half]).reshape(4, 4, 32)

    assert rms(rows[0] - rows[3]) > rms(rows[0] - rows[1])


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 500), (2000, 3), (384, 384)])
def test_a_picture_of_any_size_makes_as_many_tokens(redux: Redux, size: tuple[int, int]) -> None:
    tokens = redux.tokens([noise(5, *size)])

    assert tokens.shape == (16, 32)
    assert tokens.isfinite().all()


def test_the_tokens_come_in_the_models_dtype_and_no_graph_behind_them(folder: Path, redux: Redux) -> None:
    coarse = Redux.load(folder, "cpu", torch.bfloat16, text_width=32).tokens(PICTURES)

    assert coarse.dtype == torch.bfloat16
    assert not coarse.requires_grad
    assert rms(coarse.float() - redux.tokens(PICTURES)) < 0.02


def test_a_redux_of_another_width_than_the_base_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="tokens 32 wide, the base model's are 4096 wide"):
        Redux.load(folder, "cpu", torch.float32, text_width=4096)


def test_weights_named_as_in_the_published_files_are_read(folder: Path, redux: Redux, tmp_path: Path) -> None:
    """transformers wrote `vision_model.` before every name of a SigLIP when Redux came out."""
    published = shutil.copytree(folder, tmp_path / "redux")
    file = published / "image_encoder" / "model.safetensors"
    weights = {f"vision_model.{name}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    again = Redux.load(published, "cpu", torch.float32, text_width=32)

    assert torch.equal(again.tokens(PICTURES), redux.tokens(PICTURES))


def test_the_embedded_tokens_are_as_loud_as_t5s(redux: Redux, stock: Any) -> None:
    text, _ = encode(stock, "a red fox")

    for picture in PICTURES:
        assert 0.5 < rms(redux.tokens([picture])) / rms(text) < 2


def test_the_embedded_tokens_change_what_the_embedded_flux_draws(redux: Redux, stock: Any) -> None:
    text, pooled = encode(stock, "a red fox")

    def draw(*pictures: Picture) -> Tensor:
        """[64, 64, 3] in [0, 255]."""
        images = [redux.tokens([picture])[None] for picture in pictures]
        drawn = stock(
            prompt_embeds=torch.cat([text, *images], 1),
            pooled_prompt_embeds=pooled,
            width=64,
            height=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images[0]
        return torch.from_numpy(drawn) * 255

    noisy, red, _ = PICTURES
    for one, other in [(draw(), draw(noisy)), (draw(), draw(red)), (draw(noisy), draw(red))]:
        assert (one - other).abs().mean() > 2


def test_flux_redux_dev_makes_729_tokens_4096_wide() -> None:
    """google/siglip-so400m-patch14-384 and the sizes of FLUX.1-Redux-dev, on the meta device."""
    config = SiglipVisionConfig(
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=27,
    )
    with torch.device("meta"):
        encoder = SiglipVisionModel(config).to(torch.bfloat16)
        embedder = ReduxImageEncoder(redux_dim=1152, txt_in_features=4096).to(torch.bfloat16)
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    tokens = Redux(encoder, processor, embedder).tokens(PICTURES)

    assert tokens.shape == (729, 4096)
    assert tokens.dtype == torch.bfloat16
    assert tokens.is_meta


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
