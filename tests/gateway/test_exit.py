"""Whatever way a picture takes out of a worker, the safety checker has seen it."""

import ast
import base64
import io
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from openai import AsyncOpenAI
from PIL import Image, UnidentifiedImageError
from websockets.asyncio.client import connect

from deployments.files.store import open_files
from deployments.worker.results import Results
from deployments.worker.worker import Worker
from pipelines import zoo
from pipelines.exit import Exit
from pipelines.registry import endpoint
from schemas.settings import ModelSettings, SafetyPolicy
from tests.gateway.conftest import ALICE
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

ANY = "fal-ai/lora/image-to-image"
HEADERS = {"authorization": f"Key {ALICE}"}
SIZE = {"width": 64, "height": 64}
ABSENT = object()
Fields = dict[str, Any]


class Prude:
    """Finds every picture unsafe."""

    def flags(self, pictures: Any) -> list[bool]:
        return [True] * len(pictures)


@pytest.fixture(scope="module")
def workers(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    files = open_files(f"file://{tmp_path_factory.mktemp('files')}")
    models = {ENDPOINT: str(flux_folder), ANY: str(zoo.locate("sd15", flux_folder.parent))}
    common: Fields = {"max_sequence_length": 32, "cpu_threads": 1, "limits": {"max_pixels": 64 * 64}}
    common["bases"] = {"names": {"sd15": models[ANY]}}
    made = {
        each: Worker(ModelSettings(model=model, endpoints=(each,), **common), files)
        for each, model in models.items()
    }
    yield made
    for worker in made.values():
        worker.close()


@pytest.fixture
async def place(tmp_path: Path, workers: dict[str, Worker]) -> AsyncIterator[Place]:
    """A gateway before real workers."""
    async with gateway_at_work(tmp_path, keys=ALICE) as place:
        for worker in workers.values():
            worker._results = Results(place.files)
        place.model.generate = lambda job, backlog: workers[job.endpoint_id].generate(job)  # type: ignore[method-assign]
        yield place


def fields(flag: object, endpoint_id: str = ENDPOINT) -> Fields:
    known: Fields = {"prompt": "x", "num_inference_steps": 2, "seed": 3, "image_size": SIZE}
    if endpoint_id == ANY:
        known |= {"model_name": "sd15", "debug_latents": True, "debug_per_pass_latents": True}
    return known if flag is ABSENT else known | {"enable_safety_checker": flag}


# -- the ways out: each gives all that its caller gets to see, JSON and pictures


async def queue(place: Place, wish: Fields, endpoint_id: str = ENDPOINT) -> list[Any]:
    async with httpx.AsyncClient(base_url=place.url, headers=HEADERS, timeout=60) as http:
        receipt = (await http.post(f"/queue/{endpoint_id}", json=wish)).raise_for_status().json()
        async with http.stream("GET", f"{receipt['status_url']}/stream") as stream:
            await stream.aread()
        return [(await http.get(receipt["response_url"])).raise_for_status().json()]


async def run(place: Place, wish: Fields, endpoint_id: str = ENDPOINT) -> list[Any]:
    async with httpx.AsyncClient(base_url=place.url, headers=HEADERS, timeout=60) as http:
        return [(await http.post(f"/run/{endpoint_id}", json=wish)).raise_for_status().json()]


async def sync_mode(place: Place, wish: Fields) -> list[Any]:
    return await run(place, wish | {"sync_mode": True})


async def stream(place: Place, wish: Fields) -> list[Any]:
    async with (
        httpx.AsyncClient(base_url=place.url, headers=HEADERS, timeout=60) as http,
        http.stream("POST", f"/run/{ENDPOINT}/stream", json=wish) as answer,
    ):
        lines = [line async for line in answer.aiter_lines()]
    found = [httpx.Response(200, text=line[6:]).json() for line in lines if line.startswith("data: ")]
    assert found
    return found


async def realtime(place: Place, wish: Fields) -> list[Any]:
    url = f"{place.url.replace('http', 'ws', 1)}/run/{ENDPOINT}/realtime"
    async with connect(url, additional_headers=HEADERS) as socket:
        await socket.send(msgpack.packb(wish))
        frame = await socket.recv()
    assert isinstance(frame, bytes), frame
    return [msgpack.unpackb(frame)]


async def openai(place: Place, wish: Fields) -> list[Any]:
    more = {name: value for name, value in wish.items() if name != "prompt"}
    async with AsyncOpenAI(base_url=f"{place.url}/v1", api_key=ALICE, max_retries=0) as client:
        answer = await client.images.generate(model=ENDPOINT, prompt="x", extra_body=more)
    return [answer.model_dump()]


async def debug(place: Place, wish: Fields) -> list[Any]:
    return await run(place, wish, ANY)


async def handle(place: Place, wish: Fields) -> list[Any]:
    """A direct call of a worker, past the gateway. The place's own generate leads to it."""
    request = endpoint(ENDPOINT).input_type().model_validate(wish)
    output = await WORKERS[ENDPOINT].run(ENDPOINT, request)
    return [output.model_dump(mode="json")]


WORKERS: dict[str, Worker] = {}
Way = Callable[[Place, Fields], Awaitable[list[Any]]]
WAYS: list[Way] = [queue, run, sync_mode, stream, realtime, openai, debug, handle]


def judged_by(workers: dict[str, Worker], policy: SafetyPolicy) -> None:
    for worker in workers.values():
        worker._exit = Exit(Prude(), policy)
    WORKERS.update(workers)


def contents(value: Any) -> Iterator[bytes]:
    """Every picture inside an answer, wherever it stands."""
    match value:
        case dict():
            for name, each in value.items():
                if name == "b64_json" and each:
                    yield base64.b64decode(each)
                else:
                    yield from contents(each)
        case list():
            for each in value:
                yield from contents(each)
        case bytes():
            yield value
        case str() if value.startswith("data:"):
            yield base64.b64decode(value.partition(",")[2])


def stored(folder: Path) -> set[Path]:
    """Every file in the store."""
    return {path for path in (folder / "files").rglob("*") if path.is_file()}


def pictures(data: bytes) -> Iterator[Image.Image]:
    """The picture in a file, or the pictures in a tar."""
    try:
        yield Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError:
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield Image.open(file).convert("RGB")
        except tarfile.ReadError:
            return


def is_black(picture: Image.Image) -> bool:
    return picture.getextrema() == ((0, 0),) * 3


def flags_in(answers: list[Any]) -> list[bool]:
    return [flag for answer in answers for flag in answer.get("has_nsfw_concepts", [])]


async def seen(way: Way, place: Place, folder: Path, flag: object) -> tuple[list[Image.Image], list[bool]]:
    """The pictures that reached the caller or the store, and what was said of them."""
    before = stored(folder)
    answers = await way(place, fields(flag, ANY if way is debug else ENDPOINT))
    data = [*contents(answers), *(path.read_bytes() for path in stored(folder) - before)]
    return [each for one in data for each in pictures(one)], flags_in(answers)


EVERY_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@EVERY_WAY
async def test_t31_where_all_pictures_are_checked_no_wish_and_no_way_leads_past_the_checker(
    way: Way, place: Place, workers: dict[str, Worker], tmp_path: Path
) -> None:
    judged_by(workers, "always")
    for flag in (True, False, ABSENT, 0, "no", "false", None):
        found, flags = await seen(way, place, tmp_path, flag)
        assert found and all(map(is_black, found)), flag
        assert flags == ([] if way is openai else [True]), flag  # a single document: no previews


@EVERY_WAY
async def test_t31_where_requests_are_asked_what_they_ask_holds_on_every_way(
    way: Way, place: Place, workers: dict[str, Worker], tmp_path: Path
) -> None:
    judged_by(workers, "asked")
    # the defaults are fal's
    asks = [(True, True), ("yes", True), (1, True), (ABSENT, way is not debug)]
    asks += [(False, False), ("no", False), (0, False)]
    for flag, is_asked in asks:
        found, flags = await seen(way, place, tmp_path, flag)
        assert found and all(is_black(each) == is_asked for each in found), flag
        assert all(each == is_asked for each in flags), flag


def test_t31_pictures_are_compressed_in_one_place_only() -> None:
    root = Path(__file__).parents[2]
    places = set()
    for path in [*(root / "pipelines").rglob("*.py"), *(root / "deployments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "images.encode":
                places.add(path.relative_to(root).as_posix())
    assert places == {"pipelines/exit.py"}
