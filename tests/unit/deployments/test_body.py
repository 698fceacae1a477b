"""JSON from outside: what is let in, and how the rest is refused."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.gateway import body
from schemas.errors import BodyTooLarge, InputError


@pytest.mark.parametrize(
    ("text", "loc", "kind"),
    [
        (b"{", ["body"], "json_invalid"),
        (b"\xff\xfe{}", ["body"], "json_invalid"),  # not UTF-8
        ('{"a": 1}'.encode("utf-16"), ["body"], "json_invalid"),
        (b"\xef\xbb\xbf{}", ["body"], "json_invalid"),  # a byte order mark
        (b"[" * 100_000, ["body"], "json_invalid"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, ["body", "a", "a", "a"], "json_invalid"),
        (b'{"a": [1, NaN]}', ["body", "a", 1], "finite_number"),
        (b'{"a": {"b": -Infinity}}', ["body", "a", "b"], "finite_number"),
        (b'{"a": 1e999}', ["body", "a"], "finite_number"),
        (b'{"a": ' + b"9" * 5000 + b"}", ["body", "a"], "int_parsing_size"),
        (b'{"a": "\\u0000"}', ["body", "a"], "string_unicode"),
        (b'{"a": "\\ud800"}', ["body", "a"], "string_unicode"),  # half a surrogate pair
        (b'{"\\ud800": 1}', ["body", "\ud800"], "string_unicode"),
        (b'{"a": [' + b"1," * 5000 + b"1]}", ["body", "a"], "too_long"),
        (b'{"a": [' + b",".join([b"[" + b",".join([b"1"] * 4000) + b"]"] * 70) + b"]}", ["body"], "too_long"),
        (b"," * 2_000_001, ["body"], "too_long"),
        (b"[]", ["body"], "dict_type"),
        (b"null", ["body"], "dict_type"),
        (b'"text"', ["body"], "dict_type"),
    ],
)
def test_t33_bad_json_is_refused_with_its_place(text: bytes, loc: list[Any], kind: str) -> None:
    with pytest.raises(InputError) as raised:
        body.parse(text)
    [fault] = raised.value.fields
    assert (list(fault.loc), fault.type) == (loc, kind)
    assert fault.msg


@pytest.mark.parametrize("text", [b"", b"  \n"])
def test_an_empty_body_is_an_empty_object(text: bytes) -> None:
    assert body.parse(text) == {}


def test_good_json_passes_unchanged() -> None:
    assert body.parse('{"a": [1, 2.5, "ü\\ud83d\\ude00", null, true]}'.encode()) == {
        "a": [1, 2.5, "ü😀", None, True]
    }


@given(st.binary(max_size=60))
def test_t33_any_bytes_are_parsed_or_refused_and_nothing_else(data: bytes) -> None:
    try:
        assert isinstance(body.parse(data), dict)
    except InputError as error:
        assert error.body()["message"]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_body_up_to_the_limit_is_read() -> None:
    assert await body.read(chunks(b"ab", b"cd"), None, 4) == b"abcd"


@pytest.mark.parametrize("declared", [None, "5", "99999999999999999999999999", "2"])
async def test_t19_a_body_over_the_limit_is_refused_whatever_it_declares(declared: str | None) -> None:
    with pytest.raises(BodyTooLarge):
        await body.read(chunks(b"abc", b"de"), declared, 4)
