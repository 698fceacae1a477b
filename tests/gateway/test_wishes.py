"""What a caller asks beside its input, in headers."""

from pathlib import Path

import httpx
import pytest

from deployments.gateway.keys import ANYONE
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

CAT = {"prompt": "a cat"}


async def test_wishes_go_with_the_request(place: Place, alice: httpx.AsyncClient) -> None:
    headers = {"X-Fal-No-Retry": "true", "X-Fal-Store-IO": "0", "X-Fal-Tags": "cats, night shift,cats"}
    receipt = (await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers=headers)).json()
    plain = (await alice.post(f"/queue/{ENDPOINT}", json=CAT)).json()
    jobs = []
    for each in (receipt, plain):
        record = await place.queue.get(each["request_id"], "alice")
        assert record is not None
        jobs.append((record.job.retries, record.job.stores_io, record.job.tags))
    assert jobs == [(False, False, ("cats", "night shift")), (True, True, ())]
    items = (await alice.get("/v1/models/requests")).json()["items"]
    assert [item["tags"] for item in items] == [[], ["cats", "night shift"]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x-fal-no-retry", "perhaps"),
        ("x-fal-store-io", ""),
        ("x-fal-store-io", "2"),
        ("x-fal-tags", ",".join(map(str, range(21)))),
        ("x-fal-tags", "x" * 101),
    ],
)
async def test_a_malformed_wish_is_named(name: str, text: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers={name: text})
    assert answer.status_code == 400
    assert name in answer.json()["detail"]


async def test_files_are_kept_as_long_as_the_server_says_unless_the_caller_does(tmp_path: Path) -> None:
    wish = {"X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds": 60}'}
    announced = {"content_type": "image/png", "file_name": "cat.png"}
    async with (
        gateway_at_work(tmp_path, keep_files_s=3600) as place,
        httpx.AsyncClient(base_url=place.url) as http,
    ):
        for headers, keep_s in (({}, 3600), (wish, 60)):
            receipt = (await http.post(f"/queue/{ENDPOINT}", json=CAT, headers=headers)).json()
            record = await place.queue.get(receipt["request_id"], ANYONE)
            assert record is not None and record.job.keep_s == keep_s
            begun = await http.post("/rest/storage/upload/initiate", json=announced, headers=headers)
            urls = begun.json()
            await http.put(urls["upload_url"], content=b"x", headers={"content-type": "image/png"})
            shown = await http.head(urls["file_url"])
            seconds = int(shown.headers["cache-control"].partition("max-age=")[2].partition(",")[0])
            assert keep_s - 30 < seconds <= keep_s


@pytest.mark.parametrize("name", ["x-fal-runner-hint", "x-fal-retry-config", "x-app-fal-disable-fallback"])
async def test_what_has_no_meaning_here_is_taken(name: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers={name: "{}"})
    assert answer.status_code == 200
