"""What a process waits for: that something may have changed."""

import asyncio
from contextlib import suppress


class Bell:
    """Remembers a ring until somebody has waited for it. How rings come from outside is its children's."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def wake(self) -> None:
        """Ring in this process only, from its own loop."""
        self._rung.set()

    async def wait(self, timeout_s: float) -> None:
        """Return at a ring since the last call, or after `timeout_s`."""
        with suppress(TimeoutError):
            # not wait_for: Python 3.11's forgets a cancel that comes with the ring
            async with asyncio.timeout(timeout_s):
                await self._rung.wait()
        self._rung.clear()
