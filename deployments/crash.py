"""Named points at which a test may end the process, where it would hurt most.

    crash.point("submit.inserted")

does nothing, unless this process is under test: then `DARKROOM_CRASH` names the point, and its n-th pass as
`submit.inserted#3`, where the process exits at once, as if it were killed; or a test listens to all passes.
"""

import os
from collections import Counter
from collections.abc import Callable

VARIABLE = "DARKROOM_CRASH"
EXIT_CODE = 137  # as a shell tells of SIGKILL

_listener: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Pass a point. Each name stands in one place of the code only."""
    if _listener is not None:
        _listener(name)


def listen(listener: Callable[[str], None] | None) -> None:
    """Have every pass of this process told, on the thread that passes; None: no more."""
    global _listener
    _listener = listener


def exit_at(name: str) -> None:
    """End this process at a point: at its first pass, or at the n-th of `NAME#n`."""
    wanted, _, nth = name.partition("#")
    passes: Counter[str] = Counter()

    def count(passed: str) -> None:
        passes[passed] += 1
        if passed == wanted and passes[passed] == int(nth or 1):
            os._exit(EXIT_CODE)

    listen(count)


if VARIABLE in os.environ:
    exit_at(os.environ[VARIABLE])
