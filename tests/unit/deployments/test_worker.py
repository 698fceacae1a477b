"""A worker on the embedded FLUX: jobs in, updates out."""

import asyncio
import base64
import io
import os
import signal
import tarfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save, save_file

from deployments import metrics
from deployments.affinity import Tier
from deployments.files.store import FileStore, open_files
from deployments.worker.worker import Worker
from pipelines import zoo
from pipelines.base import Assets, Glimpse, Outcome
from pipelines.registry import ENDPOINTS, endpoint
from pipelines.sd import loading
from schemas.assets import Asset, AssetKind, weights
from schemas.endpoints import flux_general_rf_inversion as general
from schemas.endpoints import lora_image_to_image as anything
from schemas.endpoints.flux_dev import Input, Output
from schemas.errors import AssetError, InputError, NoRoom, RequestFailed
from schemas.jobs import Job, JobResult, Logged, Previewed, Priority, Update
from schemas.settings import BaseSettings, FetchSettings, Limits, ModelSettings, SpeedSettings, WeightSettings
from tests.support.fields import TestT, shows
from tests.support.hostile_pictures import REFUSED, many_scans
from tests.support.hub import Hub, serving
from tests.support.jobs import ENDPOINT, make_job

FIELDS = {"prompt": "x", "image_size": {"width": 64, "height": 48}, "num_inference_steps": 2, "seed": 5}
BLACK = ((0, 0),) * 3
Make = Callable[..., Worker]


@pytest.fixture(scope="session")
def safety_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.locate("safety-checker", tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def flag_all_folder(safety_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checker for which no picture is safe."""
    folder = tmp_path_factory.mktemp("strict")
    checker: Any = StableDiffusionSafetyChecker.from_pretrained(safety_folder, subfolder="safety_checker")
    checker.concept_embeds_weights.data.fill_(-9)
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").symlink_to(safety_folder / "feature_extractor")
    return folder


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return open_files(f"file://{tmp_path}/files")


@pytest.fixture
def make_worker(flux_folder: Path, files: FileStore) -> Iterator[Make]:
    workers: list[Worker] = []

    def make(**settings: Any) -> Worker:
        known = {"model": str(flux_folder), "endpoints": (ENDPOINT,), "max_sequence_length": 32}
        workers.append(Worker(ModelSettings(**{**known, "cpu_threads": 1, **settings}), files))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


async def updates(worker: Worker, job: Job) -> list[Update]:
    return [update async for update in worker.generate(job)]


async def result(worker: Worker, **fields: Any) -> JobResult:
    *_, last = await updates(worker, make_job(input=FIELDS | fields))
    assert last.result is not None
    return last.result


def lines(told: list[Update]) -> list[str]:
    return [e.message for update in told for e in update.events if isinstance(e, Logged)]


def picture(url: str) -> Image.Image:
    """What is behind the URL of an answer: in it, or in the store."""
    if url.startswith("file://"):
        return Image.open(url.removeprefix("file://"))
    kind, _, data = url.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:{image.get_format_mimetype()}"
    return image


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(size: tuple[int, int]) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(size)).decode()}"


def has(endpoint_id: str, field: str) -> bool:
    return field in endpoint(endpoint_id).input_type().model_fields


def shows_everywhere(field: str) -> Callable[[TestT], TestT]:
    """`shows` for every endpoint that has the field."""

    def mark(test: TestT) -> TestT:
        for endpoint_id in ENDPOINTS:
            if has(endpoint_id, field):
                test = shows(endpoint_id, field)(test)
        return test

    return mark


EVERY = pytest.mark.parametrize("endpoint_id", ENDPOINTS)
Answer = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def answer(make_worker: Make, flux_folder: Path) -> Answer:
    """What an endpoint answers to a request for a picture of 64 × 64."""
    root = flux_folder.parent
    families: dict[str, Callable[[], dict[str, str]]] = {
        "flux": dict,
        "sd": lambda: {
            "model": str(zoo.locate("sdxl", root)),
            "controlnet": str(zoo.locate("sdxl-canny", root)),
        },
    }

    async def answer(
        endpoint_id: str, settings: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        model = families[endpoint(endpoint_id).family]()
        worker = make_worker(endpoints=(endpoint_id,), **model, **(settings or {}))
        pictures = [name for name in ("image_url", "control_image_url") if has(endpoint_id, name)]
        known = FIELDS | dict.fromkeys(pictures, data_uri((64, 64)))
        known["image_size"] = {"width": 64, "height": 64}
        if has(endpoint_id, "model_name"):
            known["model_name"] = model["model"]
        *_, last = await updates(worker, make_job(endpoint_id=endpoint_id, input=known | fields))
        assert last.result is not None
        return last.result.output()

    return answer


async def test_every_step_is_told_once_and_the_result_comes_last(make_worker: Make) -> None:
    told = await updates(make_worker(), make_job(input=FIELDS | {"num_inference_steps": 6}))
    steps = [line for line in lines(told) if line.startswith("step")]
    assert steps == [f"step {k}/6" for k in range(1, 7)]
    assert [update.result is None for update in told] == [True] * (len(told) - 1) + [False]


async def test_pictures_are_kept_and_their_urls_lead_to_the_callers_server(
    make_worker: Make, files: FileStore
) -> None:
    worker = make_worker()
    *_, last = await updates(worker, make_job(input=FIELDS | {"num_images": 2}, base_url="http://box"))
    assert last.result is not None
    output = Output.model_validate(last.result.output())
    assert [(image.width, image.height, image.content_type) for image in output.images] == [
        (64, 48, "image/jpeg")
    ] * 2
    for image in output.images:
        stored = await files.open(image.url.removeprefix("http://box/files/"))
        assert stored is not None
        data = b"".join([chunk async for chunk in stored.chunks])
        assert len(data) == stored.size
        with Image.open(io.BytesIO(data)) as decoded:
            assert (decoded.format, decoded.size) == ("JPEG", (64, 48))
    stages = ["fetch", "adapters", "encode", "denoise", "decode", "upload"]
    assert list(output.timings) == ["queue", "inference", *stages, "steps_per_second", "rows"]
    assert output.timings["inference"] == pytest.approx(
        sum(output.timings[each] for each in stages), abs=1e-3
    )
    assert 1 <= output.timings["rows"] <= 2
    assert output.timings["steps_per_second"] > 0
    assert output.seed == 5


async def test_what_is_traded_for_speed_is_named_in_the_timings(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.flux.model.THRESHOLDS", {"high": 1.0})
    speed = SpeedSettings(quantisation="fp8", acceleration="high")
    worker = make_worker(dtype="bfloat16", speed=speed)
    told = await updates(worker, make_job(input=FIELDS | {"num_inference_steps": 4}))
    assert any(line.startswith("in float8 (") for line in lines(told))
    assert told[-1].result is not None
    timings = told[-1].result.output()["timings"]
    assert (timings["float8_layers"], timings["steps_skipped"]) == (34, 3)


async def test_the_wait_before_the_start_is_told_and_is_no_part_of_the_work(make_worker: Make) -> None:
    *_, last = await updates(make_worker(), make_job(input=FIELDS, waited_s=600))
    assert last.result is not None
    timings = last.result.output()["timings"]
    assert 600 <= timings["queue"] < 700
    assert timings["inference"] < 600


async def test_the_log_says_in_which_numbers_and_by_which_attention(make_worker: Make) -> None:
    told = lines(await updates(make_worker(), make_job(input=FIELDS)))
    assert told[:2] == ["in float32, by sdpa attention", "step 1/2"]


async def test_a_short_job_of_normal_priority_passes_a_long_one_of_low(make_worker: Make) -> None:
    worker, ends = make_worker(batch_rows=1), list[str]()
    has_begun = asyncio.Event()

    async def follow(name: str, job: Job) -> None:
        async for update in worker.generate(job):
            if any(isinstance(each, Logged) and each.message.startswith("step") for each in update.events):
                has_begun.set()
        ends.append(name)

    long = FIELDS | {"num_inference_steps": 50, "num_images": 4}
    async with asyncio.TaskGroup() as group:
        group.create_task(follow("long", make_job(input=long, priority=Priority.LOW)))
        await has_begun.wait()
        group.create_task(follow("short", make_job(input=FIELDS)))
    assert ends == ["short", "long"]


@shows_everywhere("sync_mode")
@pytest.mark.parametrize("endpoint_id", [each for each in ENDPOINTS if has(each, "sync_mode")])
async def test_sync_mode_puts_the_picture_into_the_answer_and_not_into_the_store(
    answer: Answer, tmp_path: Path, endpoint_id: str
) -> None:
    stored, inline = [
        (await answer(endpoint_id, sync_mode=mode))["images"][0]["url"] for mode in (False, True)
    ]
    assert stored.startswith("file://")
    with picture(inline) as image:
        assert image.size == (64, 64)
    assert len(list((tmp_path / "files").iterdir())) == 1


FORMATS = [
    (each, name) for each in ENDPOINTS for name in ("output_format", "image_format") if has(each, name)
]


@shows_everywhere("output_format")
@shows_everywhere("image_format")
@pytest.mark.parametrize("format", ["jpeg", "png"])
@pytest.mark.parametrize(("endpoint_id", "field"), FORMATS)
async def test_pictures_are_in_the_format_asked_for(
    answer: Answer, endpoint_id: str, field: str, format: str
) -> None:
    output = await answer(endpoint_id, sync_mode=True, **{field: format})
    assert output["images"][0]["content_type"] == f"image/{format}"
    with picture(output["images"][0]["url"]) as image:
        assert image.format == format.upper()


@shows_everywhere("enable_safety_checker")
@EVERY
async def test_unsafe_pictures_are_black_flagged_and_of_the_same_size(
    answer: Answer, flag_all_folder: Path, endpoint_id: str
) -> None:
    strict = {"safety_checker": str(flag_all_folder)}
    checked = await answer(endpoint_id, strict, sync_mode=True, num_images=2, enable_safety_checker=True)
    assert checked["has_nsfw_concepts"] == [True, True]
    for each in checked["images"]:
        with picture(each["url"]) as image:
            assert image.size == (64, 64)
            assert image.getextrema() == BLACK
    unchecked = await answer(endpoint_id, strict, sync_mode=True, enable_safety_checker=False)
    assert unchecked["has_nsfw_concepts"] == [False]
    with picture(unchecked["images"][0]["url"]) as image:
        assert image.getextrema() != BLACK


async def test_safe_pictures_pass_the_checker(make_worker: Make, safety_folder: Path) -> None:
    worker = make_worker(safety_checker=str(safety_folder))
    assert (await result(worker)).output()["has_nsfw_concepts"] == [False]


async def test_a_check_that_cannot_be_made_is_said(make_worker: Make) -> None:
    assert any(
        "no safety checker" in line for line in lines(await updates(make_worker(), make_job(input=FIELDS)))
    )


async def test_concurrent_jobs_get_the_pictures_they_get_alone(make_worker: Make) -> None:
    worker = make_worker()
    alone = [(await result(worker, sync_mode=True, seed=seed)).output()["images"] for seed in range(4)]
    together = await asyncio.gather(*(result(worker, sync_mode=True, seed=seed) for seed in range(4)))
    for one, other in zip(alone, together, strict=True):
        with picture(one[0]["url"]) as a, picture(other.output()["images"][0]["url"]) as b:
            differences = np.asarray(a).astype(int) - np.asarray(b).astype(int)
            assert np.abs(differences).mean() < 0.1  # rounding, seen through JPEG; other seeds: above 20


async def test_a_request_without_a_seed_reports_the_one_drawn_and_it_works(make_worker: Make) -> None:
    worker = make_worker()
    drawn = (await result(worker, seed=None, sync_mode=True)).output()
    assert 0 <= drawn["seed"] < 2**32
    again = (await result(worker, seed=drawn["seed"], sync_mode=True)).output()
    assert again["images"] == drawn["images"]


async def test_previews_come_when_they_are_asked_for(make_worker: Make) -> None:
    fields = FIELDS | {"num_inference_steps": 8}
    told = await updates(make_worker(), make_job(input=fields, previews=True))
    [first, *_] = [e for update in told for e in update.events if isinstance(e, Previewed)]
    Output.model_validate(first.output)
    with picture(first.output["images"][0]["url"]) as image:
        assert max(image.size) <= 256
    told = await updates(make_worker(), make_job(input=fields))
    assert not [e for update in told for e in update.events if isinstance(e, Previewed)]


async def test_leaving_frees_the_engine(make_worker: Make) -> None:
    worker = make_worker()
    job = make_job(input=FIELDS | {"num_inference_steps": 50, "image_size": "square_hd"})
    generator = worker.generate(job)
    async for update in generator:
        if update.events:
            break
    assert len(worker._engine) == 1
    await generator.aclose()
    async with asyncio.timeout(10):
        while len(worker._engine):  # the task's own end runs on the loop
            await asyncio.sleep(0)


async def test_a_failure_of_the_model_is_a_500_under_the_request_id(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make_worker()
    job = make_job(input=FIELDS)

    def explode(*_: Any) -> None:
        raise RuntimeError("CUDA error: secret detail")

    monkeypatch.setattr(worker._pipelines[ENDPOINT].model, "encode_prompt", explode)
    [*_, last] = await updates(worker, job)
    assert last.result is not None
    assert (last.result.status, last.result.error_type) == (500, "internal_server_error")
    assert job.request_id in str(last.result.body)
    assert "secret detail" not in str(last.result.body)
    assert [r for r in caplog.records if job.request_id in r.getMessage()]


async def test_the_worker_keeps_to_its_own_limits(make_worker: Make) -> None:
    worker = make_worker(limits=Limits(max_pixels=64 * 64))
    assert (await result(worker)).status == 200
    refused = await result(worker, image_size={"width": 65, "height": 64})
    assert (refused.status, refused.error_type) == (422, "validation_error")


async def test_a_direct_call_is_typed_and_raises(make_worker: Make) -> None:
    worker = make_worker()
    output = await worker.run(ENDPOINT, Input.model_validate(FIELDS))
    assert isinstance(output, Output)
    assert output.images[0].url.startswith("file:///")
    with pytest.raises(RequestFailed) as raised:
        await worker.run("fal-ai/other", Input.model_validate(FIELDS))
    assert raised.value.status == 404


# -- what is held for a job beside the model


class Room:
    """A pipeline's `hold` that waits, for jobs with the prompt "wait", until it is opened."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.told: list[str] = []
        self._pipeline = worker._pipelines[ENDPOINT]
        finish = self._pipeline.finish

        def finished(sample: Any) -> Any:
            self.told.append("finish")
            return finish(sample)

        monkeypatch.setattr(self._pipeline, "hold", self.hold)
        monkeypatch.setattr(self._pipeline, "finish", finished)

    def hold(self, request: Any, assets: Assets) -> ExitStack:
        if request.prompt == "wait":
            self.told.append("wait")
            assert self.opened.wait(20)
        self.told.append("hold")
        held = ExitStack()
        held.callback(self.told.append, "let go")
        return held


async def test_a_job_that_waits_for_room_stops_no_other(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(concurrency=2)
    room = Room(worker, monkeypatch)
    waiting = asyncio.create_task(result(worker, prompt="wait"))
    await became(lambda: room.told == ["wait"])
    for _ in range(2):
        assert (await result(worker)).status == 200
    assert not waiting.done()
    room.opened.set()
    assert (await waiting).status == 200


async def test_what_is_held_stays_until_the_pictures_are_decoded(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    room = Room(worker, monkeypatch)
    assert (await result(worker, num_images=2)).status == 200
    assert room.told == ["hold", "finish", "finish", "let go"]


async def test_a_job_that_is_given_up_while_it_waits_for_room_holds_none(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(concurrency=1)
    room = Room(worker, monkeypatch)
    waiting = asyncio.create_task(result(worker, prompt="wait"))
    await became(lambda: room.told == ["wait"])
    waiting.cancel()
    await asyncio.sleep(0.1)
    assert room.told == ["wait"]
    room.opened.set()
    await became(lambda: room.told == ["wait", "hold", "let go"])
    assert (await result(worker)).status == 200


async def test_a_job_that_waits_for_room_does_not_stop_the_end(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    room = Room(worker, monkeypatch)
    waiting = asyncio.create_task(result(worker, prompt="wait"))
    await became(lambda: room.told == ["wait"])
    worker.close()
    room.opened.set()
    waiting.cancel()
    await became(lambda: room.told[-1] == "let go")


async def test_what_cannot_be_held_is_told_of_its_field(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()

    def hold(request: Any, assets: Assets) -> ExitStack:
        raise AssetError("It does not fit.", "file_too_large").at(("body", "model_name"))

    monkeypatch.setattr(worker._pipelines[ENDPOINT], "hold", hold)
    refused = await result(worker)
    assert refused.status == 422
    assert refused.body["detail"][0]["loc"] == ["body", "model_name"]


# -- what comes out besides


@pytest.fixture
def outcome_of(make_worker: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Outcome]]:
    """What a pipeline is given to answer with; it has traced two pictures."""
    colours = {"0_0001": "red", "0_0002": "white"}
    traced = [Glimpse(0, name, Image.new("RGB", (8, 6), colour)) for name, colour in colours.items()]

    async def outcome_of(settings: dict[str, Any], **fields: Any) -> Outcome:
        worker = make_worker(**settings)
        pipeline = worker._pipelines[ENDPOINT]
        found: list[Outcome] = []
        answer = pipeline.answer

        def told(request: Any, outcome: Outcome) -> Any:
            found.append(outcome)
            return answer(request, outcome)

        monkeypatch.setattr(pipeline, "traces", lambda generation: {"debug_latents": iter(traced)})
        monkeypatch.setattr(pipeline, "answer", told)
        *_, last = await updates(worker, make_job(input=FIELDS | fields, base_url="http://box"))
        assert last.result is not None and last.result.status == 200
        return found[-1]

    return outcome_of


async def stored(files: FileStore, url: str) -> tuple[str, bytes]:
    """The type and the bytes of a file in the store."""
    found = await files.open(url.removeprefix("http://box/files/"))
    assert found is not None
    return found.content_type, b"".join([chunk async for chunk in found.chunks])


async def test_files_are_kept_as_long_as_the_caller_wants(make_worker: Make, files: FileStore) -> None:
    job = make_job(input=FIELDS, base_url="http://box", keep_s=60)
    *_, last = await updates(make_worker(), job)
    assert last.result is not None
    [image] = last.result.output()["images"]
    found = await files.open(image["url"].removeprefix("http://box/files/"))
    assert found is not None and found.left_s is not None and 0 < found.left_s <= 60


@pytest.mark.parametrize("flags", [False, True])
async def test_traces_are_tars_of_checked_pictures(
    outcome_of: Callable[..., Awaitable[Outcome]],
    files: FileStore,
    safety_folder: Path,
    flag_all_folder: Path,
    flags: bool,
) -> None:
    checker = flag_all_folder if flags else safety_folder
    outcome = await outcome_of({"safety_checker": str(checker)}, enable_safety_checker=True)
    [(field, file)] = outcome.traces.items()
    kind, data = await stored(files, file.url)
    assert field == "debug_latents"
    assert (file.content_type, file.file_name, file.file_size) == (kind, "debug_latents.tar", len(data))
    assert kind == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["0_0001.png", "0_0002.png"]
        for name, colour in zip(tar.getnames(), ((255, 0, 0), (255, 255, 255)), strict=True):
            member = tar.extractfile(name)
            assert member is not None
            with Image.open(member) as image:
                assert (image.format, image.size) == ("PNG", (8, 6))
                assert image.getpixel((0, 0)) == ((0, 0, 0) if flags else colour)


async def test_a_pictures_file_is_told_in_full(
    outcome_of: Callable[..., Awaitable[Outcome]], files: FileStore
) -> None:
    [kept] = (await outcome_of({})).pictures
    kind, data = await stored(files, kept.url)
    assert (kept.content_type, kept.file_size, kept.width, kept.height) == (kind, len(data), 64, 48)
    assert kept.url == f"http://box/files/{kept.file_name}"
    [inline] = (await outcome_of({}, sync_mode=True)).pictures
    head, _, body = inline.url.partition(",")
    assert head == "data:image/jpeg;base64"
    assert (inline.content_type, inline.file_name) == ("image/jpeg", "image.jpeg")
    assert inline.file_size == len(base64.b64decode(body))


ANYTHING = "fal-ai/lora/image-to-image"
REMAKE = "fal-ai/flux-lora/image-to-image"


@pytest.fixture
def lora_file(flux_folder: Path, tmp_path: Path) -> Path:
    transformer = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer")
    target = "transformer_blocks.0.attn.to_q"
    rows, columns = transformer.get_submodule(target).weight.shape
    tensors = {
        f"transformer.{target}.lora_A.weight": torch.ones(2, columns),
        f"transformer.{target}.lora_B.weight": torch.ones(rows, 2),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.fixture
def remake(make_worker: Make, lora_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run flux-lora/image-to-image on a worker that knows a LoRA by the name `style`."""
    weights = WeightSettings(cache=f"file://{tmp_path}/weights", names={"style": str(lora_file)})
    worker = make_worker(endpoints=(ENDPOINT, REMAKE), weights=weights)

    async def run(**fields: Any) -> JobResult:
        known = {"prompt": "x", "num_inference_steps": 2, "seed": 5, "image_url": data_uri((64, 48))}
        job = make_job(endpoint_id=REMAKE, input=known | {"sync_mode": True} | fields)
        *_, last = await updates(worker, job)
        assert last.result is not None
        assert worker._pipelines[REMAKE].model._bank.pins == 0
        return last.result

    return run


async def test_a_start_picture_is_remade_in_its_own_size_and_in_the_format_asked_for(
    remake: Callable[..., Any],
) -> None:
    output = (await remake(output_format="png")).output()
    with picture(output["images"][0]["url"]) as image:
        assert (image.format, image.size) == ("PNG", (64, 48))


async def test_a_lora_named_in_the_request_changes_the_picture(remake: Callable[..., Any]) -> None:
    plain, styled = [
        (await remake(loras=loras)).output()["images"] for loras in ([], [{"path": "style", "scale": 2}])
    ]
    assert plain != styled


async def test_every_file_that_cannot_be_had_is_named_at_once(remake: Callable[..., Any]) -> None:
    refused = await remake(
        image_url="http://127.0.0.1/cat.png", loras=[{"path": "style"}, {"path": "../etc/passwd"}]
    )
    assert (refused.status, refused.error_type) == (422, "validation_error")
    found = {tuple(fault["loc"]) for fault in refused.body["detail"]}
    assert found == {("body", "image_url"), ("body", "loras", 1, "path")}


@pytest.mark.parametrize(
    ("image_url", "kind"),
    [
        ("data:image/png;base64,AAAA", "unsupported_image_format"),
        ("data:text/html,<b>no</b>", "unsupported_image_format"),
        (data_uri((64, 48))[:-40], "image_load_error"),  # cut short
        ("data:image/png;base64,!", "file_download_error"),
    ],
)
async def test_a_picture_that_is_none_is_refused_with_fals_word_for_it(
    remake: Callable[..., Any], image_url: str, kind: str
) -> None:
    refused = await remake(image_url=image_url)
    [fault] = refused.body["detail"]
    assert (fault["loc"], fault["type"]) == (["body", "image_url"], kind)


# row 15 of the threat model: a picture made to harm costs nobody else anything
@pytest.mark.parametrize(
    "name", ["PNG of 50,000 x 50,000", "PNG with a note of 100 MB", "JPEG of markers only"]
)
async def test_t15_a_hostile_picture_fails_its_request_and_no_other(
    remake: Callable[..., Any], name: str
) -> None:
    harm = f"data:image/png;base64,{base64.b64encode(REFUSED[name]()).decode()}"
    refused, fine = await asyncio.gather(remake(image_url=harm), remake())
    [fault] = refused.body["detail"]
    assert refused.status == 422 and fault["loc"] == ["body", "image_url"]
    assert fine.status == 200 and (await remake()).status == 200


async def test_t15_a_picture_that_ends_its_process_is_a_422_of_its_field(
    make_worker: Make, files: FileStore
) -> None:
    worker = make_worker(endpoints=(REMAKE,))
    key = await files.save(many_scans(2000), "image/jpeg")
    job = make_job(
        endpoint_id=REMAKE,
        input={"prompt": "x", "image_url": f"http://box/files/{key}", "num_inference_steps": 1},
        base_url="http://box",
    )
    waiting = asyncio.create_task(updates(worker, job))
    [pid] = worker.intake._decoders.pids()
    ticks = 0
    while ticks < 20:  # it has begun
        await asyncio.sleep(0.01)
        ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    os.kill(pid, signal.SIGKILL)
    *_, last = await waiting
    assert last.result is not None and last.result.status == 422
    [fault] = last.result.body["detail"]
    assert (fault["loc"], fault["type"]) == (["body", "image_url"], "image_load_error")
    worker.check_health()
    again = make_job(
        endpoint_id=REMAKE,
        input={"prompt": "x", "image_url": data_uri((64, 48)), "num_inference_steps": 1, "sync_mode": True},
    )
    *_, last = await updates(worker, again)
    assert last.result is not None and last.result.status == 200


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (15, 17)])
async def test_t15_a_tiny_or_thin_picture_is_remade_or_refused(
    remake: Callable[..., Any], size: tuple[int, int]
) -> None:
    told = await remake(image_url=data_uri(size), strength=0.9)
    assert told.status in (200, 422), told.body
    if told.status == 422:
        assert told.body["detail"][0]["loc"] in (["body", "image_url"], ["body", "image_size"])
    assert (await remake()).status == 200


Fetch = Callable[[dict[str, Any]], Awaitable[Assets]]


@pytest.fixture
def fetch(make_worker: Make, tmp_path: Path) -> Fetch:
    """What a worker fetches for a request of many files."""
    worker = make_worker(
        fetch=FetchSettings(allowed_networks=("127.0.0.0/8",), allowed_ports=()),
        weights=WeightSettings(cache=f"file://{tmp_path}/weights"),
    )

    async def fetched(fields: dict[str, Any]) -> Assets:
        request = general.Input.model_validate({"prompt": "x"} | fields)
        async with AsyncExitStack() as stack:
            return await worker.intake.fetch(make_job(), request, stack, lambda event: None)

    return fetched


async def test_every_file_is_fetched_once_for_all_fields_that_name_it(fetch: Fetch) -> None:
    async with serving() as hub:
        cat, net, config = (f"{hub.url}/{name}" for name in ("cat.png", "net.safetensors", "config.json"))
        hub.files = {"/cat.png": png((8, 6)), "/config.json": b'{"num_layers": 1}'}
        hub.files["/net.safetensors"] = save({"a": torch.zeros(1)})
        control = {"path": net, "config_url": config, "control_image_url": cat}
        files = await fetch({"image_url": cat, "loras": [{"path": net}], "controlnets": [control] * 2})
        assert hub.asked == {"/cat.png": 1, "/net.safetensors": 1, "/config.json": 1}
    controls = [("body", "controlnets", index) for index in range(2)]
    assert set(files.images) == {("body", "image_url"), *((*loc, "control_image_url") for loc in controls)}
    assert {picture.size for picture in files.images.values()} == {(8, 6)}
    assert len({id(picture) for picture in files.images.values()}) == 1
    assert set(files.weights) == {("body", "loras", 0, "path"), *((*loc, "path") for loc in controls)}
    assert files.configs == {(*loc, "config_url"): b'{"num_layers": 1}' for loc in controls}


async def test_a_file_that_is_none_is_named_by_all_its_fields(fetch: Fetch) -> None:
    async with serving() as hub:
        page, lost = f"{hub.url}/page", f"{hub.url}/lost"
        hub.files["/page"] = b"<!doctype html>"
        control = {"path": page, "config_url": page, "control_image_url": lost}
        with pytest.raises(InputError) as raised:
            await fetch({"image_url": lost, "controlnets": [control], "loras": [{"path": page}]})
        assert hub.asked["/lost"] == 1
    net = ("body", "controlnets", 0)
    faults = {fault.loc: fault.type for fault in raised.value.fields}
    assert faults == {
        ("body", "image_url"): "file_download_error",
        ("body", "loras", 0, "path"): "file_download_error",
        (*net, "path"): "file_download_error",
        (*net, "config_url"): "file_download_error",
        (*net, "control_image_url"): "file_download_error",
    }


@pytest.fixture
def named_in_full(make_worker: Make, tmp_path: Path) -> Callable[[str], Worker]:
    """A worker that fetches from a hub at a URL."""

    def make(hub_url: str) -> Worker:
        return make_worker(
            fetch=FetchSettings(allowed_networks=("127.0.0.0/8",), allowed_ports=()),
            weights=WeightSettings(cache=f"file://{tmp_path}/weights", hub_url=hub_url),
            bases=BaseSettings(allow=("ann/*",), names={"tiny": "zoo:sd15"}),
            faces={"buffalo": str(tmp_path)},
        )

    return make


def full_request(cat: str) -> anything.Input:
    """A request that names weights of every kind on the Hub."""
    adapter = {"path": "ann/ip", "model_subfolder": "models", "weight_name": "ip.bin"}
    fields = {
        "prompt": "x",
        "model_name": "ann/sd",
        "unet_name": "ann/unet/unet.safetensors",
        "image_encoder_path": "ann/ip",
        "image_encoder_subfolder": "models/encoder",
        "ic_light_model_url": "ann/light",
        "ic_light_image_url": cat,
        "loras": [{"path": "ann/lora"}],
        "embeddings": [{"path": "ann/words"}],
        "controlnets": [{"path": "ann/net", "image_url": cat}],
        "ip_adapter": [adapter | {"ip_adapter_image_url": cat, "insight_face_model_path": "buffalo"}],
    }
    return anything.Input.model_validate(fields)


def put_everything(hub: Hub) -> None:
    """What the request names."""
    data = save({"a": torch.zeros(1)})
    hub.files["/cat.png"] = png((8, 6))
    hub.put_folder("ann/sd", zoo.locate("sd15"))
    hub.put("ann/unet", unet=data)
    hub.put("ann/light", light=data)
    hub.put("ann/lora", pytorch_lora_weights=data)
    hub.put("ann/words", learned_embeds=data)
    hub.put("ann/net", diffusion_pytorch_model=data)
    encoder = {"config.json": b"{}", "model.safetensors": data, "pytorch_model.bin": b"\x80"}
    encoder = {f"models/encoder/{name}": each for name, each in encoder.items()}
    hub.put_files("ann/ip", {"models/ip.bin": b"\x80", "models/ip.safetensors": data, **encoder})


WEIGHTS_FIELDS = {
    ("body", "model_name"),
    ("body", "unet_name"),
    ("body", "image_encoder_path"),
    ("body", "ic_light_model_url"),
    ("body", "loras", 0, "path"),
    ("body", "embeddings", 0, "path"),
    ("body", "controlnets", 0, "path"),
    ("body", "ip_adapter", 0, "path"),
    ("body", "ip_adapter", 0, "insight_face_model_path"),
}


async def test_weights_of_every_kind_are_fetched_ahead_and_then_there(
    named_in_full: Callable[[str], Worker], tmp_path: Path
) -> None:
    async with serving() as hub:
        put_everything(hub)
        worker, request = named_in_full(hub.url), full_request(f"{hub.url}/cat.png")
        await worker.intake.keep(make_job(), weights(request))
        ahead = set(hub.asked)
        async with AsyncExitStack() as stack:
            files = await worker.intake.fetch(make_job(), request, stack, lambda event: None)
            assert set(files.weights) == WEIGHTS_FIELDS
            assert (files.weights["body", "model_name"] / "unet" / "config.json").is_file()
            assert {each.name for each in files.weights["body", "image_encoder_path"].iterdir()} == {
                "config.json",
                "model.safetensors",
            }
            assert files.weights["body", "ip_adapter", 0, "insight_face_model_path"] == tmp_path
        assert set(hub.asked) - ahead == {"/cat.png"} and set(hub.asked.values()) == {1}
        assert not [path for path in hub.asked if path.endswith(".bin")]


async def test_every_weights_file_that_cannot_be_had_is_named(named_in_full: Callable[[str], Worker]) -> None:
    async with serving() as hub:
        hub.files["/cat.png"] = png((8, 6))
        request = full_request(f"{hub.url}/cat.png")
        request = request.model_copy(update={"model_name": "eve/sd"})
        adapter = request.ip_adapter[0].model_copy(update={"insight_face_model_path": "eve/faces"})
        request = request.model_copy(update={"ip_adapter": [adapter]})
        with pytest.raises(InputError) as raised:
            async with AsyncExitStack() as stack:
                await named_in_full(hub.url).intake.fetch(make_job(), request, stack, lambda event: None)
    faults = {fault.loc: fault.msg for fault in raised.value.fields}
    assert set(faults) == WEIGHTS_FIELDS
    assert faults["body", "model_name"].startswith("This server does not serve this model. It serves tiny")
    assert faults["body", "ip_adapter", 0, "insight_face_model_path"].endswith("for faces are buffalo.")


async def test_the_model_of_the_start_is_named_without_a_download(
    named_in_full: Callable[[str], Worker],
) -> None:
    async with serving() as hub:
        worker = named_in_full(hub.url)
        for source, path in (
            (worker._settings.model, Path(worker._settings.model)),
            ("tiny", zoo.locate("sd15")),
        ):
            request = anything.Input(prompt="x", model_name=source)
            async with AsyncExitStack() as stack:
                files = await worker.intake.fetch(make_job(), request, stack, lambda event: None)
            assert files.weights == {("body", "model_name"): path}
        assert not hub.asked


async def test_a_model_of_the_hub_is_loaded_once_for_all_who_name_it(
    make_worker: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    inspect = loading.inspect

    def noted(source: Any, *args: Any, **more: Any) -> Any:
        loaded.append(source)
        return inspect(source, *args, **more)

    monkeypatch.setattr(loading, "inspect", noted)
    async with serving() as hub:
        hub.put_folder("ann/sd", zoo.locate("sd15"))
        worker = make_worker(
            model=str(zoo.locate("sdxl")),
            endpoints=(ANYTHING,),
            fetch=FetchSettings(allowed_networks=("127.0.0.0/8",), allowed_ports=()),
            weights=WeightSettings(cache=f"file://{tmp_path}/weights", hub_url=hub.url),
        )
        fields = {"prompt": "x", "model_name": "ann/sd", "num_inference_steps": 2}
        job = make_job(endpoint_id=ANYTHING, input=fields | {"image_url": data_uri((64, 64))})
        for _ in range(2):
            *_, last = await updates(worker, job)
            assert last.result is not None and last.result.status == 200
    assert len(loaded) == 2 and set(hub.asked.values()) == {1}  # the model of the start, and this one
    assert tiers(worker, job) == [Tier.DEVICE]
    start = make_job(endpoint_id=ANYTHING, input=job.input | {"model_name": str(zoo.locate("sdxl"))})
    await updates(worker, start)
    assert tiers(worker, start) == [Tier.DEVICE]


def tiers(worker: Worker, job: Job) -> list[Tier | None]:
    """Where a worker holds what the router is told that a job needs."""
    request = endpoint(job.endpoint_id).input_type().model_validate(job.input)
    held = worker.intake.holdings()
    return [each.tier if (each := held.get(asset.digest)) else None for asset in weights(request)]


# -- weights fetched ahead


STYLE = "/style.safetensors"
LONG = FIELDS | {"num_inference_steps": 50, "image_size": "square_hd"}


@pytest.fixture
async def hub(lora_file: Path) -> AsyncIterator[Hub]:
    async with serving() as hub:
        hub.files[STYLE] = lora_file.read_bytes()
        yield hub


@pytest.fixture
def make_eager(make_worker: Make, tmp_path: Path) -> Make:
    """A worker that may fetch from this machine."""

    def make(cache_bytes: int = 2**30, **settings: Any) -> Worker:
        return make_worker(
            endpoints=(ENDPOINT, REMAKE),
            fetch=FetchSettings(allowed_networks=("127.0.0.0/8",), allowed_ports=()),
            weights=WeightSettings(cache=f"file://{tmp_path}/weights", cache_bytes=cache_bytes),
            **settings,
        )

    return make


def styled(*urls: str, **fields: Any) -> Job:
    """A job that names these LoRAs."""
    named = {"prompt": "x", "num_inference_steps": 2, "image_url": data_uri((64, 48)), "sync_mode": True}
    return make_job(endpoint_id=REMAKE, input=named | {"loras": [{"path": url} for url in urls]} | fields)


async def became(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def begun(worker: Worker, job: Job) -> AsyncGenerator[Update]:
    """A run that has told of its first step."""
    run = worker.generate(job)
    async for update in run:
        if update.events:
            break
    return run


async def test_the_weights_of_the_next_job_come_while_one_runs_and_only_once(
    make_eager: Make, hub: Hub
) -> None:
    worker, job = make_eager(), styled(f"{hub.url}{STYLE}")
    running = await begun(worker, make_job(input=LONG))
    worker.prefetch(job)
    await became(lambda: not worker.intake._ahead)
    assert hub.asked == {STYLE: 1}
    assert len(worker._engine) == 1  # the first still runs
    await running.aclose()
    told = await updates(worker, job)
    assert told[-1].result is not None and told[-1].result.status == 200
    assert hub.asked == {STYLE: 1}
    assert not [line for line in lines(told) if line.startswith("downloading")]


async def test_a_worker_tells_where_it_holds_what_a_job_needs(make_eager: Make, hub: Hub) -> None:
    worker, job = make_eager(), styled(f"{hub.url}{STYLE}")
    assert tiers(worker, job) == [None]
    worker.prefetch(job)
    await became(lambda: not worker.intake._ahead)
    assert tiers(worker, job) == [Tier.DISK]
    await updates(worker, job)
    assert tiers(worker, job) == [Tier.DEVICE]


async def test_a_job_says_how_much_it_loads_which_a_second_one_need_not(make_eager: Make, hub: Hub) -> None:
    worker, job = make_eager(), styled(f"{hub.url}{STYLE}")
    first, second = [
        [line for line in lines(await updates(worker, job)) if line.startswith("loading")] for _ in range(2)
    ]
    [held] = worker.intake.holdings().values()
    assert first == [f"loading {held.nbytes / 1e6:,.1f} MB of weights"]
    assert second == []


async def test_the_metrics_hear_where_named_weights_were_and_where_they_lie(
    make_eager: Make, hub: Hub
) -> None:
    worker, job = make_eager(), styled(f"{hub.url}{STYLE}")
    told: list[tuple[str, float, str | None]] = []
    metrics.send_to(lambda metric, value, labels: told.append((metric.name, value, labels.get("tier"))))
    try:
        await updates(worker, job)
        await updates(worker, job)
        worker.measure(worker.intake.holdings().values())
    finally:
        metrics.send_to(None)
    assert [tier for name, _, tier in told if name == metrics.LOOKUPS.name] == ["none", "device"]
    held = {tier: value for name, value, tier in told if name == metrics.HELD.name}
    assert held == {
        "device": sum(each.nbytes for each in worker.intake.holdings().values()),
        "ram": 0,
        "disk": 0,
    }
    assert held["device"] > 0


async def test_a_job_joins_the_download_that_was_begun_for_it_and_tells_of_it(
    make_eager: Make, hub: Hub
) -> None:
    worker, job = make_eager(), styled(f"{hub.url}{STYLE}")
    hub.pause_s = 0.3
    worker.prefetch(job)
    await became(lambda: hub.asked.total() == 1)
    told = await updates(worker, job)
    assert told[-1].result is not None and told[-1].result.status == 200
    assert hub.asked == {STYLE: 1}
    assert len([line for line in lines(told) if line.startswith("downloading")]) == 1


async def test_a_job_that_is_given_up_leaves_the_download_to_its_end(make_eager: Make, hub: Hub) -> None:
    worker, job = make_eager(), styled(f"{hub.url}{STYLE}")
    hub.pause_s = 0.3
    worker.prefetch(job)
    await became(lambda: hub.asked.total() == 1)
    run = asyncio.create_task(updates(worker, job))
    await asyncio.sleep(0.1)
    run.cancel()
    await became(lambda: not worker.intake._ahead)
    told = await updates(worker, job)
    assert told[-1].result is not None and told[-1].result.status == 200
    assert hub.asked == {STYLE: 1}


async def test_few_files_are_fetched_ahead_at_once_over_all_jobs(make_eager: Make, hub: Hub) -> None:
    worker, names = make_eager(), [f"/{number}.safetensors" for number in range(5)]
    hub.files |= {name: save({"a": torch.zeros(1)}) for name in names}
    hub.pause_s = 0.3
    urls = [f"{hub.url}{name}" for name in names]
    worker.prefetch(styled(*urls[:3]))
    worker.prefetch(styled(*urls[3:]))
    await became(lambda: hub.asked.total() >= 2)
    await asyncio.sleep(0.1)
    assert [*hub.asked] == names[:2]
    await became(lambda: not worker.intake._ahead)
    assert hub.asked == dict.fromkeys(names, 1)


async def test_what_cannot_be_fetched_ahead_ends_quietly_and_stops_no_other_file(
    make_eager: Make, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make_eager(limits=Limits(max_pixels=64 * 64))
    hub.files["/page"] = b"<!doctype html>"
    named = [f"{hub.url}/lost", f"{hub.url}/page", "../etc/passwd", f"{hub.url}{STYLE}"]
    worker.prefetch(styled(*named))
    worker.prefetch(styled(f"{hub.url}/of-a-refused-job", num_images=99))
    worker.prefetch(styled(f"{hub.url}/of-a-picture-too-large", image_size={"width": 65, "height": 64}))
    worker.prefetch(make_job(endpoint_id="fal-ai/other", input={"loras": [{"path": f"{hub.url}/of-none"}]}))
    await asyncio.gather(*worker.intake._ahead)
    assert hub.asked == {"/lost": 1, "/page": 1, STYLE: 1}
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]


async def test_a_file_in_use_is_not_evicted_for_one_fetched_ahead(
    make_eager: Make, hub: Hub, lora_file: Path
) -> None:
    worker = make_eager(cache_bytes=lora_file.stat().st_size + 10)
    hub.files["/other.safetensors"] = save({"a": torch.zeros(1)}, {"filler": "x" * 100})
    used = Asset(AssetKind.LORA, f"{hub.url}{STYLE}")
    with await worker.intake._weights.locate(used, "", lambda line: None) as path:
        worker.prefetch(styled(f"{hub.url}/other.safetensors"))
        await became(lambda: not worker.intake._ahead)
        assert hub.asked["/other.safetensors"] == 1
        assert path.exists()


async def test_a_job_beyond_the_concurrency_waits_and_its_weights_are_fetched_meanwhile(
    make_eager: Make, hub: Hub
) -> None:
    worker, job = make_eager(concurrency=1), styled(f"{hub.url}{STYLE}")
    running = await begun(worker, make_job(input=LONG))
    waiting = asyncio.create_task(updates(worker, job))
    given_up = asyncio.create_task(updates(worker, make_job(input=FIELDS)))
    await became(lambda: hub.asked == {STYLE: 1} and not worker.intake._ahead)
    await asyncio.sleep(0.3)
    assert len(worker._engine) == 1
    assert not waiting.done() and not given_up.done()
    given_up.cancel()
    await running.aclose()
    told = await waiting
    assert told[-1].result is not None and told[-1].result.status == 200
    assert hub.asked == {STYLE: 1}
    assert (await result(worker)).status == 200


def test_one_model_serves_one_family_and_only_known_endpoints(make_worker: Make) -> None:
    with pytest.raises(KeyError, match="fal-ai/nope"):
        make_worker(endpoints=("fal-ai/nope",))


def test_a_closed_engine_is_unhealthy(make_worker: Make) -> None:
    worker = make_worker()
    worker.check_health()
    worker.close()
    with pytest.raises(Exception, match="engine"):
        worker.check_health()


async def test_a_picture_that_gets_no_noise_is_answered_without_a_step(answer: Answer) -> None:
    output = await answer("fal-ai/lora/image-to-image", noise_strength=0, num_images=2)
    assert [(image["width"], image["height"]) for image in output["images"]] == [(64, 64)] * 2


class FakeCard:
    """What is asked of a GPU before anything is put on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total_bytes: int) -> None:
        self.fractions: list[float] = []
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total_bytes)
        )
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.fractions.append)


def test_a_model_that_cannot_fit_its_share_of_a_gpu_refuses_to_start(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = FakeCard(monkeypatch, 1 << 28)
    with caplog.at_level("INFO"), pytest.raises(NoRoom, match=r"does not fit: \d+ bytes .* num_gpus"):
        make_worker(device="cuda", num_gpus=0.25)
    assert card.fractions == [0.25]
    assert "model/transformer" in caplog.text, "the report comes first"


@pytest.mark.parametrize(
    ("device", "share", "bound"), [("cuda", 0.5, [0.5]), ("cuda", 1, []), ("cpu", 0, [])]
)
def test_the_memory_that_torch_takes_is_bound_to_the_share_of_the_gpu(
    make_worker: Make, monkeypatch: pytest.MonkeyPatch, device: str, share: float, bound: list[float]
) -> None:
    card = FakeCard(monkeypatch, 1)
    with nullcontext() if device == "cpu" else pytest.raises(NoRoom):
        make_worker(device=device, num_gpus=share)
    assert card.fractions == bound
