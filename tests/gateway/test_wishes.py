"""What a caller asks beside its input, in headers."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.gateway.keys import ANYONE
from schemas.settings import ModelEntry
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
        jobs.append((record.job.max_retries, record.job.stores_io, record.job.tags))
    assert jobs == [(0, False, ("cats", "night shift")), (None, True, ())]
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
        ("x-fal-retry-config", ""),
        ("x-fal-retry-config", "{"),
        ("x-fal-retry-config", "[]"),
        ("x-fal-retry-config", '{"server_error": 3}'),  # fal's own short form that is none
        ("x-fal-retry-config", '{"server_error": {}}'),
        ("x-fal-retry-config", '{"server_error": {"retries": -1}}'),
        ("x-fal-retry-config", '{"server_error": {"retries": 10}}'),
        ("x-fal-retry-config", '{"server_error": {"retries": "3"}}'),
        ("x-fal-retry-config", '{"server_error": {"retries": 3, "after": 1}}'),
        ("x-fal-retry-config", '{"weather": {"retries": 3}}'),
    ],
)
async def test_a_malformed_wish_is_named(name: str, text: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers={name: text})
    assert answer.status_code == 400
    assert name in answer.json()["detail"]


async def test_a_webhook_that_the_queue_could_never_owe_is_refused(alice: httpx.AsyncClient) -> None:
    """Its request could not end, nor could any that was swept beside it."""
    for rest in ("x" * 2100, "ü" * 1030):
        asked = {"fal_webhook": f"https://there.example/{rest}"}
        answer = await alice.post(f"/queue/{ENDPOINT}", json=CAT, params=asked)
        assert (answer.status_code, "2048 bytes" in answer.json()["detail"]) == (400, True)


async def test_files_are_kept_as_long_as_the_server_says_unless_the_caller_does(tmp_path: Path) -> None:
    wish = {"X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds": 60}'}
    announced = {"content_type": "image/png", "file_name": "cat.png"}
    async with (
        gateway_at_work(tmp_path, keep={"files_s": 3600}) as place,
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


@pytest.mark.parametrize(
    ("budgets", "most"),
    [
        ({}, None),
        ({"server_error": {"retries": 3}, "connection_error": {"retries": 1}}, 1),
        ({"server_error": {"retries": 0}}, 0),
        ({"server_error": {"retries": 3}, "connection_error": {"retries": 0}}, 0),
        ({"timeout": {"retries": 0}}, None),  # a request that ran for too long never runs again
    ],
)
async def test_a_budget_of_retries_is_kept(
    budgets: Any, most: int | None, place: Place, alice: httpx.AsyncClient
) -> None:
    headers = {"X-Fal-Retry-Config": json.dumps(budgets)}
    receipt = (await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers=headers)).json()
    record = await place.queue.get(receipt["request_id"], "alice")
    assert record is not None and record.job.max_retries == most


async def test_no_retry_outranks_a_budget(place: Place, alice: httpx.AsyncClient) -> None:
    headers = {"X-Fal-No-Retry": "1", "X-Fal-Retry-Config": '{"server_error": {"retries": 3}}'}
    receipt = (await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers=headers)).json()
    record = await place.queue.get(receipt["request_id"], "alice")
    assert record is not None and record.job.max_retries == 0


@pytest.mark.parametrize("name", ["x-fal-runner-hint", "x-app-fal-disable-fallback"])
async def test_what_has_no_meaning_here_is_taken(name: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(f"/queue/{ENDPOINT}", json=CAT, headers={name: "{}"})
    assert answer.status_code == 200


async def test_who_wants_no_long_queue_is_refused_one(place: Place, alice: httpx.AsyncClient) -> None:
    place.model.open.clear()
    for _ in range(ModelEntry.model_fields["window"].default):
        await alice.post(f"/queue/{ENDPOINT}", json=CAT)
        await place.model.began.acquire()
    for _ in range(2):  # which wait
        await alice.post(f"/queue/{ENDPOINT}", json=CAT)
    refused = await alice.post(f"/queue/{ENDPOINT}", json=CAT, params={"fal_max_queue_length": 1})
    assert (refused.status_code, refused.json()["error_type"]) == (429, "queue_full")
    taken = await alice.post(f"/queue/{ENDPOINT}", json=CAT, params={"fal_max_queue_length": 2})
    assert (taken.status_code, taken.json()["queue_position"]) == (200, 2)


@pytest.mark.parametrize("length", ["", "-1", "1.5", "x", "9999999999", "٣"])
async def test_a_malformed_length_is_refused(length: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(f"/queue/{ENDPOINT}", json=CAT, params={"fal_max_queue_length": length})
    assert answer.status_code == 400
    assert "fal_max_queue_length" in answer.json()["detail"]
