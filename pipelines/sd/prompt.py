r"""The grammar of weighted prompts, as users of Stable Diffusion's web UIs and of compel write it.

    (words)  [words]       times 1.1, and divided by 1.1
    (words:1.4)            times 1.4
    (words)1.4             the same in compel's spelling
    word++  (words)--      times 1.1 and 0.9, once for each sign
    \(  \)  \[  \]  \\  \+  \-   the character itself
    BREAK                  what follows is encoded apart from what came before

Groups nest, and their factors multiply. Whatever is not of this form is text: brackets without a
partner, signs on their own, numbers that are none. Not known here, hence text as well: prompt editing
([from:to:when]), alternation ([a|b]), compel's quotes, blends and conjunctions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

MAX_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text that weighs the same throughout: from 0 to MAX_WEIGHT, 1 being plain.

    What is asked for beyond that, such as less than nothing, becomes the nearer end.
    """

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Break:
    """BREAK."""


def parse(text: str) -> tuple[Piece | Break, ...]:
    """A prompt's pieces in order. Every text has a reading, found in time linear in its length.

    Neighbours differ in weight, so text without grammar is one piece: itself. No piece is empty.
    """
    lexemes = [*_LEXEME.finditer(text)]
    return tuple(_joined(_weighed(lexemes, _groups(lexemes))))


_UP, _DOWN = 1.1, 0.9
_MOST_SIGNS = 100
_HUGE = 1e9  # where products stop, so that deep nesting makes no infinity

_END = r'\s()\[\],.;:!?"'  # what ends a word
_NUMBER = r"(?:[0-9]{1,20}+(?:\.[0-9]{1,20}+)?+|\.[0-9]{1,20}+)"

# Possessive (++, ?+), so that nothing is read again when what follows does not fit.
_LEXEME = re.compile(
    rf"""
      (?P<BREAK> BREAK\b )
    | (?P<word> (?: [^{_END}\\+-] | \\[()\[\]\\+-] | [+-]++(?=[^{_END}]) )++ )
      (?: (?P<signs> \++|-+ ) (?=[{_END}\\]|\Z) )?
    | (?P<opening> [(\[] )
    | (?P<round> :\s*+ (?P<inside> [+-]?{_NUMBER} ) \s*+\)
               | \) (?: (?P<after> {_NUMBER}|\++|-+ ) (?=[{_END}\\]|\Z) )? )
    | (?P<square> \] )
    | \s++ | [+-]++ | .
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\([()\[\]\\+-])")

_Lexeme = re.Match[str]


def _groups(lexemes: Sequence[_Lexeme]) -> Mapping[int, float]:
    """The brackets that have a partner, by their places: an opening one's factor, 0 for a closing one.

    A closing bracket finds the last opening one of its kind; those of the other kind in between are text.
    """
    groups: dict[int, float] = {}
    waiting: list[int] = []
    kinds = {"(": 0, "[": 0}
    for place, lexeme in enumerate(lexemes):
        if lexeme["opening"]:
            waiting.append(place)
            kinds[lexeme[0]] += 1
        elif (partner := _partner(lexeme)) and kinds[partner]:
            while lexemes[begin := waiting.pop()][0] != partner:
                kinds[lexemes[begin][0]] -= 1
            kinds[partner] -= 1
            groups |= {begin: _factor(lexeme), place: 0}
    return groups


def _partner(lexeme: _Lexeme) -> str | None:
    """The bracket that this one closes."""
    return "(" if lexeme["round"] else "[" if lexeme["square"] else None


def _factor(closing: _Lexeme) -> float:
    if closing["square"]:
        return 1 / _UP
    given = closing["inside"] or closing["after"] or "+"
    return _power(given) if given.strip("+-") == "" else max(0.0, float(given))


def _power(signs: str) -> float:
    base: float = _UP if signs.startswith("+") else _DOWN
    return base ** min(len(signs), _MOST_SIGNS)


def _weighed(lexemes: Sequence[_Lexeme], groups: Mapping[int, float]) -> Iterator[Piece | Break]:
    weights = [1.0]  # of the groups that are open
    for place, lexeme in enumerate(lexemes):
        if place in groups and lexeme["opening"]:
            weights.append(min(weights[-1] * groups[place], _HUGE))
        elif place in groups:
            weights.pop()
        elif lexeme["BREAK"]:
            yield Break()
        elif lexeme["word"]:
            factor = _power(lexeme["signs"]) if lexeme["signs"] else 1.0
            yield Piece(_ESCAPE.sub(r"\1", lexeme["word"]), min(weights[-1] * factor, MAX_WEIGHT))
        else:
            yield Piece(lexeme[0], min(weights[-1], MAX_WEIGHT))


def _joined(pieces: Iterable[Piece | Break]) -> Iterator[Piece | Break]:
    """Neighbours of one weight made one."""
    for key, same in groupby(pieces, key=lambda piece: piece.weight if isinstance(piece, Piece) else None):
        if key is None:
            yield from same
        else:
            yield Piece("".join(piece.text for piece in same if isinstance(piece, Piece)), key)
