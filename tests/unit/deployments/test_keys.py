"""Who may call."""

from collections.abc import Callable

import pytest

from deployments.gateway.keys import ANYONE, Keys, digest, parse
from schemas.errors import NotAuthenticated

KEYS = Keys(parse("alice:s3cret, bob:with:colon"))
PATH = "fal-ai/flux/dev/realtime"


@pytest.mark.parametrize(
    ("header", "tenant"),
    [
        ("Key alice:s3cret", "alice"),
        ("key alice:s3cret", "alice"),
        ("Bearer alice:s3cret", "alice"),
        ("  KEY   alice:s3cret ", "alice"),
        ("Key bob:with:colon", "bob"),
    ],
)
def test_a_key_opens_under_either_scheme(header: str, tenant: str) -> None:
    assert KEYS.tenant([header]) == tenant


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["Key"],
        ["Key alice"],
        ["Key alice:"],
        ["Key :s3cret"],
        ["Key alice:S3CRET"],
        ["Key nobody:"],
        ["Key nobody:s3cret"],
        ["Basic alice:s3cret"],
        ["alice:s3cret"],
        ["Key " + "a" * 1_000_000],
        ["Key alice:s3cret", "Key alice:s3cret"],  # which one would count?
    ],
)
def test_anything_else_is_refused(headers: list[str]) -> None:
    with pytest.raises(NotAuthenticated):
        KEYS.tenant(headers)


def test_without_keys_everyone_is_the_same_tenant() -> None:
    assert Keys({}).tenant([]) == ANYONE


@pytest.mark.parametrize("text", ["alice", "alice:", ":secret", "a:b c"])
def test_a_malformed_key_stops_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="ID:SECRET"):
        parse(text)


def test_secrets_are_not_kept() -> None:
    assert "s3cret" not in repr(vars(KEYS))


@pytest.mark.parametrize("app", ["flux", "fal-ai/flux", "fal-ai/flux/dev", "fal-ai/flux/dev/realtime"])
def test_a_token_stands_for_its_tenant_at_its_apps(app: str) -> None:
    token = KEYS.issue("alice", ["other", app], 120)
    assert KEYS.holder(token, PATH) == "alice"
    assert "s3cret" not in token


@pytest.mark.parametrize("app", ["", "fal-ai", "flu", "fal-ai/flu", "fal-ai/flux-lora", "dev", "realtime"])
def test_a_token_is_for_no_other_app(app: str) -> None:
    with pytest.raises(NotAuthenticated, match="not for this application"):
        KEYS.holder(KEYS.issue("alice", [app], 120), PATH)


def test_a_token_opens_no_service_that_takes_none() -> None:
    with pytest.raises(NotAuthenticated):
        KEYS.holder(KEYS.issue("alice", ["flux"], 120), "")


def test_a_token_expires() -> None:
    now = 1_000_000.0
    keys = Keys(parse("alice:s3cret"), lambda: now)
    token = keys.issue("alice", ["flux"], 120)
    now += 119
    assert keys.holder(token, PATH) == "alice"
    now += 1
    with pytest.raises(NotAuthenticated, match="expired"):
        keys.holder(token, PATH)


@pytest.mark.parametrize(
    "forge",
    [
        lambda token: "",
        lambda token: token.partition(":")[2],  # nobody's
        lambda token: token.replace("alice", "bob"),  # another's
        lambda token: token.replace("alice", "nobody"),
        lambda token: token[:-1],
        lambda token: f"{token}A",
        lambda token: "alice:" + "A" * 100_000,
        lambda token: "alice:é.é",
        lambda token: Keys(parse("alice:another")).issue("alice", ["flux"], 120),  # of a key since changed
        lambda token: Keys({"mallory": digest("")}).issue("mallory", ["flux"], 120),  # of an unknown one
    ],
)
def test_a_forged_token_is_refused(forge: Callable[[str], str]) -> None:
    with pytest.raises(NotAuthenticated):
        KEYS.holder(forge(KEYS.issue("alice", ["flux"], 120)), PATH)


def test_without_keys_any_token_will_do() -> None:
    assert Keys({}).holder("whatever", PATH) == ANYONE
