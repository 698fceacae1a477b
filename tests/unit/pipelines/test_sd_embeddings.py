"""Textual inversion files: every trainer's names are read, and what does not fit is refused with a reason."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from pipelines import zoo
from pipelines.sd import embeddings
from pipelines.sd.embeddings import MAX_VECTORS, TokenEmbedding
from pipelines.sd.parts import Parts
from pipelines.sd.text import encode
from schemas.errors import AssetError

WIDTH, SD2_WIDTH = 32, 48  # of the embedded encoders; both of SDXL's have the first
TOKENS = ("<s0>", "<s1>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def single(folder: Path, name: str) -> Parts:
    pipe = StableDiffusionPipeline.from_pretrained(zoo.locate(name, folder))
    return Parts("sd1", pipe.unet, pipe.vae, (pipe.tokenizer,), (pipe.text_encoder,), {})


@pytest.fixture(scope="module")
def sd1(folder: Path) -> Parts:
    return single(folder, "sd15")


@pytest.fixture(scope="module")
def sd2(folder: Path) -> Parts:
    return single(folder, "sd2")


@pytest.fixture(scope="module")
def sdxl_pipe(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(zoo.locate("sdxl", folder))


@pytest.fixture(scope="module")
def sdxl(sdxl_pipe: Any) -> Parts:
    pipe = sdxl_pipe
    tokenizers, encoders = (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2)
    return Parts("sdxl", pipe.unet, pipe.vae, tokenizers, encoders, {})


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[TokenEmbedding, ...]]:
    """Read the embeddings of a file with these tensors."""

    def read(
        parts: Parts, tensors: Mapping[str, Tensor], tokens: Sequence[str] = TOKENS
    ) -> tuple[TokenEmbedding, ...]:
        save_file(dict(tensors), tmp_path / "embedding")
        return embeddings.read(tmp_path / "embedding", tokens, parts)

    return read


Read = Callable[..., tuple[TokenEmbedding, ...]]


def rows(count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator("cpu").manual_seed(seed))


@pytest.mark.parametrize("key", ["clip_l", "text_encoders_0", "text_encoder", "emb_params", "*", "<cat-toy>"])
def test_a_vector_for_each_token(sd1: Parts, read: Read, key: str) -> None:
    vectors = rows(2)
    first, second = read(sd1, {key: vectors})
    assert (first.token, second.token) == TOKENS
    assert torch.equal(first.vectors[0], vectors[:1])
    assert torch.equal(second.vectors[0], vectors[1:])


@pytest.mark.parametrize(
    "keys",
    [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"), ("text_encoder", "text_encoder_2")],
)
def test_sdxl_takes_a_part_for_each_encoder(sdxl: Parts, read: Read, keys: tuple[str, str]) -> None:
    one, other = rows(2), rows(2, seed=1)
    for name, place in ((0, 0), (1, 1)):
        taught = read(sdxl, {keys[1]: other, keys[0]: one})[name]
        assert torch.equal(taught.vectors[0], one[place : place + 1])
        assert torch.equal(taught.vectors[1], other[place : place + 1])


@pytest.mark.parametrize("count", [1, 8, MAX_VECTORS])
def test_one_token_stands_for_all_vectors(sd1: Parts, read: Read, count: int) -> None:
    (only,) = read(sd1, {"emb_params": rows(count)}, ["<word>"])
    assert torch.equal(only.vectors[0], rows(count))


def test_a_vector_without_rows_is_one(sd1: Parts, read: Read) -> None:
    (only,) = read(sd1, {"<word>": rows(1)[0]}, ["<word>"])
    assert torch.equal(only.vectors[0], rows(1))


def test_vectors_come_in_the_encoders_dtype(sd1: Parts, read: Read) -> None:
    narrow = copy.deepcopy(sd1)
    narrow.text_encoders[0].to(torch.float16)
    taught = read(narrow, {"clip_l": rows(2).double()})
    assert {each.vectors[0].dtype for each in taught} == {torch.float16}
    with pytest.raises(AssetError, match="not finite"):
        read(narrow, {"clip_l": rows(2) * 1e6})


def test_a_file_reads_as_under_diffusers(sdxl: Parts, sdxl_pipe: Any, read: Read) -> None:
    file = {"clip_l": rows(2), "clip_g": rows(2, seed=1)}
    (ours,) = encode(sdxl, ["a <s0><s1> toy"], weighted=False, embeddings=read(sdxl, file))
    pipe = copy.deepcopy(sdxl_pipe)
    for key, second in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            file[key],
            token=[*TOKENS],
            tokenizer=getattr(pipe, f"tokenizer{second}"),
            text_encoder=getattr(pipe, f"text_encoder{second}"),
        )
    with torch.inference_mode():
        tokens, _, pooled, _ = pipe.encode_prompt("a <s0><s1> toy", device="cpu")
    torch.testing.assert_close(ours.tokens, tokens[0])
    torch.testing.assert_close(ours.pooled, pooled[0])


REFUSED: list[tuple[Mapping[str, Tensor], Sequence[str], str]] = [
    # the count
    ({"clip_l": rows(3)}, TOKENS, "vectors are 3, but the tokens are 2"),
    ({"clip_l": rows(1)}, TOKENS, "vectors are 1, but the tokens are 2"),
    ({"clip_l": rows(MAX_VECTORS + 1)}, ["<word>"], f"{MAX_VECTORS + 1} vectors; at most {MAX_VECTORS}"),
    # another model's
    ({"clip_l": rows(2, 1024)}, TOKENS, "made for another text encoder.* 1024 .* 32"),
    ({"clip_l": rows(2), "clip_g": rows(2, 1280)}, TOKENS, "made for SDXL: clip_g"),
    ({"clip_g": rows(2)}, TOKENS, "made for SDXL: clip_g"),
    # another thing
    ({"clip_l": rows(2), "t5": rows(2)}, TOKENS, "not a textual inversion embedding.* t5"),
    ({"clip_l": rows(2), "emb_params": rows(2)}, TOKENS, "not a textual inversion embedding"),
    ({"lora.down": rows(2), "lora.up": rows(2)}, TOKENS, "not a textual inversion embedding.* lora.down"),
    ({"clip_l": torch.ones(2, 2, WIDTH)}, TOKENS, r"clip_l has the shape \[2, 2, 32\]"),
    ({"clip_l": torch.tensor(1.0)}, TOKENS, r"clip_l has the shape \[\]"),
    ({"clip_l": rows(2) / 0}, TOKENS, "not finite numbers, in clip_l"),
    # no words
    ({"clip_l": rows(2)}, [], "1 to 75 tokens, not 0"),
    ({"clip_l": rows(2)}, [f"<s{number}>" for number in range(76)], "1 to 75 tokens, not 76"),
    ({"clip_l": rows(2)}, ["<s0>", ""], "'' cannot be a token"),
    ({"clip_l": rows(2)}, ["<s0>", "a b"], "'a b' cannot be a token"),
    ({"clip_l": rows(2)}, ["<s0>", "(word:2)"], "cannot be a token"),
    ({"clip_l": rows(2)}, ["<s0>", "word+"], "cannot be a token"),
    ({"clip_l": rows(2)}, ["<s0>", "w" * 65], "cannot be a token"),
    ({"clip_l": rows(2)}, ["<s0>", "<S0>"], "not all different"),
    ({"clip_l": rows(2)}, ["<s0>", "a"], "'a' is among the text encoder's own words"),
    ({"clip_l": rows(2)}, ["<s0>", "<|EndOfText|>"], "EndOfText.* is among"),
]


@pytest.mark.parametrize(("tensors", "tokens", "message"), REFUSED, ids=[each[2][:40] for each in REFUSED])
def test_what_does_not_fit_is_refused(
    sd1: Parts, read: Read, tensors: Mapping[str, Tensor], tokens: Sequence[str], message: str
) -> None:
    with pytest.raises(AssetError, match=message) as refusal:
        read(sd1, tensors, tokens)
    assert refusal.value.kind == "invalid_weights"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": rows(2)}, "lacks clip_g"),
        ({"<cat-toy>": rows(2)}, "has <cat-toy> and lacks clip_g"),
        ({"clip_g": rows(2)}, "lacks clip_l"),
        ({"clip_l": rows(2), "clip_g": rows(3)}, "clip_l, clip_g should hold equally many vectors, not 2, 3"),
        ({"clip_l": rows(2), "clip_g": rows(2, 1280)}, "vectors of clip_g have 1280 numbers"),
    ],
)
def test_sdxl_refuses_half_an_embedding(
    sdxl: Parts, read: Read, tensors: Mapping[str, Tensor], message: str
) -> None:
    with pytest.raises(AssetError, match=message):
        read(sdxl, tensors)


def test_each_kind_refuses_the_others(sd1: Parts, sd2: Parts, read: Read) -> None:
    assert read(sd2, {"clip_l": rows(2, SD2_WIDTH)})
    with pytest.raises(AssetError, match="have 48 numbers, this model's have 32"):
        read(sd1, {"clip_l": rows(2, SD2_WIDTH)})


def test_a_pickle_is_not_opened(sd1: Parts, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": rows(2)}}, tmp_path / "embedding.safetensors")
    with pytest.raises(AssetError, match="zip archive"):
        embeddings.read(tmp_path / "embedding.safetensors", TOKENS, sd1)
