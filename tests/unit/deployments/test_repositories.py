"""Models of several files, and who may name which: from the Hub, this disk or a URL to a local folder."""

import asyncio
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.files import cache
from deployments.files import hub as hub_module
from deployments.files import weights as module
from deployments.files.weights import Weights
from pipelines import zoo
from pipelines.sd import loading
from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError
from tests.support.hub import Hub, listing
from tests.unit.deployments.places import BASE, Place, fails, get, name_of, read, safetensors

MODEL = {
    "model_index.json": b"{}",
    "text_encoder/config.json": b'{"text": 1}',
    "text_encoder/model.safetensors": safetensors(10),
    "tokenizer/merges.txt": b"merges",
    "tokenizer/vocab.json": b"{}",
    "unet/config.json": b'{"unet": 1}',
    "unet/diffusion_pytorch_model.safetensors": safetensors(20),
    "vae/config.json": b'{"vae": 1}',
    "vae/diffusion_pytorch_model.safetensors": safetensors(30),
}
HALF = {"unet/diffusion_pytorch_model.fp16.safetensors": safetensors(15)}
NEVER = {
    "model.ckpt": b"\x80",
    "unet/diffusion_pytorch_model.bin": b"\x80",
    "unet/run.py": b"import os",
    "whole.safetensors": safetensors(40),
}
ONES = (AssetKind.LORA, AssetKind.EMBEDDING, AssetKind.IC_LIGHT, AssetKind.IP_ADAPTER)


def base(source: str, variant: str | None = None) -> Asset:
    return Asset(AssetKind.BASE, source, variant)


def unet(source: str, variant: str | None = None) -> Asset:
    return Asset(AssetKind.UNET, source, variant)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def drafts(place: Place) -> set[str]:
    """What is half-made."""
    return place.kept(".part") | place.kept(".draft")


async def contents(weights: Weights, asset: Asset) -> dict[str, bytes]:
    with await get(weights, asset) as folder:
        return files_in(folder)


def resolved(hub: Hub, repo: str) -> set[str]:
    """The files that were asked for."""
    start = f"/{repo}/resolve/main/"
    return {path.removeprefix(start) for path in hub.asked if path.startswith(start)}


# -- single files


async def test_every_kind_of_single_file_comes_from_every_kind_of_source(place: Place, hub: Hub) -> None:
    local = place.folder / "mine.safetensors"
    local.write_bytes(safetensors(1))
    hub.files["/x"] = safetensors(2)
    hub.put("ann/one", only=safetensors(3))
    hub.put("ann/deep", models__a=safetensors(4), models__b=safetensors(5))
    key = await place.files.save(safetensors(6), "image/png")
    weights = place.open(names={"mine": str(local)}, bases={"names": {"mine": str(local)}})
    for kind in (*ONES, AssetKind.IMAGE_ENCODER, AssetKind.UNET, AssetKind.BASE):
        assert await read(weights, Asset(kind, "mine")) == safetensors(1)
        assert await read(weights, Asset(kind, f"{hub.url}/x")) == safetensors(2)
        assert await read(weights, Asset(kind, "ann/deep/models/b.safetensors")) == safetensors(5)
        assert await read(weights, Asset(kind, f"{BASE}/files/{key}")) == safetensors(6)
        if kind not in (AssetKind.UNET, AssetKind.BASE):
            assert await read(weights, Asset(kind, "ann/one")) == safetensors(3)
            found = await read(weights, Asset(kind, "ann/deep", folder="models", file="a.safetensors"))
            assert found == safetensors(4)
            await fails(
                weights, Asset(kind, "ann/deep", folder="models"), "Say which file: ann/deep/models/a"
            )
    assert all(count == 1 for count in hub.asked.values())


async def test_a_pickle_means_the_safetensors_beside_it(place: Place, hub: Hub) -> None:
    files = {"models/a.bin": b"\x80", "models/a.safetensors": safetensors(1), "models/b.bin": b"\x80"}
    hub.put_files("ann/ip", files)
    weights = place.open()
    asset = Asset(AssetKind.IP_ADAPTER, "ann/ip", folder="models", file="a.bin")
    assert await read(weights, asset) == safetensors(1)
    asset = Asset(AssetKind.IP_ADAPTER, "ann/ip", folder="models", file="b.bin")
    await fails(weights, asset, "ann/ip on the Hub: models/b.bin is a pickle", "ann/ip/models/a.safetensors")
    assert resolved(hub, "ann/ip") == {"models/a.safetensors"}


async def test_a_name_may_stand_for_a_repository_that_the_request_chooses_in(place: Place, hub: Hub) -> None:
    hub.put("ann/ip", models__a=safetensors(1), models__b=safetensors(2))
    weights = place.open(names={"faces": "ann/ip"})
    asset = Asset(AssetKind.IP_ADAPTER, "faces", folder="models", file="b.safetensors")
    assert await read(weights, asset) == safetensors(2)


# -- folders


async def test_an_image_encoder_is_a_folder_with_its_config(place: Place, hub: Hub) -> None:
    files = {"enc/model.safetensors": safetensors(1), "enc/pytorch_model.bin": b"\x80"}
    hub.put_files("ann/enc", files | {"enc/config.json": b"{}"})
    weights = place.open()
    by_folder = Asset(AssetKind.IMAGE_ENCODER, "ann/enc", folder="enc", file="pytorch_model.bin")
    by_file = Asset(AssetKind.IMAGE_ENCODER, "ann/enc/enc/model.safetensors", file="pytorch_model.bin")
    for asset in (by_folder, by_file):
        assert await contents(weights, asset) == {"config.json": b"{}", "model.safetensors": safetensors(1)}
    assert resolved(hub, "ann/enc") == {"enc/config.json", "enc/model.safetensors"}


async def test_of_a_model_only_what_is_read_comes(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL | HALF | NEVER)
    weights = place.open()
    assert await contents(weights, base("ann/sd")) == MODEL
    assert resolved(hub, "ann/sd") == set(MODEL)
    plain = "unet/diffusion_pytorch_model.safetensors"
    half = {name: data for name, data in (MODEL | HALF).items() if name != plain}
    assert await contents(weights, base("ann/sd", "fp16")) == half
    await fails(weights, base("ann/sd", "bf16"), "it has fp16", kind="invalid_weights")
    assert set(hub.asked.values()) == {1}


async def test_a_unets_folder_has_its_config_at_the_top(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL | HALF)
    hub.put_files(
        "ann/unet", {"config.json": b'{"unet": 1}', "diffusion_pytorch_model.safetensors": safetensors(20)}
    )
    weights = place.open()
    with await get(weights, unet("ann/sd")) as one, await get(weights, unet("ann/unet")) as other:
        assert set(files_in(one)) == {"config.json", "diffusion_pytorch_model.safetensors"}
        assert files_in(one) == files_in(other)
        assert one.name == other.name
    assert set(await contents(weights, unet("ann/sd", "fp16"))) == {
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    }


async def test_the_name_of_a_folder_stands_for_its_content(place: Place, hub: Hub) -> None:
    hub.put_files("ann/one", MODEL)
    hub.put_files("ann/same", MODEL | NEVER)
    hub.put_files("ann/other", MODEL | {"vae/config.json": b"{}"})
    moved = {name.replace("tokenizer/merges", "tokenizer_2/merges"): data for name, data in MODEL.items()}
    hub.put_files("ann/moved", moved)
    weights = place.open()
    names = []
    for repo in ("ann/one", "ann/one", "ann/same", "ann/other", "ann/moved"):
        with await get(weights, base(repo)) as folder:
            names.append(folder.name)
    assert names[0] == names[1] == names[2] and len(set(names)) == 3


async def test_the_same_model_is_the_same_folder(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    weights = place.open()
    with await get(weights, base("ann/sd")) as one, await get(place.open(), base("ann/sd")) as other:
        assert one == other
    with await get(weights, base("ann/sd")) as again:
        assert again == one and files_in(again) == MODEL


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
async def test_a_located_model_loads(place: Place, hub: Hub, kind: str) -> None:
    hub.put_folder("ann/sd", zoo.locate(kind))
    weights = place.open()
    with await get(weights, base("ann/sd")) as folder, await get(weights, unet("ann/sd")) as other:
        parts = loading.inspect(folder, torch.float32, unet=other).load("cpu")
    assert parts.kind == {"sd15": "sd1", "sdxl": "sdxl"}[kind]
    local = loading.inspect(zoo.locate(kind), torch.float32).load("cpu")
    assert torch.equal(parts.unet.conv_in.weight, local.unet.conv_in.weight)


# -- what is the operator's own


async def test_the_operators_models_are_used_where_they_lie(place: Place, hub: Hub) -> None:
    for name in ("one", "a/model", "b/model"):
        for file, data in MODEL.items():
            path = place.folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    single = place.folder / "single.safetensors"
    single.write_bytes(safetensors(5))
    names = {"zoo": "zoo:one", "a": f"{place.folder}/a/model", "b": f"{place.folder}/b/model"}
    weights = place.open(bases={"names": names | {"single": str(single)}, "allow": ()})
    for asset in (base("zoo"), base("a"), base("b", "fp16"), unet("zoo")):
        assert await contents(weights, asset) == MODEL
    assert await read(weights, base("single")) == safetensors(5)
    assert place.kept() == place.kept(".text") == set() and not hub.asked
    with await get(weights, base("a")) as a, await get(weights, base("b")) as b:
        assert [a, b] == [place.folder / "a" / "model", place.folder / "b" / "model"]
    shutil.rmtree(place.folder / "b")
    failed = await fails(weights, base("b"), "cannot be read")
    assert str(place.folder) not in failed.message


async def test_the_model_that_the_server_has_started_with_is_known_by_its_word(
    place: Place, hub: Hub
) -> None:
    (place.folder / "started").mkdir()
    hub.put_files("ann/sd", MODEL)
    names = {"mine": "zoo:started", "other": "ann/sd"}
    weights = place.open(model="zoo:started", bases={"names": names, "allow": ()})
    for source in ("mine", "zoo:started"):
        with await get(weights, base(source)) as path:
            assert path == Path("zoo:started")
    weights = place.open(model="ann/sd", bases={"names": names, "allow": ()})
    for source in ("other", "ann/sd"):
        with await get(weights, base(source)) as path:
            assert path == Path("ann/sd")
    assert not hub.asked


async def test_a_base_name_may_lead_elsewhere(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL | HALF)
    hub.put("ann/single", file=safetensors(6))
    hub.files["/x"] = safetensors(7)
    names = {
        "hub": "ann/sd",
        "file": "ann/single/file.safetensors",
        "url": f"{hub.url}/x",
        "bob/sd": "ann/sd",
    }
    weights = place.open(bases={"names": names, "allow": ()})
    assert await contents(weights, base("hub")) == await contents(weights, base("bob/sd")) == MODEL
    assert set(HALF) <= set(await contents(weights, base("hub", "fp16")))
    assert await read(weights, base("file")) == safetensors(6)
    assert await read(weights, base("url")) == await read(weights, unet("url")) == safetensors(7)


@pytest.mark.parametrize(
    "target", ["", "x", "/absent/model", "zoo:absent", "file:///etc", "a/b/c", "data:,x"]
)
async def test_a_base_name_that_leads_nowhere_stops_the_start(place: Place, target: str) -> None:
    with pytest.raises(ValueError, match="names.mine"):
        place.open(bases={"names": {"mine": target}})


async def test_models_for_faces_are_the_operators_alone(place: Place, hub: Hub) -> None:
    def face(source: str) -> Asset:
        return Asset(AssetKind.FACE_ANALYSIS, source)

    pack = place.folder / "buffalo_l"
    pack.mkdir()
    weights = place.open(faces={"buffalo": str(pack)})
    with await get(weights, face("buffalo")) as path:
        assert path == pack
    for source in ("ann/pack", f"{hub.url}/x", str(pack), "antelope"):
        await fails(weights, face(source), "This server's models for faces are buffalo.")
        await fails(place.open(), face(source), "This server has no face analysis.")
    assert not hub.asked
    with pytest.raises(ValueError, match="faces.absent"):
        place.open(faces={"absent": str(place.folder / "absent")})


# -- who may name what


async def test_only_what_the_operator_allows_may_be_named(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    hub.put_files("eve/sd", MODEL)
    hub.put("ann/single", file=safetensors(6))
    hub.files["/models/x"] = hub.files["/other/x"] = safetensors(7)
    mine = place.folder / "mine.safetensors"
    mine.write_bytes(safetensors(8))
    allow = ["ann/*", f"{hub.url}/models/*"]
    weights = place.open(bases={"allow": allow, "names": {"mine": str(mine)}})
    for kind in (AssetKind.BASE, AssetKind.UNET):
        for source in ("ann/sd", "ann/single/file.safetensors", f"{hub.url}/models/x", "mine"):
            (await get(weights, Asset(kind, source))).release()
        asked = hub.asked.total()
        for source in ("eve/sd", "Ann/sd", f"{hub.url}/other/x", "eve/ann/sd.safetensors", "nonsense"):
            await fails(
                weights,
                Asset(kind, source),
                f"This server does not serve this model. It serves mine and ann/*, {hub.url}/models/*.",
            )
        assert hub.asked.total() == asked
    assert await read(weights, f"{hub.url}/other/x") == safetensors(7)  # a LoRA is not governed by it


async def test_a_server_may_serve_its_own_names_only(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    await fails(place.open(bases={"allow": ()}), base("ann/sd"), "It serves its own only.")
    assert not hub.asked


async def test_without_the_hub_its_models_cannot_be_named(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    failed = await fails(place.open(hub=False), base("ann/sd"), "an https URL")
    assert "Hub" not in failed.message and not hub.asked


async def test_an_upload_is_no_file_of_an_allowed_site(place: Place, hub: Hub) -> None:
    """Whatever its URL calls the host: callers choose that, and what they upload."""
    key = await place.files.save(safetensors(1), "image/png")
    hub.files[f"/files/{key}"] = safetensors(2)
    site = f"{hub.url}/files/{key}"
    weights = place.open(bases={"allow": [f"{hub.url}/*", "http://box:8000/*"]})
    await fails(weights, base(f"{BASE}/files/{key}"), "does not serve this model")
    with pytest.raises(AssetError, match="does not serve this model"):
        await weights.locate(base(site), hub.url, lambda line: None)
    assert await read(weights, site) == safetensors(1)  # a LoRA, from this server
    assert await read(weights, base(site)) == safetensors(2)  # what the site itself has
    assert await read(place.open(), base(f"{BASE}/files/{key}")) == safetensors(1)


# -- what a repository must not do


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "unet/../../evil.json",
        "/etc/evil.json",
        "tokenizer//evil.json",
        "tokenizer/./evil.json",
        "tokenizer/..",
        "tokenizer/..\\evil.json",
        "tokenizer/a\0.json",
        "",
        f"tokenizer/{'x' * 300}.json",
    ],
)
async def test_a_listing_with_a_name_that_leads_elsewhere_is_refused(
    place: Place, hub: Hub, name: str
) -> None:
    hub.put_files("ann/sd", MODEL)
    siblings = [{"rfilename": each} for each in (*MODEL, name)]
    hub.files[listing("ann/sd")] = json.dumps({"siblings": siblings}).encode()
    await fails(place.open(), base("ann/sd"), "ann/sd on the Hub: The list of files has", "no name of a file")
    assert resolved(hub, "ann/sd") == set()


async def test_a_repository_of_pickles_is_refused(place: Place, hub: Hub) -> None:
    pickled = {name.replace(".safetensors", ".bin"): data for name, data in MODEL.items()}
    hub.put_files("ann/sd", pickled)
    weights = place.open()
    for asset in (base("ann/sd"), unet("ann/sd")):
        words = "It has pickles (.bin, .pt, .ckpt), which are not loaded."
        await fails(weights, asset, "ann/sd on the Hub", words, kind="invalid_weights")
    assert resolved(hub, "ann/sd") == set()


async def test_a_pickle_under_another_name_is_refused(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL | {"vae/diffusion_pytorch_model.safetensors": b"\x80\x02}q\x00."})
    await fails(place.open(), base("ann/sd"), "must be a safetensors file; this is a Python pickle")
    await asyncio.sleep(0.1)  # the other downloads are given up meanwhile
    assert drafts(place) == set()


async def test_what_is_too_large_is_refused_before_it_comes(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    size = sum(map(len, MODEL.values()))
    for few in (place.open(bases={"max_bytes": size - 1}), place.open(cache_bytes=size - 1)):
        failed = await fails(few, base("ann/sd"), f"together have {size} bytes", kind="file_too_large")
        assert failed.ctx == {"max_size": size - 1}
    assert resolved(hub, "ann/sd") == set()
    assert await contents(place.open(bases={"max_bytes": size}), base("ann/sd")) == MODEL


async def test_sizes_that_the_hub_does_not_tell_count_as_well(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL, has_sizes=False)
    size = sum(map(len, MODEL.values()))
    few = place.open(bases={"max_bytes": size - 1})
    await fails(few, base("ann/sd"), f"together have {size} bytes", kind="file_too_large")
    assert await contents(place.open(), base("ann/sd")) == MODEL


async def test_texts_and_files_are_bounded(place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"tokenizer/{number}.json": b"{}" for number in range(100)}
    hub.put_files("ann/many", MODEL | many)
    await fails(place.open(), base("ann/many"), "has 109 files; at most 100 are loaded")
    hub.put_files("ann/sd", MODEL | {"tokenizer/vocab.json": b" " * 1000}, has_sizes=False)
    monkeypatch.setattr("deployments.files.origins.MAX_TEXT_BYTES", 999)
    await fails(place.open(), base("ann/sd"), "larger than 999 bytes", kind="file_too_large")
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 500)
    hub.put_files("ann/sd", MODEL | {"tokenizer/vocab.json": b" " * 600})
    await fails(place.open(), base("ann/sd"), "configs and vocabularies together", kind="file_too_large")


async def test_a_file_that_is_missing_ends_the_rest(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    del hub.files["/ann/sd/resolve/main/vae/config.json"]
    weights = place.open()
    await fails(weights, base("ann/sd"), "ann/sd on the Hub", "404")
    await asyncio.sleep(0.1)  # the other downloads are given up meanwhile
    assert drafts(place) == set()
    hub.put_files("ann/sd", MODEL)
    assert await contents(weights, base("ann/sd")) == MODEL


# -- once for many, and again later


async def test_many_who_want_a_model_share_its_download(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    hub.pause_s = 0.02
    weights = place.open()
    uses = [base("ann/sd"), unet("ann/sd"), base("ann/sd", None)] * 5
    leases = await asyncio.gather(*(get(weights, use) for use in uses))
    assert set(hub.asked.values()) == {1} and set(hub.asked) == {
        listing("ann/sd"),
        *(f"/ann/sd/resolve/main/{name}" for name in MODEL),
    }
    for lease in leases:
        lease.release()
    assert drafts(place) == set()


async def test_one_who_leaves_does_not_stop_the_others(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    hub.pause_s = 0.1
    weights = place.open()
    first, second = (asyncio.create_task(contents(weights, base("ann/sd"))) for _ in range(2))
    await asyncio.sleep(0.15)
    first.cancel()
    assert await second == MODEL
    assert set(hub.asked.values()) == {1}


async def test_a_fresh_model_is_not_asked_about(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    weights = place.open()
    assert await contents(weights, base("ann/sd")) == MODEL
    asked = hub.asked.total()
    assert await contents(weights, base("ann/sd")) == MODEL
    assert hub.asked.total() == asked
    assert await contents(place.open(), base("ann/sd")) == MODEL  # after a restart
    assert hub.asked.total() == asked + 1  # what it has, but no file


async def test_later_only_what_has_changed_comes_again(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    weights = place.open(fresh_s=0)
    with await get(weights, base("ann/sd")) as folder:
        before = folder.name
    hub.statuses.clear()
    with await get(weights, base("ann/sd")) as folder:
        assert folder.name == before
    # the list has no tag that is kept
    assert hub.statuses == {304: len(MODEL), 200: 1}
    changed = MODEL | {"vae/diffusion_pytorch_model.safetensors": safetensors(31)}
    hub.put_files("ann/sd", changed)
    hub.statuses.clear()
    with await get(weights, base("ann/sd")) as folder:
        assert folder.name != before
        assert files_in(folder) == changed
    assert hub.statuses == {304: len(MODEL) - 1, 200: 2}


async def test_listings_are_kept_for_the_latest_repositories(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_LISTINGS", 2)
    weights = place.open()
    for name in "abcb":
        hub.put(f"ann/{name}", only=safetensors(1))
        await read(weights, f"ann/{name}")
    await read(weights, "ann/a")
    asked = {name: hub.asked[listing(f"ann/{name}")] for name in "abc"}
    assert asked == {"a": 2, "b": 1, "c": 1}


async def test_progress_names_the_component_and_counts_the_files(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put_files("ann/sd", MODEL | {"unet/diffusion_pytorch_model.safetensors": safetensors(2 * 10**6)})
    lines: list[str] = []
    (await place.open().locate(base("ann/sd"), BASE, lines.append)).release()
    assert sorted(lines) == [
        "downloading ann/sd: text_encoder (3 of 3): 0 of 0 MB",
        "downloading ann/sd: unet (1 of 3): 0 of 2 MB",
        "downloading ann/sd: vae (2 of 3): 0 of 0 MB",
    ]


# -- the bound


async def test_a_model_in_use_stays_whole_and_goes_later(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    hub.files["/x"] = safetensors(300)
    size = sum(map(len, MODEL.values()))
    weights = place.open(cache_bytes=size + 100)
    with await get(weights, base("ann/sd")) as folder:
        await read(weights, f"{hub.url}/x")
        assert files_in(folder) == MODEL
    await read(weights, f"{hub.url}/x")
    assert name_of(safetensors(300)) in place.kept()
    assert not folder.exists() and len(place.kept()) < 4
    with await get(weights, base("ann/sd")) as again:  # what had gone comes again
        assert again == folder and files_in(again) == MODEL


async def test_models_share_the_files_that_they_have_in_common(place: Place, hub: Hub) -> None:
    hub.put_files("ann/one", MODEL)
    hub.put_files("ann/two", MODEL | {"unet/diffusion_pytorch_model.safetensors": safetensors(21)})
    weights = place.open()
    for repo in ("ann/one", "ann/two"):
        await contents(weights, base(repo))
    assert len(place.kept()) == 4


async def test_a_damaged_text_is_found(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    weights = place.open()
    await contents(weights, base("ann/sd"))
    assert weights.check_integrity() == []
    [path, *_] = sorted(place.cache.glob("*.text"))
    path.write_bytes(b"rot")
    assert weights.check_integrity() == [path.name]
    assert await contents(weights, base("ann/sd")) == MODEL


# -- leftovers


async def test_leftovers_of_the_dead_are_swept(place: Place, hub: Hub) -> None:
    hub.put_files("ann/sd", MODEL)
    weights = place.open()
    draft, broken = place.cache / "folders.draft", place.cache / "folders" / ("0" * 64)
    for folder, target in ((draft, "/etc"), (broken, "/absent")):
        (folder / "half").mkdir(parents=True)
        (folder / "half" / "link").symlink_to(target)
    with await get(weights, base("ann/sd")) as path:
        assert not draft.exists() and files_in(path) == MODEL
        draft.mkdir()
        place.open()
        assert not draft.exists() and not broken.exists() and Path("/etc").is_dir()
        assert files_in(path) == MODEL


async def test_a_folder_that_cannot_be_finished_is_not_seen(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put_files("ann/sd", MODEL)
    weights = place.open()
    made = itertools.count()
    link = Path.symlink_to

    def full(self: Path, target: Any) -> None:
        if next(made) == 3:
            raise OSError("No space left on device")
        link(self, target)

    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(OSError, match="No space"):
        await get(weights, base("ann/sd"))
    assert list((place.cache / "folders").iterdir()) == []
    assert await contents(weights, base("ann/sd")) == MODEL
    assert drafts(place) == set()
    assert all(cache._evict(path) for path in place.cache.glob("*.safetensors"))  # none is pinned
