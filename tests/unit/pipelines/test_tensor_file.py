"""Files of tensors from strangers are refused in a sentence, quickly and in little memory, or load."""

import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorLimits, check_finite, listed
from schemas.errors import AssetError
from tests.support.tensor_attacks import LARGE, REFUSED, packed

MB = 1 << 20


def refuse(path: Path, content: bytes, sentence: str) -> None:
    path.write_bytes(content)
    start = time.thread_time()
    with pytest.raises(AssetError, match=sentence) as refusal:
        tensor_file.read(path)
    assert time.thread_time() - start < 20
    assert refusal.value.kind == "invalid_weights"
    assert len(refusal.value.message) < 1000
    assert refusal.value.message[-1] == "."


@pytest.mark.parametrize("kind", REFUSED)
def test_t13_a_bad_file_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    content, sentence = REFUSED[kind]
    refuse(tmp_path / "weights.safetensors", content, sentence)


@pytest.mark.parametrize("kind", LARGE)
def test_t13_a_large_header_is_refused_quickly_and_in_little_memory(kind: str, tmp_path: Path) -> None:
    build, sentence = LARGE[kind]
    path = tmp_path / "weights.safetensors"
    refuse(path, build(), sentence)

    tracemalloc.start()
    try:
        with pytest.raises(AssetError):
            tensor_file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * MB
    finally:
        tracemalloc.stop()


def test_a_good_file_loads_as_it_was_saved(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(2, 2, 1, 1).bfloat16(),
        "double": torch.randn(5).double(),
        "alpha": torch.tensor(4.0),
    }
    path = tmp_path / "named.bin"  # the content counts, not the name
    save_file(tensors, path, {"format": "pt", "tags": "ü", "long": "x" * 300_000})

    file = tensor_file.read(path)
    loaded = file.load()
    path.unlink()

    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert file.notes == {"format": "pt", "tags": "ü"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_limits_are_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, path)

    with pytest.raises(AssetError, match="more than 1 tensors"):
        tensor_file.read(path, limits=TensorLimits(tensors=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    tensors = {"good": torch.zeros(3), "bad": torch.tensor([1, value])}

    with pytest.raises(AssetError, match="not finite numbers, in bad"):
        check_finite(tensors)


def test_a_list_of_names_stops_at_five() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


SMALL = save({"a": torch.ones(2), "b": torch.ones(2, 2).half()}, {"format": "pt"})


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A good file with a few bytes changed, most of them in the header, or with the header's text edited."""
    content = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1))
        piece = draw(
            st.sampled_from([b"{", b"}", b"[", b'"', b",", b"9", b"-1", b"\\", b"\xff", b"", b"\x00"])
        )
        content[at : at + draw(st.integers(0, 4))] = piece
    if draw(st.booleans()) and len(content) > 8:  # as long as the header now is
        content[:8] = max(0, content.rfind(b"}") - 7).to_bytes(8, "little")
    return bytes(content)


@given(st.one_of(mutations(), st.binary(max_size=300), st.binary(max_size=200).map(packed)))
@example(SMALL)
@settings(max_examples=400)
def test_t13_any_bytes_are_refused_or_load(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        file = tensor_file.read(path)
        assert {name: tuple(tensor.shape) for name, tensor in file.load().items()} == file.shapes
    except AssetError as error:
        assert error.kind == "invalid_weights"


def test_a_file_that_is_cut_off_after_it_was_looked_at_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.randn(100)}, path)
    file = tensor_file.read(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AssetError, match="not a valid safetensors file"):
        file.load()
