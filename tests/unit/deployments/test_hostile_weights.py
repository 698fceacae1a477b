"""Weights files made to harm: no file's code is run, and what a URL led to once is kept by its content."""

import asyncio
import hashlib
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError
from tests.support import gadgets
from tests.support.hub import Hub, listing, serving
from tests.unit.deployments.places import BASE, Place, fails, get, name_of, read, safetensors

KINDS = [kind for kind in AssetKind if kind.is_weights]
NAMES = sorted(gadgets.files(Path("canary")))
# These pass for safetensors until their tensors are looked at, which the pipelines' tests show.
BEGIN_WELL = {
    name for name in NAMES if name.split(".")[0] in ("braces", "after", "zip_after", "gap", "object", "notes")
}


# -- row 12 of the threat model: what a pickle would run


@pytest.mark.parametrize("kind", KINDS)
async def test_t12_no_downloaded_file_is_unpickled(kind: AssetKind, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = gadgets.files(canary)
    assert len(files) >= 30
    async with serving() as hub:
        place = Place(tmp_path, hub.url)
        weights = place.open()
        with gadgets.unpickled() as seen:
            for name, data in files.items():
                hub.files[f"/{name}"] = data
                key = await place.files.save(data, "image/png")
                for source in (f"{hub.url}/{name}", f"{BASE}/files/{key}"):
                    if name in BEGIN_WELL:
                        assert await read(weights, Asset(kind, source)) == data
                    else:
                        failed = await fails(weights, Asset(kind, source), "must be a safetensors file")
                        assert len(failed.message) < 200
        assert place.kept() == {name_of(files[name]) for name in BEGIN_WELL}
        assert place.kept(".part") == set()
    assert seen == [] and not canary.exists()


@pytest.mark.parametrize("kind", KINDS)
async def test_t12_no_repositorys_file_is_unpickled(kind: AssetKind, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    made = gadgets.files(canary)
    pickles = {name: data for name, data in made.items() if not name.endswith(".safetensors")}
    async with serving() as hub:
        weights = Place(tmp_path, hub.url).open()
        usual = ("unet/diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "learned_embeds.pt")
        hub.put_files("ann/usual", dict.fromkeys(usual, pickles["model.pt"]))
        hub.put_files("ann/config", dict.fromkeys((*usual, "config.json", "unet/config.json"), b"\x80"))
        with gadgets.unpickled() as seen:
            named = [Asset(kind, "ann/usual"), Asset(kind, "ann/config")]
            for number, (name, data) in enumerate(pickles.items()):
                hub.put_files(f"ann/{number}", {name: data})
                named += [Asset(kind, f"ann/{number}"), Asset(kind, f"ann/{number}/{name}")]
                named += [Asset(kind, f"ann/{number}", file=name)]
            for asset in named:
                with pytest.raises(AssetError) as failed:
                    await get(weights, asset)
                assert failed.value.kind in ("file_download_error", "invalid_weights"), asset
    assert seen == [] and not canary.exists()
    assert not [path for path in hub.asked if path.endswith((".bin", ".ckpt", ".pt", ".pth"))]


def test_t12_the_gadgets_work(tmp_path: Path) -> None:
    """Else the tests beside this one would show nothing."""
    canary = tmp_path / "canary"
    with gadgets.unpickled() as seen:
        pickle.loads(gadgets.files(canary)["protocol2.bin"])
    assert canary.exists() and seen


# -- row 39: what a URL leads to may change, and its server may lie


async def test_t39_content_decides_not_the_url(place: Place, hub: Hub) -> None:
    hub.files |= {"/a": safetensors(1), "/b": safetensors(1), "/c": safetensors(2)}
    weights = place.open()
    paths = []
    for name in "abc":
        with await get(weights, f"{hub.url}/{name}") as path:
            paths.append(path)
            assert path.stem == hashlib.sha256(hub.files[f"/{name}"]).hexdigest()
    assert paths[0] == paths[1] != paths[2]


class Liar(Hub):
    """Says the same tag of everything, and as it is told that nothing has changed."""

    def __init__(self, says_unchanged: bool = False, tag: str = '"same"') -> None:
        super().__init__()
        self.says_unchanged = says_unchanged
        self.tag = tag

    def answer(self, path: str, head: str) -> bytes:
        body = self.files.get(path, b"")
        status = 304 if self.says_unchanged else 200
        body = b"" if status == 304 else body
        head = f"HTTP/1.1 {status} X\r\nETag: {self.tag}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


@pytest.fixture
async def liar() -> AsyncIterator[Liar]:
    made = Liar()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield made


async def test_t39_one_tag_for_two_contents_is_two_files(place: Place, liar: Liar) -> None:
    weights = place.open(fresh_s=0)
    liar.files |= {"/a": safetensors(1), "/b": safetensors(2)}
    assert await read(weights, f"{liar.url}/a") == safetensors(1)
    assert await read(weights, f"{liar.url}/b") == safetensors(2)
    liar.files["/a"] = safetensors(3)
    assert await read(weights, f"{liar.url}/a") == safetensors(3)
    assert await read(weights, f"{liar.url}/b") == safetensors(2)
    assert place.kept() == {name_of(safetensors(size)) for size in (1, 2, 3)}


async def test_t39_unchanged_means_what_this_very_url_led_to(place: Place, liar: Liar) -> None:
    weights = place.open(fresh_s=0)
    liar.files |= {"/a": safetensors(1), "/b": safetensors(2)}
    assert await read(weights, f"{liar.url}/a") == safetensors(1)
    liar.says_unchanged = True
    assert await read(weights, f"{liar.url}/a") == safetensors(1)
    await fails(weights, f"{liar.url}/b", "304")  # nothing is known of it
    assert await read(weights, f"{liar.url}/a") == safetensors(1)


@pytest.mark.parametrize("tag", ["../../etc/passwd", '"a', 'W/"same"', '"' + "x" * 5000 + '"', '"\x7f"', ""])
async def test_t39_a_tag_that_is_none_is_not_sent_back(place: Place, liar: Liar, tag: str) -> None:
    liar.tag = tag
    liar.files["/a"] = safetensors(1)
    weights = place.open(fresh_s=0)
    for size in (1, 2):
        liar.files["/a"] = safetensors(size)
        assert await read(weights, f"{liar.url}/a") == safetensors(size)
    assert {path.name for path in place.cache.glob("*.json")} <= {path.name for path in place.cache.iterdir()}
    assert all('"etag":null' in path.read_text() for path in place.cache.glob("*.json"))


async def test_t39_what_one_signature_opens_another_does_not(place: Place, hub: Hub) -> None:
    """A URL's signature is part of its key: who has another asks the server."""
    hub.files["/x.safetensors?signature=alice"] = safetensors(1)
    weights = place.open()
    assert await read(weights, f"{hub.url}/x.safetensors?signature=alice") == safetensors(1)
    await fails(weights, f"{hub.url}/x.safetensors?signature=eve", "404")
    await fails(weights, f"{hub.url}/x.safetensors", "404")
    assert place.kept() == {name_of(safetensors(1))}


@pytest.mark.parametrize("userinfo", ["alice:secret@", "alice@", ":secret@"])
async def test_t39_no_url_brings_credentials(place: Place, hub: Hub, userinfo: str) -> None:
    hub.files["/x.safetensors"] = safetensors(1)
    failed = await fails(place.open(), hub.url.replace("://", f"://{userinfo}") + "/x.safetensors")
    assert "secret" not in failed.message and not hub.asked


async def test_t39_a_changed_file_under_the_hubs_name_is_another(place: Place, hub: Hub) -> None:
    weights = place.open(fresh_s=0)
    for size in (1, 2):
        hub.put("ann/one", lora=safetensors(size))
        with await get(weights, "ann/one") as path:
            assert path.name == name_of(safetensors(size))
    hub.files[listing("ann/one")] = b"[]"
    with pytest.raises(AssetError):
        await get(weights, "ann/one")
