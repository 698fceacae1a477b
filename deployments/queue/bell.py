"""What a process waits for: that something may have changed."""

import asyncio


class Bell:
    """Remembers a ring until somebody has waited for it. How rings come from outside is its children's."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def wake(self) -> None:
        """Ring in this process only, from its own loop."""
        self._rung.set()

    async def wait(self, timeout_s: float) -> None:
        """Return at a ring since the last call, or after `timeout_s`."""
        try:
            await asyncio.wait_for(self._rung.wait(), timeout_s)
        except TimeoutError:
            pass
        self._rung.clear()
