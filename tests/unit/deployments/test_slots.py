"""Who enters next where there is room for so many."""

import asyncio

import pytest

from deployments.worker.slots import Slots
from schemas.jobs import Priority


async def settle() -> None:
    """Let all tasks run as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Hall:
    """Slots, and who is in them."""

    def __init__(self, count: int) -> None:
        self.slots = Slots(count)
        self.entered: list[str] = []
        self.open = {name: asyncio.Event() for name in "abcde"}

    def come(self, name: str, priority: Priority = Priority.NORMAL) -> asyncio.Task[None]:
        async def stay() -> None:
            async with self.slots.held(priority):
                self.entered.append(name)
                await self.open[name].wait()

        return asyncio.create_task(stay())


async def test_who_waits_enters_by_priority_and_then_in_the_order_of_coming() -> None:
    hall = Hall(1)
    tasks = [hall.come("a", Priority.LOW), hall.come("b", Priority.LOW), hall.come("c"), hall.come("d")]
    await settle()
    assert hall.entered == ["a"] and hall.slots.locked()
    for event in hall.open.values():
        event.set()
    await asyncio.gather(*tasks)
    assert hall.entered == ["a", "c", "d", "b"]
    assert not hall.slots.locked()


@pytest.mark.parametrize("is_let_in", [False, True], ids=["while it waits", "as it is let in"])
async def test_who_gives_up_takes_no_slot_with_it(is_let_in: bool) -> None:
    hall = Hall(1)
    first, second, third = hall.come("a"), hall.come("b"), hall.come("c")
    await settle()
    if is_let_in:
        hall.open["a"].set()
        while not first.done():
            await asyncio.sleep(0)  # its slot is the second's, who has not run since
    second.cancel()
    hall.open["a"].set()
    await settle()
    assert hall.entered in (["a", "c"], ["a", "b", "c"])
    hall.open["c"].set()
    await third
    assert not hall.slots.locked()
