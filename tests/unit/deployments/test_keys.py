"""Who may call."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.gateway.keys import ANYONE, LOOK_S, Keys, parse
from deployments.gateway.throttle import Throttle
from deployments.queue import KeyTable, open_keys
from schemas.access import Actor, Allowance, digest
from schemas.errors import NotAuthenticated, StoreDown, TooManyRequests
from tests.support.jobs import Clock

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
        lambda token: Keys(parse("alice:s3cret"), secret=b"other").issue("alice", ["flux"], 120),
    ],
)
async def test_a_forged_token_is_refused(forge: Callable[[str], str]) -> None:
    with pytest.raises(NotAuthenticated):
        await holder(forge(KEYS.issue("alice", ["flux"], 120)))


async def test_without_keys_any_token_will_do() -> None:
    assert await holder("whatever", PATH, Keys({})) == ANYONE


# --- keys of the table ---


class Broken:
    """A table that can be read only when it is told to."""

    def __init__(self, table: KeyTable) -> None:
        self._table = table
        self.is_down = False
        self.looks = 0

    async def since(self, known: Any) -> Any:
        self.looks += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise StoreDown("away")
        return await self._table.since(known)


@pytest.fixture
async def table(tmp_path: Path) -> AsyncIterator[KeyTable]:
    table = open_keys(f"sqlite:///{tmp_path}/queue.sqlite3")
    yield table
    await table.close()


@pytest.fixture
def ticks() -> Clock:
    return Clock()


def keys_of(table: Any, ticks: Clock, text: str = "") -> Keys:
    return Keys(parse(text), table=table, ticks=ticks)


async def opens(keys: Keys, shown: str) -> bool:
    try:
        await keys.actor([f"Key {shown}"])
    except NotAuthenticated:
        return False
    return True


async def test_a_key_of_the_table_says_who_calls_and_what_it_may(table: KeyTable, ticks: Clock) -> None:
    key, secret = await table.create("alice", allowance=Allowance(per_minute=5))
    actor = await keys_of(table, ticks).actor([f"Key {key.key_id}:{secret}"], "192.0.2.7")
    assert actor == Actor("alice", key.key_id, "192.0.2.7", Allowance(per_minute=5))


async def test_t01_a_key_opens_and_ends_within_two_seconds_in_every_process(
    table: KeyTable, ticks: Clock
) -> None:
    processes = [keys_of(table, ticks, "env:secret") for _ in range(3)]
    for each in processes:
        assert await opens(each, "env:secret")
    key, secret = await table.create("alice")
    ticks.now += LOOK_S
    assert [await opens(each, f"{key.key_id}:{secret}") for each in processes] == [True] * 3
    await table.revoke(key.key_id)
    ticks.now += LOOK_S
    assert [await opens(each, f"{key.key_id}:{secret}") for each in processes] == [False] * 3
    assert [await opens(each, "env:secret") for each in processes] == [True] * 3
    assert LOOK_S < 2


async def test_t01_the_first_key_closes_the_server_for_good(table: KeyTable, ticks: Clock) -> None:
    keys = keys_of(table, ticks)
    anyone = await keys.actor([])
    assert anyone.tenant == ANYONE and not keys.are_required
    await keys.check(anyone)
    key, _ = await table.create()
    ticks.now += LOOK_S
    with pytest.raises(NotAuthenticated):
        await keys.actor([])
    with pytest.raises(NotAuthenticated, match="revoked"):
        await keys.check(anyone)  # what began when the server was open
    await table.revoke(key.key_id)
    ticks.now += LOOK_S
    for later in (keys, keys_of(table, ticks)):  # also after a start
        with pytest.raises(NotAuthenticated):
            await later.actor([])
        assert later.are_required


async def test_t01_tokens_end_with_the_key(table: KeyTable, ticks: Clock) -> None:
    keys = keys_of(table, ticks)
    key, _ = await table.create("alice")
    await keys.refresh()
    word = keys.issue(key.key_id, ["flux"], 120)
    assert await holder(word, PATH, keys) == "alice"
    await table.revoke(key.key_id)
    ticks.now += LOOK_S
    with pytest.raises(NotAuthenticated):
        await holder(word, PATH, keys)


async def test_a_key_of_the_environment_wins_over_the_table(table: KeyTable, ticks: Clock) -> None:
    key, secret = await table.create("alice")
    keys = keys_of(table, ticks, f"{key.key_id}:mine")
    assert await opens(keys, f"{key.key_id}:mine") and not await opens(keys, f"{key.key_id}:{secret}")


async def test_however_many_call_the_table_is_read_once_a_second(table: KeyTable, ticks: Clock) -> None:
    watched = Broken(table)
    keys = keys_of(watched, ticks)
    for second in (1, 2, 3):
        await asyncio.gather(*(keys.refresh() for _ in range(50)))
        ticks.now += LOOK_S / 2
        await keys.refresh()
        assert watched.looks == second
        ticks.now += LOOK_S / 2


async def test_t01_while_the_table_cannot_be_read_nothing_new_opens(table: KeyTable, ticks: Clock) -> None:
    key, secret = await table.create("alice")
    watched = Broken(table)
    watched.is_down = True
    keys = keys_of(watched, ticks, "env:secret")
    with pytest.raises(StoreDown):  # it may hold what closes the server
        await keys.actor([])
    watched.is_down = False
    assert await opens(keys, f"{key.key_id}:{secret}")
    watched.is_down = True
    ticks.now += 10 * LOOK_S
    assert await opens(keys, f"{key.key_id}:{secret}")
    assert not await opens(keys, f"{key.key_id}:guess")


async def test_t02_an_address_that_shows_wrong_keys_is_throttled_but_never_locked_out() -> None:
    keys = Keys(parse("alice:s3cret"), throttle=Throttle(2))
    for error in (NotAuthenticated, NotAuthenticated, TooManyRequests, TooManyRequests):
        with pytest.raises(error):
            await keys.actor(["Key alice:guess"], "192.0.2.7")
    assert (await keys.actor(["Key alice:s3cret"], "192.0.2.7")).tenant == "alice"
    for malformed in ("", "Key", "Key alice", "Key alice:", "Basic alice:s3cret", "alice:s3cret"):
        with pytest.raises(NotAuthenticated):
            await keys.actor([malformed], "192.0.2.7")  # is a mistake and no guess
    for given in ([], ["Key alice:guess"]):
        with pytest.raises(NotAuthenticated):
            await keys.actor(given, "192.0.2.8")
    with pytest.raises(NotAuthenticated):
        await keys.actor([], "192.0.2.7", token="old", path=PATH)  # a browser's may just have expired
