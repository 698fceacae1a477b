"""A caller's own past."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway import PICTURE, Place, gateway_at_work
from tests.support.jobs import ENDPOINT

APP = "fal-ai/flux"
REMAKE = "fal-ai/flux-lora/image-to-image"


async def made(http: httpx.AsyncClient, seed: int = 1, endpoint: str = ENDPOINT) -> str:
    """The id of a request that is complete."""
    fields = {"prompt": "a cat", "seed": seed, "image_url": "https://example.com/cat.png"}
    answer = await http.post(f"/run/{endpoint}", json=fields)
    assert answer.status_code == 200
    return str(answer.headers["x-fal-request-id"])


async def listed(http: httpx.AsyncClient, **query: Any) -> Any:
    answer = await http.get("/v1/models/requests", params=query)
    assert answer.status_code == 200
    return answer.json()


async def test_requests_are_listed_newest_first(alice: httpx.AsyncClient) -> None:
    ids = [await made(alice, seed) for seed in (1, 2, 3)]
    found = await listed(alice)
    assert [item["request_id"] for item in found["items"]] == ids[::-1]
    assert (found["next_cursor"], found["has_more"]) == (None, False)
    item = found["items"][0]
    assert (item["endpoint_id"], item["status"], item["status_code"]) == (ENDPOINT, "COMPLETED", 200)
    assert item["sent_at"] <= item["started_at"] <= item["ended_at"]
    assert item["error"] is None and "json_input" not in item


async def test_pages_follow_each_other(alice: httpx.AsyncClient) -> None:
    ids = [await made(alice, seed) for seed in range(5)]
    first = await listed(alice, limit=2)
    second = await listed(alice, limit=2, cursor=first["next_cursor"])
    third = await listed(alice, limit=2, cursor=second["next_cursor"])
    pages = [first, second, third]
    assert [item["request_id"] for page in pages for item in page["items"]] == ids[::-1]
    assert [page["has_more"] for page in pages] == [True, True, False]


async def test_a_list_may_be_of_some_endpoints(alice: httpx.AsyncClient) -> None:
    one, other = await made(alice), await made(alice, endpoint=REMAKE)
    assert [i["request_id"] for i in (await listed(alice, endpoint_id=REMAKE))["items"]] == [other]
    both = await listed(alice, endpoint_id=[ENDPOINT, REMAKE])
    assert [item["request_id"] for item in both["items"]] == [other, one]


async def test_inputs_and_outputs_are_told_when_asked_for(alice: httpx.AsyncClient) -> None:
    await made(alice, seed=7)
    [item] = (await listed(alice, expand="payloads"))["items"]
    assert item["json_input"]["prompt"] == "a cat"
    assert item["json_output"]["seed"] == 7


async def test_everyone_sees_their_own(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    request_id = await made(alice)
    assert (await listed(bob))["items"] == []
    assert (await bob.delete(f"/v1/models/requests/{request_id}/payloads")).status_code == 404
    assert (await stranger.get("/v1/models/requests")).status_code == 401
    assert (await stranger.delete(f"/v1/models/requests/{request_id}/payloads")).status_code == 401


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "cursor=x", "cursor=-1"])
async def test_a_malformed_question_is_refused(query: str, alice: httpx.AsyncClient) -> None:
    assert (await alice.get(f"/v1/models/requests?{query}")).status_code == 400


async def test_a_request_s_payloads_can_be_deleted(alice: httpx.AsyncClient, place: Place) -> None:
    request_id = await made(alice)
    url = f"/queue/{APP}/requests/{request_id}"
    [image] = (await alice.get(url)).json()["images"]
    assert (await alice.get(image["url"])).content == PICTURE
    answer = await alice.delete(f"/v1/models/requests/{request_id}/payloads")
    assert answer.json() == {"cdn_delete_results": [{"link": image["url"], "exception": None}]}
    assert (await alice.get(image["url"])).status_code == 404
    gone = await alice.get(url)
    assert (gone.status_code, gone.json()["error_type"]) == (410, "payloads_deleted")
    status = (await alice.get(f"{url}/status?logs=1")).json()
    assert (status["status"], status["logs"]) == ("COMPLETED", [])
    [item] = (await listed(alice, expand="payloads"))["items"]
    assert item["json_input"] == {}
    again = await alice.delete(f"/v1/models/requests/{request_id}/payloads")
    assert again.json() == {"cdn_delete_results": []}


async def test_a_request_whose_webhook_is_owed_keeps_its_payloads(
    alice: httpx.AsyncClient, place: Place
) -> None:
    asked = {"fal_webhook": "https://example.com/hook"}  # nobody sends it here
    fields = {"prompt": "a cat"}
    receipt = (await alice.post(f"/queue/{ENDPOINT}", json=fields, params=asked)).json()
    await place.gateway.result(receipt["request_id"], "alice")
    answer = await alice.delete(f"/v1/models/requests/{receipt['request_id']}/payloads")
    assert (answer.status_code, "webhook" in answer.json()["detail"]) == (400, True)
    [item] = (await listed(alice, expand="payloads"))["items"]
    assert item["json_input"]["prompt"] == "a cat" and item["json_output"]["images"]


async def test_a_running_request_keeps_its_payloads(alice: httpx.AsyncClient, place: Place) -> None:
    place.model.open.clear()
    receipt = (await alice.post(f"/queue/{ENDPOINT}", json={"prompt": "a cat"})).json()
    answer = await alice.delete(f"/v1/models/requests/{receipt['request_id']}/payloads")
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/requests?endpoint_id=%00", 400),
        ("DELETE", "/v1/models/requests/%00/payloads", 404),
    ],
)
async def test_what_postgresql_takes_for_no_text_is_a_callers_mistake(
    method: str, path: str, status: int, postgres_url: str, tmp_path: Path
) -> None:
    async with (
        gateway_at_work(tmp_path, queue_url=postgres_url) as place,
        httpx.AsyncClient(base_url=place.url, timeout=30) as client,
    ):
        assert (await client.request(method, path)).status_code == status
