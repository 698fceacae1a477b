"""What a tenant sees of another: nothing, to the byte. And what its key allows."""

import asyncio
import json
from typing import Any
from uuid import uuid4

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from schemas.access import Action, Allowance, Entry, Key
from schemas.jobs import Priority
from tests.gateway.test_realtime import ask, connected, receive, token
from tests.support.gateway import PICTURE, Place
from tests.support.jobs import ENDPOINT

APP = "fal-ai/flux"
PROMPT: dict[str, Any] = {"prompt": "a cat"}
QUEUE = {"host": "queue.fal.run"}

# every way of naming a request: method, path, headers
BY_ID: dict[str, tuple[str, str, dict[str, str]]] = {
    "status": ("GET", f"/queue/{APP}/requests/ID/status", {}),
    "status with its log": ("GET", f"/queue/{APP}/requests/ID/status?logs=1", {}),
    "status by the whole id": ("GET", f"/queue/{ENDPOINT}/requests/ID/status", {}),
    "head of status": ("HEAD", f"/queue/{APP}/requests/ID/status", {}),
    "status stream": ("GET", f"/queue/{APP}/requests/ID/status/stream?logs=1", {}),
    "result": ("GET", f"/queue/{APP}/requests/ID", {}),
    "result, the longer path": ("GET", f"/queue/{APP}/requests/ID/response", {}),
    "head of result": ("HEAD", f"/queue/{APP}/requests/ID", {}),
    "cancel": ("PUT", f"/queue/{APP}/requests/ID/cancel", {}),
    "bare status": ("GET", f"/{APP}/requests/ID/status", {}),
    "bare cancel": ("PUT", f"/{APP}/requests/ID/cancel", {}),
    "status by host": ("GET", f"/{APP}/requests/ID/status", QUEUE),
    "by the proxy": (
        "GET",
        "/api/fal/proxy",
        {"x-fal-target-url": f"https://queue.fal.run/{APP}/requests/ID"},
    ),
    "cancel by the proxy": (
        "PUT",
        "/api/fal/proxy",
        {"x-fal-target-url": f"https://queue.fal.run/{APP}/requests/ID/cancel"},
    ),
    "erase": ("DELETE", "/v1/models/requests/ID/payloads", {}),
    "wrong method": ("POST", f"/queue/{APP}/requests/ID/status", {}),
    "wrong tail": ("GET", f"/queue/{APP}/requests/ID/logs", {}),
    "wrong app": ("GET", "/queue/fal-ai/lora/requests/ID", {}),
}
CHANGING = ("date", "x-fal-request-id")


async def asked(http: httpx.AsyncClient, way: str, request_id: str) -> tuple[int, dict[str, str], str]:
    """What is answered about a request, but for what differs between any two answers."""
    method, path, headers = BY_ID[way]
    headers = {name: value.replace("ID", request_id) for name, value in headers.items()}
    answer = await http.request(method, path.replace("ID", request_id), headers=headers)
    told = {name: value for name, value in answer.headers.items() if name not in CHANGING}
    return answer.status_code, told, answer.text.replace(request_id, "ID")


async def in_state(place: Place, http: httpx.AsyncClient, state: str) -> str:
    """The id of a request in a state."""
    if state != "completed":
        place.model.open.clear()
    if state == "queued":
        for _ in range(place.gateway.entry(ENDPOINT).window):  # it is full
            await http.post(f"/queue/{ENDPOINT}", json=PROMPT)
            await place.model.began.acquire()
    answer = await http.post(f"/queue/{ENDPOINT}", json=PROMPT)
    request_id = str(answer.json()["request_id"])
    if state == "running":
        await place.model.began.acquire()
    if state == "completed":
        await place.gateway.result(request_id, "alice")
    return request_id


@pytest.mark.parametrize("state", ["queued", "running", "completed"])
async def test_t03_another_tenants_request_is_like_one_that_never_was(
    state: str,
    place: Place,
    alice: httpx.AsyncClient,
    bob: httpx.AsyncClient,
    stranger: httpx.AsyncClient,
) -> None:
    request_id = await in_state(place, alice, state)
    before = await place.queue.get(request_id, "alice")
    for way in BY_ID:
        nowhere = await asked(bob, way, str(uuid4()))
        assert await asked(bob, way, request_id) == nowhere, way
        assert nowhere[0] == (405 if way == "wrong method" else 404), way
        denied = await asked(stranger, way, str(uuid4()))
        assert await asked(stranger, way, request_id) == denied, way
        assert denied[0] == 401, way
    assert await place.queue.get(request_id, "alice") == before  # nobody changed anything
    assert (await asked(alice, "status", request_id))[0] in (200, 202)
    place.model.open.set()


async def test_t03_the_owner_sees_what_the_others_do_not(place: Place, alice: httpx.AsyncClient) -> None:
    """Otherwise the matrix would prove nothing."""
    for way in BY_ID:
        request_id = await in_state(place, alice, "completed")
        found, nowhere = await asked(alice, way, request_id), await asked(alice, way, str(uuid4()))
        assert (found == nowhere) is way.startswith("wrong"), way


async def test_t03_a_list_has_nobody_elses_requests(
    place: Place, alice: httpx.AsyncClient, bob: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    ids = [await in_state(place, alice, "completed") for _ in range(3)]
    queries = ["", "?expand=payloads", f"?endpoint_id={ENDPOINT}", "?cursor=1000", "?cursor=2&limit=1"]
    for path in ("/v1/models/requests", "/v1/models/requests/by-endpoint"):
        assert [each["request_id"] for each in (await alice.get(path)).json()["items"]] == ids[::-1]
        for query in queries:
            empty: dict[str, Any] = {"items": [], "next_cursor": None, "has_more": False}
            assert (await bob.get(f"{path}{query}")).json() == empty
            assert (await stranger.get(f"{path}{query}")).status_code == 401


async def test_t03_an_idempotency_key_is_of_its_tenant(
    place: Place, alice: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    headers = {"idempotency-key": "order 7"}
    for path in (f"/queue/{ENDPOINT}", f"/run/{ENDPOINT}", "/v1/images/generations"):
        answers = [await each.post(path, json=PROMPT, headers=headers) for each in (alice, alice, bob)]
        ids = [each.headers["x-fal-request-id"] for each in answers]
        assert [each.status_code for each in answers] == [200] * 3
        assert ids[0] == ids[1] != ids[2]
        assert "idempotent-replayed" not in answers[2].headers
        headers = {"idempotency-key": path}


async def test_t03_a_token_shows_its_holders_requests_only(
    place: Place, alice: httpx.AsyncClient, bob: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    request_id = await in_state(place, alice, "completed")
    path = f"/queue/{APP}/requests/{{}}?fal_jwt_token={{}}"
    mine, other = await token(alice), await token(bob)
    assert (await stranger.get(path.format(request_id, mine))).status_code == 200
    found = await stranger.get(path.format(request_id, other))
    nowhere = await stranger.get(path.format(nobody := str(uuid4()), other))
    assert found.status_code == nowhere.status_code == 404
    assert found.text.replace(request_id, "ID") == nowhere.text.replace(nobody, "ID")


async def test_t03_an_upload_under_way_is_its_senders(
    place: Place, alice: httpx.AsyncClient, bob: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    begun = (await alice.post("/rest/storage/upload/initiate", json={"content_type": "image/png"})).json()
    key = begun["file_url"].rpartition("/")[2]
    unknown = "".join("0" if each.isdigit() else each for each in key)
    ticket = (await bob.post("/rest/storage/upload/initiate", json={"content_type": "image/png"})).json()
    query = ticket["upload_url"].partition("?")[2]
    for method, tail in [("PUT", ""), ("PUT", "/1"), ("POST", "/complete"), ("GET", ""), ("DELETE", "")]:
        for each in (bob, stranger):
            for shown in ("", f"?{query}", "?ticket=x.y"):
                answers = [
                    await each.request(method, f"/files/{name}{tail}{shown}", content=PICTURE)
                    for name in (key, unknown)
                ]
                [one, other] = [
                    (answer.status_code, answer.text.replace(name, "KEY"))
                    for answer, name in zip(answers, (key, unknown), strict=True)
                ]
                assert one == other and one[0] >= 400
    sent = await alice.put(begun["upload_url"], content=PICTURE, headers={"content-type": "image/png"})
    assert sent.status_code == 200  # nothing of the others' has come in between
    assert [(await each.get(begun["file_url"])).content for each in (alice, stranger)] == [PICTURE] * 2


# --- what a key allows ---


def client(place: Place, key: Key, secret: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Key {key.key_id}:{secret}"}
    return httpx.AsyncClient(base_url=place.url, headers=headers, timeout=30)


async def test_t34_what_goes_beyond_a_limit_is_told_in_fals_shape(place: Place) -> None:
    place.model.open.clear()
    told = [
        (Allowance(per_minute=1), "rate_limit_exceeded"),
        (Allowance(daily_requests=1), "quota_exceeded"),
        (Allowance(max_running=1), "concurrent_requests_limit"),
    ]
    for allowance, error_type in told:
        key, secret = await place.table.create(allowance=allowance)
        async with client(place, key, secret) as http:
            assert (await http.post(f"/queue/{ENDPOINT}", json=PROMPT)).status_code == 200
            for path in (f"/run/{ENDPOINT}", f"/run/{ENDPOINT}/stream"):
                refused = await http.post(path, json=PROMPT)
                body = refused.json()
                assert (refused.status_code, body["error_type"]) == (429, error_type)
                assert refused.headers["x-fal-error-type"] == error_type
                assert isinstance(body["detail"], str) and body["message"] == body["detail"]
                assert int(refused.headers["retry-after"]) >= 1
                assert "retry-after" in refused.headers["access-control-expose-headers"]
                needs_retry = "1" if allowance.max_running else None
                assert refused.headers.get("x-fal-needs-retry") == needs_retry
            refused = await http.post("/v1/images/generations", json=PROMPT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, error_type)
            assert int(refused.headers["retry-after"]) >= 1
            queued = await http.post(f"/queue/{ENDPOINT}", json=PROMPT)
            assert queued.status_code == (200 if allowance.max_running else 429)
    place.model.open.set()


async def test_t34_so_many_of_a_tenants_requests_wait(place: Place, alice: httpx.AsyncClient) -> None:
    await in_state(place, alice, "queued")
    key, secret = await place.table.create("alice", allowance=Allowance(max_queued=1))
    async with client(place, key, secret) as http:
        refused = await http.post(f"/queue/{ENDPOINT}", json=PROMPT)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "queue_full")
    assert (await alice.post(f"/queue/{ENDPOINT}", json=PROMPT)).status_code == 200
    place.model.open.set()


async def test_a_priority_above_the_keys_is_lowered_and_told(place: Place) -> None:
    key, secret = await place.table.create("alice", allowance=Allowance(Priority.LOW))
    async with client(place, key, secret) as http:
        for headers in ({}, {"x-fal-queue-priority": "normal"}, {"x-fal-queue-priority": "low"}):
            answer = await http.post(f"/queue/{ENDPOINT}", json=PROMPT, headers=headers)
            assert (answer.status_code, answer.headers["x-darkroom-priority"]) == (200, "low")
            record = await place.queue.get(answer.json()["request_id"], "alice")
            assert record is not None and record.job.priority == Priority.LOW
            events = await place.gateway.logs(record.job.request_id)
            notes = [each for each in events if "highest priority" in str(each.event)]
            assert len(notes) == (0 if headers.get("x-fal-queue-priority") == "low" else 1)


async def test_other_keys_of_a_tenant_see_its_requests(place: Place, alice: httpx.AsyncClient) -> None:
    request_id = await in_state(place, alice, "completed")
    key, secret = await place.table.create("alice")
    async with client(place, key, secret) as http:
        assert (await asked(http, "result", request_id))[0] == 200


# --- keys come and go ---


async def test_t01_a_revoked_key_opens_nothing_any_more_nor_do_its_tokens(
    place: Place, stranger: httpx.AsyncClient
) -> None:
    key, secret = await place.table.create("carol")
    shown = f"{key.key_id}:{secret}"
    async with client(place, key, secret) as http, connected(place, key=shown) as socket:
        word = await token(http)
        assert (await ask(socket, PROMPT))["prompt"] == "a cat"
        path = f"/queue/{APP}/requests/{uuid4()}?fal_jwt_token={word}"
        assert (await stranger.get(path)).status_code == 404
        await place.table.revoke(key.key_id)
        assert (await http.get("/")).status_code == 401
        assert (await stranger.get(path)).status_code == 401
        assert (await ask(socket, PROMPT))["error"] == "Unauthorized"
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
    async with connected(place, key=shown) as socket:
        assert (await receive(socket))["error"] == "Unauthorized"


async def test_t02_wrong_keys_at_the_cdn_and_on_websockets_are_throttled_too(
    place: Place, alice: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    bad = {"authorization": "Key alice:guess"}
    limit = place.gateway.settings.bad_keys_per_minute
    answers = [await stranger.post("/files/upload", headers=bad) for _ in range(limit + 1)]
    assert [each.status_code for each in answers] == [401] * limit + [429]
    async with connected(place, key="alice:guess") as socket:
        assert (await receive(socket))["error"] == "RATE_LIMIT_EXCEEDED"
    assert (await alice.get("/")).status_code == 200
    assert (await stranger.get("/")).status_code == 401  # who shows nothing guesses nothing


# --- the audit ---


async def test_t37_every_change_over_http_has_one_row(
    place: Place, alice: httpx.AsyncClient, bob: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    place.model.open.clear()
    made = [f"/queue/{ENDPOINT}"] * 3
    ids = [(await alice.post(path, json=PROMPT)).json()["request_id"] for path in made]
    for http in (bob, stranger, alice, alice):
        await asked(http, "cancel", ids[0])
    place.model.open.set()
    run = await alice.post(f"/run/{ENDPOINT}", json=PROMPT)
    image = await alice.post("/v1/images/generations", json=PROMPT)
    ids += [run.headers["x-fal-request-id"], image.headers["x-fal-request-id"]]
    for request_id in ids:
        await place.gateway.result(request_id, "alice")
    for http in (bob, stranger, alice, alice):
        await asked(http, "erase", ids[1])
    for path, fields in ((f"/queue/{ENDPOINT}", {}), ("/queue/fal-ai/nope", PROMPT)):
        assert (await alice.post(path, json=fields)).status_code in (404, 422)
    expected = [(Action.SUBMIT, each) for each in ids] + [(Action.CANCEL, ids[0]), (Action.ERASE, ids[1])]
    found = await place.audit.newest(100)
    assert sorted((each.action, each.subject) for each in found) == sorted(expected)
    assert {(each.tenant, each.key_id, each.address) for each in found} == {("alice", "alice", "127.0.0.1")}


async def test_t37_what_realtime_submits_is_written_down_too(place: Place) -> None:
    async with connected(place) as socket:
        answer = await ask(socket, PROMPT)
    [row] = await place.audit.newest(9)
    assert (row.subject, row.tenant, row.address) == (answer["request_id"], "alice", "127.0.0.1")


async def test_t37_the_audit_holds_no_prompt_and_no_secret(place: Place, alice: httpx.AsyncClient) -> None:
    headers = {"idempotency-key": "canary-key", "x-fal-tags": "canary-tag"}
    path = f"/queue/{ENDPOINT}?fal_webhook=https://canary.example/hook"
    await alice.post(path, json={"prompt": "canary-prompt"}, headers=headers)
    text = json.dumps([row_text(each) for each in await place.audit.newest(9)])
    assert "canary" not in text and "s3cret" not in text


def row_text(row: Entry) -> list[str]:
    return [str(getattr(row, name)) for name in row.__slots__]


async def test_t34_one_tenants_flood_is_refused_while_anothers_requests_run(
    place: Place, alice: httpx.AsyncClient
) -> None:
    key, secret = await place.table.create("flood", allowance=Allowance(per_minute=5))
    async with client(place, key, secret) as http:
        flood = [http.post(f"/queue/{ENDPOINT}", json=PROMPT) for _ in range(100)]
        calls = [alice.post(f"/run/{ENDPOINT}", json=PROMPT) for _ in range(5)]
        answers = await asyncio.gather(*flood, *calls)
    statuses = [each.status_code for each in answers]
    assert sorted(statuses[:100]) == [200] * 5 + [429] * 95
    assert statuses[100:] == [200] * 5
