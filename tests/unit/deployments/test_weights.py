"""Adapter weights: how they are named, fetched once, kept, and let go."""

import asyncio
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from deployments.files import cache as module
from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError
from schemas.settings import EASYCONTROLS
from tests.corpus.paths import PAYLOADS
from tests.support.fields import shows
from tests.support.hub import Hub, listing
from tests.support.rf_inversion import RF
from tests.unit.deployments.places import BASE, Place, fails, get, name_of, read, safetensors

_seen: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and not isinstance(args[0], int):
        _seen.append(os.fsdecode(args[0]))
    elif event in ("socket.connect", "socket.getaddrinfo"):
        _seen.append(f"network {args}")


sys.addaudithook(_note)


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """Every file that this process opens, and every host it looks for, during the test."""
    global _seen
    _seen = []
    yield _seen
    _seen = None


def controlnet(source: str, variant: str | None = None) -> Asset:
    return Asset(AssetKind.CONTROLNET, source, variant)


def easycontrol(source: str) -> Asset:
    return Asset(AssetKind.EASYCONTROL, source)


# -- where weights come from


async def test_a_url_is_kept_under_the_name_of_its_content(place: Place, hub: Hub) -> None:
    hub.files["/a/cat.safetensors?signature=secret"] = hub.files["/same"] = data = safetensors(100)
    weights = place.open()
    with await get(weights, f"{hub.url}/a/cat.safetensors?signature=secret") as path:
        assert path == place.cache / name_of(data)
        assert path.read_bytes() == data
    assert await read(weights, f"{hub.url}/a/cat.safetensors?signature=secret") == data
    assert await read(weights, f"{hub.url}/same") == data
    assert place.kept() == {name_of(data)} and place.kept(".part") == set()
    assert set(hub.asked.values()) == {1}
    assert not any(b"secret" in path.read_bytes() for path in place.cache.glob("*.json"))


async def test_plain_http_is_for_the_inside(place: Place) -> None:
    await fails(place.open(fetch={"allowed_networks": ()}), "http://8.8.8.8/x.safetensors", "use https")


async def test_the_hub_is_asked_for_the_one_file(place: Place, hub: Hub) -> None:
    hub.put("ann/one", lora=safetensors(1), folder__other=safetensors(2))
    hub.put("ann/trained", pytorch_lora_weights=safetensors(3), extra=safetensors(4))
    hub.put("ann/many", a=safetensors(5), b=safetensors(6))
    hub.put("ann/none", folder__x=safetensors(7))
    weights = place.open()
    assert await read(weights, "ann/one") == safetensors(1)
    assert await read(weights, "ann/one/folder/other.safetensors") == safetensors(2)
    assert await read(weights, "ann/trained") == safetensors(3)
    assert await read(weights, "ann/many/b.safetensors") == safetensors(6)
    await fails(weights, "ann/many", "ann/many/a.safetensors", "ann/many/b.safetensors")
    await fails(weights, "ann/none", "no .safetensors file at its top")
    await fails(weights, "ann/absent", "ann/absent on the Hub", "404")
    await fails(weights, "ann/one/absent.safetensors", "404")
    hub.files[listing("ann/odd")] = b'{"siblings": 1}'
    await fails(weights, "ann/odd", "could not be read")


@shows(RF, "controlnets.variant", "controlnet_unions.variant")
async def test_each_kind_of_weights_has_its_usual_file(place: Place, hub: Hub) -> None:
    fp16 = {"diffusion_pytorch_model.fp16": safetensors(2)}
    hub.put("ann/all", diffusion_pytorch_model=safetensors(1), pytorch_lora_weights=safetensors(3), **fp16)
    hub.put("ann/two", a=safetensors(4), b=safetensors(5))
    hub.put("ann/one", flux_canny=safetensors(6))  # as the repositories of XLabs
    weights = place.open()
    for _ in range(2):  # from the hub, and by the records
        assert await read(weights, controlnet("ann/all")) == safetensors(1)
        assert await read(weights, controlnet("ann/all", "fp16")) == safetensors(2)
        assert await read(weights, "ann/all") == safetensors(3)
        assert await read(weights, easycontrol("ann/all")) == safetensors(3)
        assert await read(weights, controlnet("ann/one")) == safetensors(6)
    assert all(count == 1 for path, count in hub.asked.items() if "resolve" in path)
    await fails(
        weights, controlnet("ann/two"), "Say which file: ann/two/a.safetensors, ann/two/b.safetensors"
    )


async def test_a_variant_that_is_not_there_is_refused_with_the_files_that_are(place: Place, hub: Hub) -> None:
    fp16 = {"diffusion_pytorch_model.fp16": safetensors(1)}
    hub.put("ann/net", diffusion_pytorch_model=safetensors(2), **fp16)
    hub.put("ann/one", net=safetensors(3))
    hub.put("ann/none")
    weights = place.open()
    await fails(
        weights,
        controlnet("ann/net", "bf16"),
        "no variant bf16",
        "ann/net/diffusion_pytorch_model.fp16.safetensors, ann/net/diffusion_pytorch_model.safetensors",
    )
    await fails(weights, controlnet("ann/one", "fp16"), "no variant fp16", "ann/one/net.safetensors")
    await fails(weights, controlnet("ann/none", "fp16"), "no .safetensors file at its top")


async def test_a_variant_of_what_is_one_file_says_nothing(place: Place, hub: Hub) -> None:
    local = place.folder / "mine.safetensors"
    local.write_bytes(safetensors(1))
    hub.put("ann/net", diffusion_pytorch_model=safetensors(2))
    hub.files["/x"] = safetensors(3)
    weights = place.open(names={"mine": str(local), "net": "ann/net"})
    assert await read(weights, controlnet("mine", "fp16")) == safetensors(1)
    assert await read(weights, controlnet("net", "fp16")) == safetensors(2)
    file = "ann/net/diffusion_pytorch_model.safetensors"
    assert await read(weights, controlnet(file, "fp16")) == safetensors(2)
    assert await read(weights, controlnet(f"{hub.url}/x", "fp16")) == safetensors(3)


async def test_one_file_for_several_uses_is_one_download(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    hub.put("ann/one", lora=safetensors(2))
    hub.pause_s = 0.05
    weights = place.open()
    for source in (f"{hub.url}/x", "ann/one/lora.safetensors"):
        uses = (source, controlnet(source), controlnet(source, "fp16"), easycontrol(source))
        assert len(set(await asyncio.gather(*(read(weights, use) for use in uses)))) == 1
    assert len(hub.asked) == 2 and set(hub.asked.values()) == {1}


async def test_the_control_methods_have_names(place: Place, hub: Hub) -> None:
    hub.put("Xiaojiu-Z/EasyControl", models__canny=safetensors(1), models__Ghibli=safetensors(2))
    hub.files["/x"] = safetensors(3)
    mine = place.folder / "mine.safetensors"
    mine.write_bytes(safetensors(4))
    weights = place.open(names={"mine": str(mine), "canny": str(mine)})
    assert await read(weights, easycontrol("canny")) == safetensors(1)
    assert await read(weights, easycontrol("ghibli")) == safetensors(2)
    assert await read(weights, easycontrol(f"{hub.url}/x")) == safetensors(3)
    assert await read(weights, easycontrol("mine")) == await read(weights, "canny") == safetensors(4)
    listed = ", ".join(sorted(EASYCONTROLS))
    for word in ("cany", "Canny", "scribble"):
        await fails(weights, easycontrol(word), "unknown control method", f"built-in method ({listed})")
    for other in ("depth", controlnet("depth")):
        await fails(weights, other, "No weights are known by this name", "names (canny, mine)")
    own = place.open(easycontrols={"mine": str(mine)})
    assert await read(own, easycontrol("mine")) == safetensors(4)
    await fails(own, easycontrol("canny"), "built-in method (mine)")


async def test_without_the_hub_only_the_operators_control_methods_are_known(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    weights = place.open(hub=False, easycontrols=EASYCONTROLS | {"canny": f"{hub.url}/x"})
    assert await read(weights, easycontrol("canny")) == safetensors(1)
    await fails(weights, easycontrol("depth"), "unknown control method", "built-in method (canny)")
    failed = await fails(place.open(hub=False), easycontrol("depth"), "unknown control method")
    assert "built-in" not in failed.message and set(hub.asked) == {"/x"}


async def test_without_the_hub_an_id_is_no_name(place: Place, hub: Hub) -> None:
    hub.put("ann/one", lora=safetensors(1))
    failed = await fails(place.open(hub=False), "ann/one", "an https URL")
    assert "Hub" not in failed.message and not hub.asked


async def test_the_operators_names_come_first(place: Place, hub: Hub, seen: list[str]) -> None:
    local = place.folder / "mine.safetensors"
    local.write_bytes(safetensors(1))
    hub.put("ann/one", lora=safetensors(2))
    hub.files["/x"] = safetensors(3)
    names = {"mine": str(local), "file": local.as_uri(), "ann/one": f"{hub.url}/x", "hub": "ann/one"}
    weights = place.open(names=names | {"lost": str(place.folder / "lost.safetensors")})
    assert await read(weights, "mine") == await read(weights, "file") == safetensors(1)
    assert await read(weights, "ann/one") == safetensors(3)
    assert await read(weights, "hub") == safetensors(2)
    failed = await fails(weights, "lost", "cannot be read")
    assert str(place.folder) not in failed.message
    await fails(weights, "other", "an https URL", "owner/repo", "names (ann/one, file, hub, lost, mine)")
    await fails(weights, str(local))  # the path itself is no name


async def test_an_operators_file_that_changed_is_read_again(place: Place) -> None:
    local = place.folder / "mine.safetensors"
    local.write_bytes(safetensors(1))
    weights = place.open(fresh_s=0, names={"mine": str(local)})
    assert await read(weights, "mine") == await read(weights, "mine") == safetensors(1)
    local.write_bytes(safetensors(2))
    assert await read(weights, "mine") == safetensors(2)


@pytest.mark.parametrize("target", ["", "x", "ftp://a/b", "a/b/c", "../x.safetensors", "data:,x"])
async def test_a_name_that_leads_nowhere_stops_the_start(place: Place, target: str) -> None:
    with pytest.raises(ValueError, match="weights.names.mine"):
        place.open(names={"mine": target})
    with pytest.raises(ValueError, match="weights.easycontrols.mine"):
        place.open(easycontrols={"mine": target})


async def test_a_cache_elsewhere_stops_the_start(place: Place) -> None:
    with pytest.raises(ValueError, match="weights.cache"):
        place.open(cache="s3://bucket")


async def test_own_files_are_read_without_http(place: Place, hub: Hub, seen: list[str]) -> None:
    key = await place.files.save(safetensors(9), "image/png")  # its content counts, not its name
    weights = place.open(fresh_s=0)
    for base in (BASE, BASE, "https://elsewhere.example", "https://elsewhere.example"):
        assert await read(weights, f"{base}/files/{key}") == safetensors(9)
    picture = await place.files.save(b"\x89PNG", "image/png")
    await fails(weights, f"{BASE}/files/{picture}", "must be a safetensors file")
    await fails(weights, f"{BASE}/files/{'0' * 32}.png", "no such file")
    assert not any(each.startswith("network") for each in seen)


KINDS = [kind for kind in AssetKind if kind not in (AssetKind.IMAGE, AssetKind.CONFIG)]
OUTSIDE = [
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "~root",
    "~/.ssh/id_rsa",
    "/etc/passwd",
    "/etc/passwd.safetensors",
    "//etc/passwd",
    "../etc/passwd",
    "../../../../etc/passwd",
    "../x.safetensors",
    "./x.safetensors",
    "a",
    "a.safetensors",
    "a/..",
    "../a",
    "a/../b",
    "a/b/..",
    "a/b/../c.safetensors",
    "a/b/../../c.safetensors",
    "a/b/./c.safetensors",
    "a/b//c.safetensors",
    "a/b/.c.safetensors",
    "a//b",
    "/a/b",
    "a/b/",
    "a/b/c",
    "a/b/c.bin",
    "a/b/c.pt",
    "a/b/c.safetensors/",
    "a/b/c.safetensors/d",
    "a/b..c",
    "..a/b",
    "a/b@main",
    "a/b:main",
    "a/b?x=y.safetensors",
    "a/b#c.safetensors",
    "a/b/c%2f..%2fd.safetensors",
    "a/b/%2e%2e/c.safetensors",
    "a/b/%252e%252e/c.safetensors",
    "a/b/c\0.safetensors",
    "a/b/c\n.safetensors",
    "a/b\n",
    "a\\b",
    "..\\..\\windows\\win.ini",
    "C:\\weights.safetensors",
    "C:/weights.safetensors",
    "\\\\host\\share\\x.safetensors",
    "$HOME/x.safetensors",
    "${HOME}/x.safetensors",
    "%HOME%/x.safetensors",
    "$(id)/x",
    "`id`/x",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "FILE:///etc/passwd",
    "file:etc/passwd",
    "hf://a/b",
    "hf:a/b",
    "s3://bucket/x.safetensors",
    "ftp://host/x.safetensors",
    "data:;base64,QQ==",
    "zoo:flux",
    "http:x",
    "http://",
    "https:///etc/passwd",
    "http://[::1",
    "http://127.0.0.1\\@x/",
    f"{BASE}/files/../../etc/passwd",
    f"{BASE}/files/..%2f..%2fetc%2fpasswd",
    f"{BASE}/files/%2fetc%2fpasswd",
    "а/b",  # not a Latin a
    "a/b/ｃ.safetensors",
    "a/b/\u202ec.safetensors",
    f"a/{'b' * 200}",
    f"a/b/{'c/' * 20}d.safetensors",
    f"a/b/{'c' * 300}.safetensors",
    "x" * 100_000,
    "\ud800",
    "https://x/\ud800",
    "https://\ud800/x",
]


async def test_t10_no_other_string_opens_or_asks_for_anything(place: Place, seen: list[str]) -> None:
    weights = place.open(fetch={"allowed_networks": (), "allowed_ports": (443,)})
    assert len(set(OUTSIDE)) >= 60
    words = (Asset(kind, word) for kind in KINDS for word in OUTSIDE)
    for source in words:
        seen.clear()
        failed = await fails(weights, source)
        assert "on the Hub" not in failed.message, repr(source)
        elsewhere = [each for each in seen if not each.startswith(f"{place.cache}{os.sep}")]
        assert elsewhere == [], repr(source)
    assert place.kept() == place.kept(".part") == place.kept(".json") == set()


async def test_t11_no_word_for_a_file_in_a_repository_leads_out(
    place: Place, hub: Hub, seen: list[str]
) -> None:
    hub.put("a/b", c=safetensors(3))
    weights = place.open()
    (await get(weights, "a/b")).release()  # what Python itself loads for it is loaded now
    for payload in PAYLOADS:
        for kind in (AssetKind.IP_ADAPTER, AssetKind.IMAGE_ENCODER, AssetKind.BASE, AssetKind.CONTROLNET):
            for words in ({"folder": payload}, {"file": payload}, {"variant": payload}):
                seen.clear()
                try:
                    (await get(weights, Asset(kind, "a/b", **words))).release()
                except AssetError:
                    pass  # a word that names nothing there
                opened = [each for each in seen if not each.startswith((f"{place.cache}{os.sep}", "network"))]
                assert opened == [], (payload, words)
    assert not [path for path in hub.asked if ".." in path or "passwd" in path]


# -- what is refused by its content


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"<!doctype html><html>", "a web page"),
        (b"\n\n  <html>", "a web page"),
        (b"PK\x03\x04" + b"x" * 100, "a zip archive"),
        (b"\x80\x02}q\x00.", "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
        (b"", "something else"),
        (b"{}", "something else"),
        (bytes(8), "something else"),  # a header of nothing
        (bytes(100), "something else"),
        ((2**63).to_bytes(8, "little") + b"{}", "something else"),
        ((10).to_bytes(8, "little") + b"{}", "something else"),  # longer than the file
        ((10_000_001).to_bytes(8, "little") + b"{" + b" " * 10_000_000, "something else"),
        ((2).to_bytes(8, "little") + b"[]", "something else"),
        ((4).to_bytes(8, "little") + b"{  ,", "something else"),
    ],
)
async def test_only_safetensors_are_kept(place: Place, hub: Hub, data: bytes, why: str) -> None:
    hub.files["/x.safetensors"] = data
    await fails(place.open(), f"{hub.url}/x.safetensors", "must be a safetensors file", why)
    assert place.kept() == place.kept(".part") == place.kept(".json") == set()


async def test_a_padded_header_is_taken(place: Place, hub: Hub) -> None:
    hub.files["/x"] = data = (8).to_bytes(8, "little") + b"{}      "
    assert await read(place.open(), f"{hub.url}/x") == data


async def test_what_cannot_fit_is_refused(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1000)
    failed = await fails(place.open(cache_bytes=500), f"{hub.url}/x", kind="file_too_large")
    assert failed.ctx == {"max_size": 500}
    limits = {"max_weights_bytes": 400}
    failed = await fails(place.open(fetch=limits), f"{hub.url}/x", kind="file_too_large")
    assert failed.ctx == {"max_size": 400}


# -- one download for many


async def test_t28_fifty_callers_share_one_download(place: Place, hub: Hub) -> None:
    hub.put("ann/one", lora=safetensors(2**20))
    hub.pause_s = 0.05
    weights = place.open()
    asset = Asset(AssetKind.LORA, "ann/one")
    lines: list[list[str]] = [[] for _ in range(50)]
    leases = await asyncio.gather(*(weights.locate(asset, BASE, each.append) for each in lines))
    assert len({lease.path for lease in leases}) == 1 and set(hub.asked.values()) == {1}
    assert all(each == ["downloading ann/one/lora.safetensors: 0 of 1 MB"] for each in lines)
    for lease in leases:
        lease.release()


async def test_a_failure_is_shared_and_forgotten(place: Place, hub: Hub) -> None:
    hub.pause_s = 0.05
    weights = place.open()
    url = f"{hub.url}/x"
    failures = await asyncio.gather(*(get(weights, url) for _ in range(50)), return_exceptions=True)
    assert {type(each) for each in failures} == {AssetError} and hub.asked["/x"] == 1
    hub.files["/x"] = safetensors(1)
    assert await read(weights, url) == safetensors(1)


async def test_one_who_leaves_does_not_stop_the_others(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    hub.pause_s = 0.1
    weights = place.open()
    first, second = (asyncio.create_task(get(weights, f"{hub.url}/x")) for _ in range(2))
    await asyncio.sleep(0.05)
    first.cancel()
    with await second as path:
        assert path.exists() and hub.asked["/x"] == 1


async def test_the_last_who_leaves_ends_the_download(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    hub.pause_s = 0.1
    weights = place.open()
    both = [asyncio.create_task(get(weights, f"{hub.url}/x")) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert len(place.kept(".part")) == 1
    for task in both:
        task.cancel()
    await asyncio.sleep(0)
    anew = asyncio.create_task(read(weights, f"{hub.url}/x"))  # at once
    await asyncio.sleep(0.05)
    assert len(place.kept(".part")) == 1
    assert await anew == safetensors(1)
    assert hub.asked["/x"] == 2 and place.kept(".part") == set()


async def test_progress_is_told_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines: list[str] = []
    progress = module._progress("cat", lines.append)
    for step in range(31):
        now = step / 10
        progress(step * 10**6, 34 * 10**6 if step < 20 else None)
    assert lines == [
        "downloading cat: 0 of 34 MB",
        "downloading cat: 10 of 34 MB",
        "downloading cat: 20 MB",
        "downloading cat: 30 MB",
    ]


# -- changed content


@pytest.mark.parametrize("has_tags", [True, False])
async def test_changed_content_is_a_new_file(place: Place, hub: Hub, has_tags: bool) -> None:
    hub.has_tags = has_tags
    hub.files["/x"] = safetensors(1)
    weights = place.open(fresh_s=0)
    for _ in range(3):
        assert await read(weights, f"{hub.url}/x") == safetensors(1)
    assert hub.statuses == ({200: 1, 304: 2} if has_tags else {200: 3})
    with await get(weights, f"{hub.url}/x") as old:
        hub.files["/x"] = safetensors(2)
        assert await read(weights, f"{hub.url}/x") == safetensors(2)
        assert old.read_bytes() == safetensors(1)
    assert place.kept() == {name_of(safetensors(1)), name_of(safetensors(2))}


async def test_a_fresh_file_is_not_asked_about(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    assert await read(place.open(), f"{hub.url}/x") == safetensors(1)
    hub.files["/x"] = safetensors(2)
    assert await read(place.open(), f"{hub.url}/x") == safetensors(1)  # after a restart as well
    assert hub.asked["/x"] == 1


async def test_a_tag_without_its_file_is_not_sent(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    weights = place.open()
    assert await read(weights, f"{hub.url}/x") == safetensors(1)
    (place.cache / name_of(safetensors(1))).unlink()
    assert await read(weights, f"{hub.url}/x") == safetensors(1)
    assert hub.statuses == {200: 2}


async def test_a_damaged_record_is_as_none(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    assert await read(place.open(), f"{hub.url}/x") == safetensors(1)
    for damage in ("", "{", '{"digest": "../../etc/passwd", "etag": null}'):
        next(place.cache.glob("*.json")).write_text(damage)
        assert await read(place.open(), f"{hub.url}/x") == safetensors(1)
    assert hub.asked["/x"] == 4


# -- the bound


async def test_t28_what_was_unused_for_longest_goes_first(place: Place, hub: Hub) -> None:
    hub.files |= {f"/{name}": safetensors(1000, name.encode()) for name in "abcd"}
    weights = place.open(cache_bytes=3 * len(safetensors(1000)) + 10)
    for name in "abcab":  # c was used longest ago, then a, then b
        await read(weights, f"{hub.url}/{name}")
    await read(weights, f"{hub.url}/d")
    assert place.kept() == {name_of(hub.files[f"/{name}"]) for name in "abd"}
    await read(weights, f"{hub.url}/c")
    assert place.kept() == {name_of(hub.files[f"/{name}"]) for name in "bcd"}


async def test_a_pinned_file_stays_until_it_is_released(place: Place, hub: Hub) -> None:
    hub.files |= {f"/{name}": safetensors(1000, name.encode()) for name in "abc"}
    weights = place.open(cache_bytes=len(safetensors(1000)) + 10)
    first = await get(weights, f"{hub.url}/a")
    again = await get(weights, f"{hub.url}/a")
    first.release()
    first.release()
    with await get(weights, f"{hub.url}/b") as second:
        assert again.path.exists() and second.exists()  # over the bound, by what is in use
    assert place.kept() == {again.path.name}  # and back below it
    again.release()
    assert place.kept() == {again.path.name}
    await read(weights, f"{hub.url}/c")
    assert place.kept() == {name_of(hub.files["/c"])}


HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


async def test_another_process_pins_as_well(place: Place, hub: Hub) -> None:
    hub.files |= {f"/{name}": safetensors(1000, name.encode()) for name in "abc"}
    weights = place.open(cache_bytes=len(safetensors(1000)) + 10)
    with await get(weights, f"{hub.url}/a") as path:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-S", "-c", HOLD, str(path))
        other = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert other.stdout and await other.stdout.readline() == b"held\n"
    await read(weights, f"{hub.url}/b")
    assert place.kept() == {path.name}
    await other.communicate(b"")  # it ends with its input
    await read(weights, f"{hub.url}/c")
    assert place.kept() == {name_of(hub.files["/c"])}


async def test_a_smaller_bound_holds_from_the_start(place: Place, hub: Hub) -> None:
    hub.files |= {f"/{name}": safetensors(1000, name.encode()) for name in "ab"}
    weights = place.open()
    for name in "ab":
        await read(weights, f"{hub.url}/{name}")
    place.open(cache_bytes=len(safetensors(1000)))
    assert place.kept() == {name_of(hub.files["/b"])}


async def test_the_records_are_bounded_too(place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 3)
    hub.files |= {f"/{number}": safetensors(1) for number in range(9)}
    weights = place.open()
    for number in range(9):
        await read(weights, f"{hub.url}/{number}")
    assert len(place.kept(".json")) <= 4 and len(place.kept()) == 1


# -- leftovers and damage


async def test_leftovers_of_the_dead_are_swept(place: Place, hub: Hub) -> None:
    hub.files["/x"] = safetensors(1)
    hub.pause_s = 0.1
    living = asyncio.create_task(read(place.open(), f"{hub.url}/x"))
    await asyncio.sleep(0.05)
    (place.cache / "dead.part").write_bytes(b"half a file")
    assert len(place.kept(".part")) == 2
    place.open()
    assert len(place.kept(".part")) == 1  # of the download under way
    assert await living == safetensors(1) and place.kept(".part") == set()


async def test_damaged_files_are_found_and_fetched_again(place: Place, hub: Hub) -> None:
    hub.files |= {"/x": safetensors(1), "/y": safetensors(2)}
    weights = place.open()
    with await get(weights, f"{hub.url}/x") as path, await get(weights, f"{hub.url}/y"):
        pass
    assert weights.check_integrity() == []
    path.write_bytes(b"rot")
    assert weights.check_integrity() == [path.name]
    assert place.kept() == {name_of(safetensors(2))}
    assert await read(weights, f"{hub.url}/x") == safetensors(1)


async def test_a_clock_set_back_only_asks_again(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["/x"] = safetensors(1)
    weights = place.open()
    await read(weights, f"{hub.url}/x")
    past = time.time() - 10_000
    monkeypatch.setattr(time, "time", lambda: past)
    assert await read(weights, f"{hub.url}/x") == safetensors(1)
    assert hub.statuses == {200: 1, 304: 1}


async def test_what_another_process_evicts_before_it_is_pinned_is_fetched_again(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["/style"] = data = safetensors(10)
    lock, lost = module._lock, []

    def evicted_once(file: BinaryIO, kind: int) -> bool:
        """Between the opening and the lock, of a file and of a download."""
        if kind not in lost:
            lost.append(kind)
            Path(file.name).unlink()
        return lock(file, kind)

    monkeypatch.setattr(module, "_lock", evicted_once)
    assert await read(place.open(), f"{hub.url}/style") == data
    assert sorted(lost) == [fcntl.LOCK_SH, fcntl.LOCK_EX]


def test_what_another_process_has_evicted_is_gone_and_not_damaged(tmp_path: Path) -> None:
    assert module._evict(tmp_path / "gone.safetensors")
    assert module._is_whole(tmp_path / "gone.safetensors")
