"""Byte fuzz from a corpus: the seeds themselves, and what a few edits make of them.

`make fuzz` looks much longer, and each time elsewhere. What it finds belongs into the corpus.
"""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "corpus"
EXAMPLES = os.environ.get("DARKROOM_FUZZ")

fuzzed = settings(
    max_examples=int(EXAMPLES or 200),
    suppress_health_check=list(HealthCheck),
)


def seeds(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutants(target: str) -> st.SearchStrategy[bytes]:
    """A seed, or one of which a few spans are other bytes or those of another seed."""
    known = seeds(target)
    pieces = st.binary(max_size=8) | st.sampled_from(known).flatmap(
        lambda seed: st.slices(len(seed)).map(lambda span: seed[span])
    )
    edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), pieces), max_size=4)
    return st.builds(_edited, st.sampled_from(known), edits)


def _edited(seed: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, length, piece in edits:
        at = int(where * len(seed))
        seed = seed[:at] + piece + seed[at + length :]
    return seed
