"""What a webhook says, and that nobody but its key's owner can have said it."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.webhooks import message
from deployments.webhooks.keyring import Keyring
from schemas.errors import Cancelled, FieldError, InputError, InternalError, StartTimeout, WorkerLost
from schemas.jobs import JobResult
from tests.support.jobs import OUTPUT, Clock
from tests.support.receivers import TOLERANCE_S, Post, is_genuine

REQUEST_ID = "0f5c2a3e-7c1d-4a53-9d4e-7f6f1c2b3a4d"
IDS = {"request_id": REQUEST_ID, "gateway_request_id": REQUEST_ID}
NOW = 1_700_000_000.9
MUTATIONS = 10_000


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring(tmp_path_factory.mktemp("keys"), 86_400)


def document(result: JobResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message.body(REQUEST_ID, result.status, result.body))
    return found


def post(keyring: Keyring, body: bytes, tenant: str = "alice") -> Post:
    headers = message.headers(keyring.sign, REQUEST_ID, tenant, NOW, body)
    return Post("/", {name.lower(): value for name, value in headers.items()}, body)


def test_a_success_carries_the_output() -> None:
    assert document(JobResult.success(OUTPUT, 0.5)) == IDS | {"status": "OK", "payload": OUTPUT}


def test_a_model_error_carries_its_full_body() -> None:
    wrong = InputError([FieldError(("body", "prompt"), "Field required", "missing", input={"a": "ü☂"})])
    told = document(JobResult.failure(wrong))
    assert told == IDS | {
        "status": "ERROR",
        "error": "Invalid status code: 422",
        "payload": wrong.body(),
    }
    [detail] = told["payload"]["detail"]
    assert detail == {
        "loc": ["body", "prompt"],
        "msg": "Field required",
        "type": "missing",
        "input": {"a": "ü☂"},
    }


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (StartTimeout(), 504, "request_timeout"),
        (Cancelled(), 499, "client_cancelled"),
        (WorkerLost("lost"), 503, "runner_disconnected"),
        (InternalError("broken"), 500, "internal_server_error"),
    ],
)
def test_every_other_end_is_an_error_with_its_body(error: Any, status: int, error_type: str) -> None:
    told = document(JobResult.failure(error))
    assert told == IDS | {
        "status": "ERROR",
        "error": f"Invalid status code: {status}",
        "payload": error.body(),
    }
    assert told["payload"]["error_type"] == error_type


def test_what_is_no_json_is_told_without_it() -> None:
    told = document(JobResult.success({"seed": math.nan}, 0.5))
    assert told["payload"] is None
    assert told["status"] == "OK"
    assert "not JSON serializable" in told["payload_error"]


def test_the_headers_are_fals(keyring: Keyring) -> None:
    headers = post(keyring, b"{}").headers
    assert set(headers) == {
        "content-type",
        "x-fal-webhook-request-id",
        "x-fal-webhook-user-id",
        "x-fal-webhook-timestamp",
        "x-fal-webhook-signature",
    }
    assert headers["content-type"] == "application/json"
    assert headers["x-fal-webhook-request-id"] == REQUEST_ID
    assert headers["x-fal-webhook-user-id"] == "alice"
    assert headers["x-fal-webhook-timestamp"] == "1700000000"
    assert len(bytes.fromhex(headers["x-fal-webhook-signature"])) == 64


@pytest.mark.parametrize("tenant", ["public", "me@example.org", "Zoë ☂", "a\nx-evil: 1"])
def test_the_signature_passes_fals_own_verification(keyring: Keyring, tenant: str) -> None:
    sent = post(keyring, b'{"a":1}', tenant)
    assert is_genuine(sent, keyring.jwks()["keys"], NOW)
    assert all(value.isascii() and value.isprintable() for value in sent.headers.values())


def test_t24_a_replay_is_too_old(keyring: Keyring) -> None:
    sent = post(keyring, b"{}")
    keys = keyring.jwks()["keys"]
    assert is_genuine(sent, keys, NOW + TOLERANCE_S - 1)
    assert not is_genuine(sent, keys, NOW + TOLERANCE_S + 1)
    newer = {**sent.headers, "x-fal-webhook-timestamp": str(int(NOW) + TOLERANCE_S)}
    assert not is_genuine(replace(sent, headers=newer), keys, NOW + TOLERANCE_S + 1)


def test_t24_another_servers_key_does_not_pass(keyring: Keyring, tmp_path: Path) -> None:
    foreign = Keyring(tmp_path, 86_400, Clock())
    assert not is_genuine(post(foreign, b"{}"), keyring.jwks()["keys"], NOW)


def test_t24_no_forgery_passes(keyring: Keyring) -> None:
    keys = keyring.jwks()["keys"]
    sent = post(keyring, message.body(REQUEST_ID, 200, OUTPUT))
    chance = random.Random(7)
    assert not any(is_genuine(_mutated(sent, chance), keys, NOW) for _ in range(MUTATIONS))


def _mutated(sent: Post, chance: random.Random) -> Post:
    """One bit of what is signed, or of the signature, is another."""
    part = chance.choice(["body", "request-id", "user-id", "timestamp", "signature"])
    if part == "body":
        return replace(sent, body=_flipped(sent.body, chance))
    name = f"x-fal-webhook-{part}"
    value = sent.headers[name]
    if part == "signature":
        changed = _flipped(bytes.fromhex(value), chance).hex()
    else:
        changed = _flipped(value.encode(), chance).decode("latin-1")
    return replace(sent, headers={**sent.headers, name: changed})


def _flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)
