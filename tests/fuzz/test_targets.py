"""What reads strangers' bytes, fed with bytes: each answers or refuses, and never in another way.

The files in tests/corpus/TARGET come first, then bytes made from them. `make fuzz` looks much longer, and
each time elsewhere. What it finds belongs into the corpus.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.files.fetch import decode_data_uri
from deployments.pictures import child
from deployments.pictures.decoders import Decoders
from pipelines.adapters import tensor_file
from pipelines.flux import controlnet_file as flux_nets
from pipelines.sd import controlnet_file as sd_nets
from schemas.errors import AssetError

CORPUS = Path(__file__).parents[1] / "corpus"
EXAMPLES = os.environ.get("DARKROOM_FUZZ")
LIMIT = 1000

fuzz = settings(
    max_examples=int(EXAMPLES or 100),
    suppress_health_check=list(HealthCheck),
)


def corpus(target: str) -> dict[str, bytes]:
    """The files by name."""
    found = {path.name: path.read_bytes() for path in sorted((CORPUS / target).iterdir())}
    assert found and max(map(len, found.values())) < 20_000
    return found


@st.composite
def changed(draw: st.DrawFn, target: str) -> bytes:
    """A file of the corpus with some of its bytes others, gone, doubled, or from another file."""
    files = list(corpus(target).values())
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 5))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 60])))
        other = draw(st.sampled_from(files))
        at = draw(st.integers(0, len(other)))
        pieces = st.one_of(
            st.binary(max_size=8),
            st.sampled_from(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", bytes(content[begin:end]) * 2]
            ),
            st.just(other[at : at + 30]),
        )
        content[begin:end] = draw(pieces)
    return bytes(content)


def read_uri(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        assert len(decode_data_uri(text, LIMIT)) <= LIMIT
    except AssetError as error:
        assert error.kind in ("file_download_error", "file_too_large") and len(error.message) < 300


def read_header(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    try:
        file = tensor_file.read(path)
        assert {name: tuple(tensor.shape) for name, tensor in file.load().items()} == file.shapes
    except AssetError as error:
        assert error.kind == "invalid_weights" and len(error.message) < 1500


def read_config(data: bytes) -> None:
    for reader in (flux_nets.read_config, sd_nets.read_config):
        try:
            reader(data)
        except AssetError as error:
            assert error.kind == "invalid_config" and len(error.message) < 300


class Looker:
    """Decodes pictures and notes whether a process had to be replaced."""

    def __init__(self) -> None:
        self.decoders = Decoders(1, time_s=120)

    def look(self, data: bytes) -> None:
        before = self.decoders.pids()
        try:
            picture = self.decoders._decode(data)
            assert 0 < picture.width * picture.height <= child.MAX_PIXELS and picture.mode == "RGB"
        except AssetError as error:
            assert error.kind in ("unsupported_image_format", "image_too_large", "image_load_error")
        assert self.decoders.pids() == before, "a file so small has ended the process"


@pytest.fixture(scope="module")
def looker() -> Iterator[Looker]:
    made = Looker()
    yield made
    made.decoders.close()


@pytest.mark.parametrize("name", corpus("data_uris"))
def test_t17_every_uri_of_the_corpus_is_read_or_refused(name: str) -> None:
    read_uri(corpus("data_uris")[name])


@given(st.one_of(changed("data_uris"), st.binary(max_size=200).map(lambda data: b"data:" + data)))
@fuzz
def test_t17_any_uri_is_read_or_refused(data: bytes) -> None:
    read_uri(data)


@pytest.mark.parametrize("name", corpus("pictures"))
def test_t15_every_picture_of_the_corpus_is_decoded_or_refused(name: str, looker: Looker) -> None:
    looker.look(corpus("pictures")[name])


@given(data=changed("pictures"))
@fuzz
def test_t15_any_picture_is_decoded_or_refused(data: bytes, looker: Looker) -> None:
    looker.look(data)


@pytest.mark.parametrize("name", corpus("safetensors"))
def test_t13_every_header_of_the_corpus_is_read_or_refused(name: str, tmp_path: Path) -> None:
    read_header(corpus("safetensors")[name], tmp_path / "any.safetensors")


@given(data=changed("safetensors"))
@fuzz
def test_t13_any_header_is_read_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    read_header(data, tmp_path_factory.getbasetemp() / "fuzzed.safetensors")


@pytest.mark.parametrize("name", corpus("configs"))
def test_t14_every_config_of_the_corpus_is_read_or_refused(name: str) -> None:
    read_config(corpus("configs")[name])


@given(data=changed("configs"))
@fuzz
def test_t14_any_config_is_read_or_refused(data: bytes) -> None:
    read_config(data)
