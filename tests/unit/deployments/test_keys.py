"""Who may call."""

import pytest

from deployments.gateway.keys import ANYONE, Keys, parse
from schemas.errors import NotAuthenticated

KEYS = Keys(parse("alice:s3cret, bob:with:colon"))


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
