"""Who may call."""

from collections.abc import Callable

import pytest

from deployments.gateway.keys import ANYONE, Keys, parse
from schemas.access import digest
from schemas.errors import NotAuthenticated

KEYS = Keys(parse("alice:s3cret, bob:with:colon"))
PATH = "fal-ai/flux/dev/realtime"


async def tenant(*headers: str) -> str:
    return (await KEYS.actor(headers)).tenant


async def holder(token: str, path: str = PATH, keys: Keys = KEYS) -> str:
    return (await keys.actor([], token=token, path=path)).tenant


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Key alice:s3cret", "alice"),
        ("key alice:s3cret", "alice"),
        ("Bearer alice:s3cret", "alice"),
        ("  KEY   alice:s3cret ", "alice"),
        ("Key bob:with:colon", "bob"),
    ],
)
async def test_a_key_opens_under_either_scheme(header: str, name: str) -> None:
    assert await tenant(header) == name


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
async def test_anything_else_is_refused(headers: list[str]) -> None:
    with pytest.raises(NotAuthenticated):
        await tenant(*headers)


async def test_without_keys_everyone_is_the_same_tenant() -> None:
    assert (await Keys({}).actor([])).tenant == ANYONE


@pytest.mark.parametrize("text", ["alice", "alice:", ":secret", "a:b c"])
def test_a_malformed_key_stops_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="ID:SECRET"):
        parse(text)


def test_secrets_are_not_kept() -> None:
    assert "s3cret" not in repr(vars(KEYS))


@pytest.mark.parametrize("app", ["flux", "fal-ai/flux", "fal-ai/flux/dev", "fal-ai/flux/dev/realtime"])
async def test_a_token_stands_for_its_tenant_at_its_apps(app: str) -> None:
    token = KEYS.issue("alice", ["other", app], 120)
    assert await holder(token) == "alice"
    assert "s3cret" not in token


@pytest.mark.parametrize("app", ["", "fal-ai", "flu", "fal-ai/flu", "fal-ai/flux-lora", "dev", "realtime"])
async def test_a_token_is_for_no_other_app(app: str) -> None:
    with pytest.raises(NotAuthenticated, match="not for this application"):
        await holder(KEYS.issue("alice", [app], 120))


async def test_a_token_opens_no_service_that_takes_none() -> None:
    with pytest.raises(NotAuthenticated):
        await holder(KEYS.issue("alice", ["flux"], 120), "")


async def test_a_token_expires() -> None:
    now = 1_000_000.0
    keys = Keys(parse("alice:s3cret"), lambda: now)
    token = keys.issue("alice", ["flux"], 120)
    now += 119
    assert await holder(token, PATH, keys) == "alice"
    now += 1
    with pytest.raises(NotAuthenticated, match="expired"):
        await holder(token, PATH, keys)


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
async def test_a_forged_token_is_refused(forge: Callable[[str], str]) -> None:
    with pytest.raises(NotAuthenticated):
        await holder(forge(KEYS.issue("alice", ["flux"], 120)))


async def test_without_keys_any_token_will_do() -> None:
    assert await holder("whatever", PATH, Keys({})) == ANYONE
