"""Files from fal's JavaScript clients. What they do with pictures in an input is in test_node_pictures."""

import hashlib
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Tell

LARGE = 91 * 2**20  # the newer client sends more than 90 MiB in parts


@pytest.fixture(scope="module")
def told(tell: Tell) -> dict[str, Any]:
    return tell("uploads.mjs", {"large": LARGE})


@pytest.mark.parametrize(
    ("name", "ending", "kind", "data"),
    [
        ("file", "_hello.txt", "text/plain", b"Hello, World!"),
        ("unnamed", ".json", "application/json", b"{}"),
        ("untyped", "", "application/octet-stream", b"\0\1"),
        ("empty", "_empty.txt", "text/plain", b""),
    ],
)
def test_a_file_is_read_back_as_it_was_sent(
    name: str, ending: str, kind: str, data: bytes, told: dict[str, Any], stranger: httpx.Client
) -> None:
    answer = stranger.get(told[name])
    assert told[name].startswith(f"{stranger.base_url}/files/") and told[name].endswith(ending)
    assert (answer.content, answer.headers["content-type"]) == (data, kind)


def test_a_large_file_arrives_whole(told: dict[str, Any], stranger: httpx.Client) -> None:
    with stranger.stream("GET", told["large"]) as answer:
        assert answer.headers["content-length"] == str(LARGE)
        digest = hashlib.sha256()
        for chunk in answer.iter_raw():
            digest.update(chunk)
    assert digest.digest() == hashlib.sha256(b"\7" * LARGE).digest()


def test_a_file_may_be_kept_for_a_while_but_not_hidden(
    way: str, told: dict[str, Any], stranger: httpx.Client
) -> None:
    if way == "serverless":
        pytest.skip("it has no lifecycle")
    assert stranger.get(told["kept"]).content == b"x"
    assert (told["hidden"]["name"], told["hidden"]["status"]) == ("ApiError", 400)
    assert "initial_acl" in told["hidden"]["message"]


def test_without_a_valid_key_nothing_is_taken(told: dict[str, Any]) -> None:
    error = told["wrongKey"]
    assert (error["name"], error["status"]) == ("ApiError", 401)
    assert error["message"] == "invalid key credentials"
