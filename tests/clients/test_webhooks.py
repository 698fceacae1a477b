"""Webhooks end to end: asked for by fal's clients, received and verified as fal's documentation says."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from deployments.cli import app
from tests.clients.conftest import Tell
from tests.clients.halves import settled
from tests.clients.inputs import ENDPOINT, REMAKE, SMALL
from tests.support.receivers import Post, Receiver, is_genuine, keys_at
from tests.support.server import Server

FORBIDDEN = [
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/",
    "http://[::1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://167772161/",  # 10.0.0.1
    "http://0xa.1/",
    "http://192.168.1.1:8080/",
]
MALFORMED = [
    "",
    "there.example/hook",
    "ftp://there.example/hook",
    "file:///etc/passwd",
    "http://me:secret@there.example/",
    "http://there.example:99999/",
    "http://a..b/",
    "http://[::1",
    "http://there.example/\r\nx-evil: 1",
    "http://th ere.example/",
    "javascript:alert(1)",
]


def asking(url: str) -> str:
    return f"/queue/{ENDPOINT}?fal_webhook={quote(url, safe='')}"


def content(post: Post) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(post.body)
    return found


async def test_a_result_arrives_at_the_url_given_to_submit(
    fal: Any, server: Server, receiver: Receiver
) -> None:
    handle = await settled(fal.submit(ENDPOINT, SMALL, webhook_url=f"{receiver.url}/hook?a=b&c=%2F"))
    post = receiver.next()
    assert post.path == "/hook?a=b&c=%2F"
    assert is_genuine(post, keys_at(server.url), time.time())
    assert post.headers["content-type"] == "application/json"
    assert post.headers["x-fal-webhook-request-id"] == handle.request_id
    assert post.headers["x-fal-webhook-user-id"] == "alice"
    assert content(post) == {
        "request_id": handle.request_id,
        "gateway_request_id": handle.request_id,
        "status": "OK",
        "payload": await settled(handle.get()),
    }


def test_the_javascript_clients_ask_for_webhooks_and_node_verifies_them(way: str, tell: Tell) -> None:
    told = tell("webhooks.mjs")
    assert told["genuine"] is True
    assert told["forged"] is False
    assert told["body"]["request_id"] == told["requestId"]
    assert told["body"]["status"] == "OK"
    assert told["body"]["payload"]["images"]


def test_a_model_error_arrives_with_its_full_body(
    alice: httpx.Client, server: Server, receiver: Receiver
) -> None:
    fields = SMALL | {"image_url": "http://127.0.0.1:1/none.png"}
    fields.pop("image_size")
    receipt = alice.post(f"/queue/{REMAKE}", params={"fal_webhook": receiver.url}, json=fields).json()
    post = receiver.next()
    assert is_genuine(post, keys_at(server.url), time.time())
    answer = alice.get(receipt["response_url"])
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "image_url"]
    assert content(post) == {
        "request_id": receipt["request_id"],
        "gateway_request_id": receipt["request_id"],
        "status": "ERROR",
        "error": "Invalid status code: 422",
        "payload": answer.json(),
    }


def test_requests_that_never_ran_are_told_of_too(
    alice: httpx.Client, receiver: Receiver, busy: dict[str, Any]
) -> None:
    cancelled = alice.post(asking(f"{receiver.url}/cancelled"), json=SMALL).json()
    late = {"x-fal-request-timeout": "1.1"}
    alice.post(asking(f"{receiver.url}/late"), json=SMALL, headers=late).raise_for_status()
    alice.put(cancelled["cancel_url"]).raise_for_status()
    posts = {post.path: content(post) for post in (receiver.next(), receiver.next())}
    for path, status, error_type in (
        ("/cancelled", 499, "client_cancelled"),
        ("/late", 504, "request_timeout"),
    ):
        assert posts[path]["status"] == "ERROR"
        assert posts[path]["error"] == f"Invalid status code: {status}"
        assert posts[path]["payload"]["error_type"] == error_type


def cli(server: Server, *arguments: str) -> str:
    """What the operator is told on the machine of the server."""
    done = CliRunner().invoke(app, ["webhooks", *arguments, "--config", str(config_of(server))])
    assert done.exit_code == 0, done.output
    return done.output


def config_of(server: Server) -> Path:
    return server.log.parent / "serve_config.yaml"


def test_a_receiver_that_was_down_hears_later_and_the_operator_sees_every_try(
    alice: httpx.Client, server: Server, receiver: Receiver
) -> None:
    receiver.statuses["/down?token=canary"] = [500, 302, 200]
    receiver.locations["/down?token=canary"] = f"{receiver.url}/elsewhere"
    receipt = alice.post(asking(f"{receiver.url}/down?token=canary"), json=SMALL).json()
    posts = [receiver.next() for _ in range(3)]
    assert {post.path for post in posts} == {"/down?token=canary"}
    assert {post.headers["x-fal-webhook-request-id"] for post in posts} == {receipt["request_id"]}
    assert all(is_genuine(post, keys_at(server.url), time.time()) for post in posts)

    shown = ""
    for _ in range(100):  # the outcome is written down after the answer
        if "delivered" in (shown := cli(server, "show", receipt["request_id"])):
            break
    assert "delivered" in shown
    assert [status for status in ("500", "302", "200") if f" {status} " in shown] == ["500", "302", "200"]
    assert receipt["request_id"] in cli(server, "list", "--state", "delivered")
    assert "canary" not in shown + cli(server, "list") + server.log.read_text()

    assert "is due now" in cli(server, "redeliver", receipt["request_id"])
    again = receiver.next()
    assert again.body == posts[0].body
    assert is_genuine(again, keys_at(server.url), time.time())


def test_t24_a_forged_or_replayed_webhook_does_not_verify(
    alice: httpx.Client, server: Server, receiver: Receiver
) -> None:
    alice.post(asking(receiver.url), json=SMALL).raise_for_status()
    post = receiver.next()
    keys = keys_at(server.url)
    assert is_genuine(post, keys, time.time())
    assert not is_genuine(replace(post, body=post.body.replace(b"OK", b"KO")), keys, time.time())
    for name, value in {"user-id": "bob", "request-id": "other", "signature": "00" * 64}.items():
        forged = replace(post, headers={**post.headers, f"x-fal-webhook-{name}": value})
        assert not is_genuine(forged, keys, time.time())
    assert not is_genuine(post, keys, time.time() + 301)


def test_a_slow_receiver_holds_up_nobody_else(alice: httpx.Client, receiver: Receiver) -> None:
    receiver.gates["/slow"] = threading.Event()
    for path in ("/slow", "/slow", "/quick"):
        alice.post(asking(receiver.url + path), json=SMALL).raise_for_status()
    assert sorted(receiver.next().path for _ in range(3)) == ["/quick", "/slow", "/slow"]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_t05_a_forbidden_address_is_refused_at_submit(alice: httpx.Client, url: str) -> None:
    answer = alice.post(asking(url), json=SMALL)
    assert answer.status_code == 400
    text = "fal_webhook: The address may not be reached."
    assert answer.json() == {"detail": text, "error_type": "bad_request", "message": text}


@pytest.mark.parametrize("url", MALFORMED)
def test_what_is_no_url_is_refused_at_submit(alice: httpx.Client, url: str) -> None:
    answer = alice.post(asking(url), json=SMALL)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("fal_webhook")
    assert "secret" not in answer.text


def test_the_keys_are_open_to_everybody_and_may_be_cached(
    stranger: httpx.Client, alice: httpx.Client
) -> None:
    target = {"x-fal-target-url": "https://rest.fal.ai/.well-known/jwks.json"}
    answers = [
        stranger.get("/rest/.well-known/jwks.json"),
        stranger.get("/.well-known/jwks.json", headers={"host": "rest.fal.ai"}),
        stranger.get("/.well-known/jwks.json"),
        alice.get("/api/fal/proxy", headers=target),
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].headers["content-type"] == "application/json"
    assert answers[0].headers["cache-control"] == "public, max-age=3600"
    assert answers[0].headers["access-control-allow-origin"] == "*"
    assert all(len(key["x"]) == 44 and "d" not in key for key in answers[0].json()["keys"])
    assert stranger.get("/rest/.well-known/other.json").status_code == 401
    for closed in ("/rest/.well-known/jwks.json/", "/.well-known/jwks.json/requests/x", "/run/.well-known/"):
        assert stranger.get(closed).status_code == 401
    assert stranger.post("/.well-known/jwks.json?fal_webhook=x", json=SMALL).status_code == 404
    assert alice.get("/rest/.well-known/other.json").status_code == 404


def test_a_rotated_key_is_published_at_once_and_signs_later(
    alice: httpx.Client, server: Server, receiver: Receiver
) -> None:
    before = keys_at(server.url)
    assert "signs from" in cli(server, "rotate")
    after = keys_at(server.url)
    assert after[0] == before[0]
    assert len(after) == len(before) + 1
    alice.post(asking(receiver.url), json=SMALL).raise_for_status()
    assert is_genuine(receiver.next(), before, time.time())  # for receivers that have cached the keys


def test_the_operator_is_told_what_does_not_exist(server: Server, tmp_path: Path) -> None:
    for verb in ("show", "redeliver"):
        done = CliRunner().invoke(app, ["webhooks", verb, "nonsense", "--config", str(config_of(server))])
        assert done.exit_code == 1
        assert "no webhook of nonsense" in done.output
    frontless = tmp_path / "config.yaml"
    frontless.write_text(yaml.safe_dump({"applications": []}))
    done = CliRunner().invoke(app, ["webhooks", "list", "--config", str(frontless)])
    assert done.exit_code == 1
    assert "no application" in done.output
