"""The grammar of weighted prompts: what counts, what is only text, and that every text has a reading."""

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.sd.prompt import MAX_WEIGHT, Break, Piece, parse

UP, DOWN = 1.1, 0.9

READINGS: list[tuple[str, list[tuple[str, float]]]] = [
    ("", []),
    ("a cat", [("a cat", 1)]),
    # the web UIs' brackets
    ("a (cat)", [("a ", 1), ("cat", UP)]),
    ("a [cat] here", [("a ", 1), ("cat", 1 / UP), (" here", 1)]),
    ("((cat))", [("cat", UP**2)]),
    ("(cat:1.4)", [("cat", 1.4)]),
    ("(a cat : 1.4 ), a dog", [("a cat ", 1.4), (", a dog", 1)]),
    ("(cat:.5)(dog:2)", [("cat", 0.5), ("dog", 2)]),
    ("(a:b:1.5)", [("a:b", 1.5)]),
    ("(a (cat:1.5) and [a dog]:2)", [("a ", 2), ("cat", 3), (" and ", 2), ("a dog", 2 / UP)]),
    ("(line\nbreak:1.5)", [("line\nbreak", 1.5)]),
    # compel's spellings
    ("(a cat)1.4", [("a cat", 1.4)]),
    ("(a cat)2, a dog", [("a cat", 2), (", a dog", 1)]),
    ("(a cat)++", [("a cat", UP**2)]),
    ("(a cat)-.", [("a cat", DOWN), (".", 1)]),
    ("a cat++ runs--", [("a ", 1), ("cat", UP**2), (" ", 1), ("runs", DOWN**2)]),
    ("(apricots+ and)1.5", [("apricots", 1.5 * UP), (" and", 1.5)]),
    ("sci-fi++", [("sci-fi", UP**2)]),
    # characters themselves
    (r"a \(cat\)", [("a (cat)", 1)]),
    (r"\[cat\] \\ \c", [(r"[cat] \ \c", 1)]),
    (r"miku \(vocaloid\)", [("miku (vocaloid)", 1)]),
    (r"miku_\(vocaloid\)++", [("miku_(vocaloid)", UP**2)]),
    (r"C\+\+ and \-\-", [("C++ and --", 1)]),
    # no partner, no number, no word: text
    ("(cat", [("(cat", 1)]),
    ("cat) ]", [("cat) ]", 1)]),
    ("a :) cat (dog:1.2)", [("a :) cat ", 1), ("dog", 1.2)]),
    ("(a [cat) dog]", [("a [cat", UP), (" dog]", 1)]),
    ("cat:1.4)", [("cat:1.4)", 1)]),
    ("cat)++ dog)1.4", [("cat)++ dog)1.4", 1)]),
    ("(cat:1.2.3)", [("cat:1.2.3", UP)]),
    ("(cat:very)", [("cat:very", UP)]),
    ("(cat)2.5d style", [("cat", UP), ("2.5d style", 1)]),
    ("(cat) 1.4", [("cat", UP), (" 1.4", 1)]),
    ("1 + 1 -- a - b +- c", [("1 + 1 -- a - b +- c", 1)]),
    ("a+- b++x", [("a+- b++x", 1)]),
    ("(cat:" + "1" * 30 + ")", [("cat:" + "1" * 30, UP)]),
    ("()[] (:1.4)", [(" ", 1)]),
    # no more than is sane
    ("(cat:1000) (dog:-2)", [("cat", MAX_WEIGHT), (" ", 1), ("dog", 0)]),
    ("((cat:0.5):30)", [("cat", MAX_WEIGHT)]),
    ("((cat:0.1):30)", [("cat", 3)]),
    ("cat" + "+" * 50_000, [("cat", MAX_WEIGHT)]),
    # weights of 1 are no weights
    ("a (cat:1) here", [("a cat here", 1)]),
]


@pytest.mark.parametrize(("text", "pieces"), READINGS, ids=[text[:20] for text, _ in READINGS])
def test_readings(text: str, pieces: list[tuple[str, float]]) -> None:
    read = parse(text)
    assert all(isinstance(piece, Piece) for piece in read)
    assert [piece.text for piece in read if isinstance(piece, Piece)] == [piece for piece, _ in pieces]
    weights = [piece.weight for piece in read if isinstance(piece, Piece)]
    assert weights == pytest.approx([weight for _, weight in pieces], abs=1e-9)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a BREAK b", [Piece("a "), Break(), Piece(" b")]),
        ("a,\nBREAK, b", [Piece("a,\n"), Break(), Piece(", b")]),
        ("BREAK BREAK", [Break(), Piece(" "), Break()]),
        ("(a BREAK b:1.5)", [Piece("a ", 1.5), Break(), Piece(" b", 1.5)]),
        ("OUTBREAK BREAKFAST break", [Piece("OUTBREAK BREAKFAST break")]),
    ],
)
def test_break_parts_what_is_before_and_after(text: str, pieces: list[Piece | Break]) -> None:
    assert parse(text) == tuple(pieces)


GRAMMAR = st.text(st.sampled_from([*"ab ([)]\\:.,+-01 \n"]), max_size=60)
LEXEMES = st.lists(st.sampled_from([*"a([)]+-", ":1.4)", ")0.5", "BREAK", "++", " ", "\\", ":9e9)", ":-1)"]))
TEXTS = st.text() | GRAMMAR | LEXEMES.map("".join)


@given(TEXTS)
@example("(" * 300 + "a" + ":20)" * 300)
@example("(" * 9000 + "(a:0)" + ")" * 9000)
def test_any_text_has_a_reading(text: str) -> None:
    read = parse(text)
    pieces = [piece for piece in read if isinstance(piece, Piece)]
    assert all(0 <= piece.weight <= MAX_WEIGHT and piece.text for piece in pieces)
    neighbours = zip(read, read[1:], strict=False)
    assert not any(
        one.weight == other.weight
        for one, other in neighbours
        if isinstance(one, Piece) and isinstance(other, Piece)
    )


@given(TEXTS)
def test_nothing_is_added_and_only_grammar_is_lost(text: str) -> None:
    rest = iter(text)
    kept = "".join(piece.text for piece in parse(text) if isinstance(piece, Piece))
    assert all(character in rest for character in kept)  # in the same order
    words = re.compile(r"[()\[\]\\:.0-9+\-\s]|BREAK")
    assert words.sub("", kept) == words.sub("", text)


@given(TEXTS.filter(lambda text: "BREAK" not in text))
def test_escaped_text_is_text(text: str) -> None:
    escaped = re.sub(r"([()\[\]\\+-])", r"\\\1", text)
    assert parse(escaped) == ((Piece(text),) if text else ())


@given(st.lists(st.sampled_from("(["), max_size=20), st.floats(0.1, 3))
def test_factors_of_nested_groups_multiply(brackets: list[str], weight: float) -> None:
    closed = "".join({"(": ")", "[": "]"}[bracket] for bracket in reversed(brackets))
    (piece,) = parse("".join(brackets) + f"(a:{weight:.6f})" + closed)
    expected = weight * UP ** (brackets.count("(") - brackets.count("["))
    assert isinstance(piece, Piece) and piece.text == "a"
    assert piece.weight == pytest.approx(min(expected, MAX_WEIGHT), rel=1e-5)


HOSTILE = [
    "(" * 100_000,
    ")" * 100_000,
    "([" * 25_000 + ")" * 50_000,
    "(" * 50_000 + "a" + ")" * 50_000,
    "(" * 30_000 + "a" + ":20)" * 30_000,
    "(a " * 33_000,
    "+-" * 50_000,
    "a+-" * 33_000,
    ")" + "+" * 100_000 + "a",
    "a" + "+" * 100_000 + "a",
    ": " * 50_000,
    ":" + " " * 100_000,
    ":1" + " " * 100_000,
    ":" + "1" * 100_000,
    ")" + "1" * 100_000 + "a",
    "\\" * 100_001,
    "BREAK" * 20_000,
    " BREAK" * 17_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{text[:6]!r}" for text in HOSTILE])
def test_hostile_texts_take_no_longer_than_others(text: str) -> None:
    start = time.process_time()
    parse(text)
    assert time.process_time() - start < 20  # half a second on a slow core; squares would take minutes
