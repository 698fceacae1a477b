"""fal's Python client, unmodified. Its synchronous and its asynchronous half tell the same stories."""

import base64
from collections.abc import Callable
from typing import Any

import fal_client
import httpx
import pytest
from PIL import Image

from tests.clients.halves import Connect, collected, settled
from tests.clients.inputs import ALICE, APP, ENDPOINT, LONG, REMAKE, SIZE, SMALL, WATCHED, log, picture
from tests.support.server import Server


async def test_run_returns_a_picture_that_anyone_can_download(fal: Any, stranger: httpx.Client) -> None:
    output = await settled(fal.run(ENDPOINT, SMALL | {"image_size": {"width": 96, "height": 64}}))
    [image] = output["images"]
    assert (image["width"], image["height"]) == (96, 64)
    assert (output["prompt"], output["seed"]) == (SMALL["prompt"], SMALL["seed"])
    assert output["has_nsfw_concepts"] == [False]
    answer = stranger.get(image["url"])
    assert answer.headers["content-type"] == image["content_type"] == "image/jpeg"
    assert picture(answer.content) == ("JPEG", (96, 64))


async def test_sync_mode_returns_the_picture_itself(fal: Any) -> None:
    output = await settled(fal.run(ENDPOINT, SMALL | {"sync_mode": True}))
    [image] = output["images"]
    head, _, data = image["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert picture(base64.b64decode(data, validate=True)) == ("JPEG", (64, 64))
    assert (image["width"], image["height"]) == (64, 64)


async def test_the_same_seed_gives_the_same_bytes(fal: Any, stranger: httpx.Client) -> None:
    pictures = []
    for seed in (1, 1, 2):
        output = await settled(fal.run(ENDPOINT, SMALL | {"seed": seed}))
        pictures.append(stranger.get(output["images"][0]["url"]).content)
    assert pictures[0] == pictures[1] != pictures[2]


async def test_subscribe_tells_of_every_step_and_returns_the_output(fal: Any) -> None:
    enqueued: list[str] = []
    updates: list[Any] = []
    output = await settled(
        fal.subscribe(
            ENDPOINT, SMALL, with_logs=True, on_enqueue=enqueued.append, on_queue_update=updates.append
        )
    )
    [request_id] = enqueued
    assert isinstance(updates[-1], fal_client.Completed)
    assert [line["message"] for line in updates[-1].logs] == log(SMALL["num_inference_steps"])
    assert await settled(fal.result(ENDPOINT, request_id)) == output


async def test_a_handle_follows_its_request_to_the_result(fal: Any) -> None:
    handle = await settled(fal.submit(ENDPOINT, WATCHED))
    events = await collected(handle.iter_events(with_logs=True, interval=0.02))
    *before, last = events
    assert before and all(isinstance(each, fal_client.Queued | fal_client.InProgress) for each in before)
    assert isinstance(last, fal_client.Completed)
    assert [line["message"] for line in last.logs] == log(WATCHED["num_inference_steps"])
    assert last.metrics["inference_time"] > 0
    assert (last.error, last.error_type) == (None, None)
    output = await settled(handle.get())
    assert output["images"][0]["width"] == 512


async def test_logs_come_only_when_asked_for(fal: Any) -> None:
    handle = await settled(fal.submit(ENDPOINT, SMALL))
    await settled(handle.get())
    assert (await settled(handle.status())).logs is None
    logs = (await settled(handle.status(with_logs=True))).logs
    assert len(logs) == len(log(SMALL["num_inference_steps"]))


async def test_another_client_finds_a_request_by_its_id(fal: Any, connect: Connect) -> None:
    handle = await settled(fal.submit(ENDPOINT, SMALL))
    output = await settled(handle.get())
    other = connect(ALICE)
    status = await settled(other.status(ENDPOINT, handle.request_id, with_logs=True))
    assert isinstance(status, fal_client.Completed)
    assert await settled(other.result(ENDPOINT, handle.request_id)) == output


async def test_a_waiting_request_is_cancelled_by_its_handle(fal: Any, busy: dict[str, Any]) -> None:
    handle = await settled(fal.submit(ENDPOINT, SMALL))
    assert await settled(handle.status()) == fal_client.Queued(position=0)
    await settled(handle.cancel())
    status = await settled(handle.status())
    assert isinstance(status, fal_client.Completed) and status.error_type == "client_cancelled"
    with pytest.raises(fal_client.FalClientHTTPError, match="Request cancelled by the client.") as caught:
        await settled(handle.get())
    assert (caught.value.status_code, caught.value.error_type) == (499, "client_cancelled")


async def test_a_running_request_is_cancelled_by_its_id(fal: Any, busy: dict[str, Any]) -> None:
    request_id = busy["request_id"]
    assert isinstance(await settled(fal.status(ENDPOINT, request_id)), fal_client.InProgress)
    await settled(fal.cancel(ENDPOINT, request_id))
    handle = await settled(fal.get_handle(ENDPOINT, request_id))
    last = (await collected(handle.iter_events(interval=0.02)))[-1]
    assert last.error_type == "client_cancelled"
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.cancel(ENDPOINT, request_id))
    assert caught.value.status_code == 400


async def test_a_subscriber_that_gives_up_cancels_its_request(fal: Any) -> None:
    with pytest.raises(fal_client.FalClientTimeoutError) as caught:
        await settled(fal.subscribe(ENDPOINT, LONG, client_timeout=1.1))
    handle = await settled(fal.get_handle(ENDPOINT, caught.value.request_id))
    last = (await collected(handle.iter_events(interval=0.02)))[-1]
    assert last.error_type == "client_cancelled"


async def test_a_stream_yields_previews_and_then_the_output(fal: Any, server: Server) -> None:
    *previews, output = await collected(fal.stream(ENDPOINT, WATCHED))
    assert previews
    for preview in previews:
        assert preview["images"][0]["url"].startswith("data:image/jpeg;base64,")
    assert output["images"][0]["url"].startswith(f"{server.url}/files/")
    assert output["seed"] == WATCHED["seed"]


async def test_low_priority_waits_behind_normal(fal: Any, busy: dict[str, Any]) -> None:
    low = await settled(fal.submit(ENDPOINT, SMALL, priority="low"))
    assert await settled(low.status()) == fal_client.Queued(position=0)
    normal = await settled(fal.submit(ENDPOINT, SMALL, priority="normal"))
    assert await settled(normal.status()) == fal_client.Queued(position=0)
    assert await settled(low.status()) == fal_client.Queued(position=1)
    for handle in (low, normal):
        await settled(handle.cancel())


async def test_a_request_that_cannot_start_in_time_ends(fal: Any, busy: dict[str, Any]) -> None:
    handle = await settled(fal.submit(ENDPOINT, SMALL, start_timeout=1.1))
    with pytest.raises(fal_client.FalClientHTTPError, match="Request timed out") as caught:
        await settled(handle.get())
    assert (caught.value.status_code, caught.value.error_type) == (504, "request_timeout")
    assert caught.value.response_headers["x-fal-request-timeout-type"] == "user"
    last = await settled(handle.status())
    assert (last.error, last.error_type) == ("Request timed out", "request_timeout")


async def test_a_start_timeout_does_not_end_what_has_started(fal: Any) -> None:
    output = await settled(fal.run(ENDPOINT, SMALL, start_timeout=30))
    assert output["seed"] == SMALL["seed"]


@pytest.mark.parametrize(
    "key",
    [
        "alice:guess",  # a known id with another secret
        "mallory:s3cret",  # a known secret under another id
        "s3cret",  # no id at all
    ],
)
async def test_a_wrong_key_is_told_to_be_one(key: str, fal: Any, connect: Connect) -> None:
    request_id = (await settled(fal.submit(ENDPOINT, SMALL))).request_id
    intruder = connect(key)
    calls: list[Callable[[], Any]] = [
        lambda: intruder.run(ENDPOINT, SMALL),
        lambda: intruder.submit(ENDPOINT, SMALL),
        lambda: intruder.status(ENDPOINT, request_id),
        lambda: intruder.result(ENDPOINT, request_id),
        lambda: intruder.cancel(ENDPOINT, request_id),
    ]
    for call in calls:
        with pytest.raises(fal_client.FalClientHTTPError, match="invalid key credentials") as caught:
            await settled(call())
        assert (caught.value.status_code, caught.value.error_type) == (401, "auth_error")


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("fal-ai/nope", 'Application "fal-ai/nope" not found'),  # no such application
        (f"{APP}/nope", "Path /nope not found"),  # the application has no such path
        (APP, "Path / not found"),  # nor one without
        ("workflows/acme/flow", 'Application "workflows/acme" not found'),  # a name space of fal's
    ],
)
async def test_an_unknown_endpoint_is_refused_at_submit(endpoint: str, message: str, fal: Any) -> None:
    for call in (fal.submit, fal.run):
        with pytest.raises(fal_client.FalClientHTTPError, match=message) as caught:
            await settled(call(endpoint, SMALL))
        assert (caught.value.status_code, caught.value.error_type) == (404, "not_found")


@pytest.mark.parametrize(
    ("change", "loc", "kind"),
    [
        ({"prompt": None}, ["body", "prompt"], "missing"),  # null means absent
        ({"prompt": 7}, ["body", "prompt"], "string_type"),  # a wrong type
        ({"num_inference_steps": 0}, ["body", "num_inference_steps"], "greater_than_equal"),  # a bound
        ({"guidance_scale": 20.5}, ["body", "guidance_scale"], "less_than_equal"),  # the other
        ({"image_size": SIZE | {"width": 0}}, ["body", "image_size", "width"], "greater_than"),  # inside
        ({"image_size": "huge"}, ["body", "image_size"], "enum"),  # no such name
        ({"seed": 2**63}, ["body", "seed"], "less_than"),  # more than 64 bits
    ],
)
async def test_an_invalid_input_is_refused_at_submit_with_the_field_s_path(
    change: dict[str, Any], loc: list[str], kind: str, fal: Any
) -> None:
    for call in (fal.submit, fal.run):
        with pytest.raises(fal_client.FalClientHTTPError) as caught:
            await settled(call(ENDPOINT, SMALL | change))
        assert caught.value.status_code == 422
        [detail] = caught.value.message
        assert (detail["loc"], detail["type"]) == (loc, kind)
        assert detail["msg"]


async def test_a_finished_request_is_unknown_under_another_application(fal: Any) -> None:
    handle = await settled(fal.submit(ENDPOINT, SMALL))
    await settled(handle.get())
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.status("fal-ai/sdxl", handle.request_id))
    assert caught.value.status_code == 404


async def test_a_picture_is_remade_from_a_data_uri_and_from_the_servers_own_file(fal: Any) -> None:
    start = Image.linear_gradient("L").resize((80, 48)).convert("RGB")
    fields = {"prompt": "a lighthouse", "num_inference_steps": 3, "seed": 7, "strength": 0.5}
    uri = fal_client.encode_image(start, "png")
    made = await settled(fal.subscribe(REMAKE, arguments=fields | {"image_url": uri}))
    assert (made["images"][0]["width"], made["images"][0]["height"]) == (80, 48)
    again = await settled(fal.run(REMAKE, arguments=fields | {"image_url": made["images"][0]["url"]}))
    assert (again["images"][0]["width"], again["images"][0]["height"]) == (80, 48)
    assert again["seed"] == 7


async def test_a_start_picture_inside_the_network_is_refused_by_its_field(fal: Any) -> None:
    fields = {"prompt": "x", "image_url": "http://169.254.169.254/latest/meta-data"}
    with pytest.raises(fal_client.FalClientHTTPError) as raised:
        await settled(fal.subscribe(REMAKE, arguments=fields))
    assert raised.value.status_code == 422
    assert raised.value.response.json()["detail"][0]["loc"] == ["body", "image_url"]
