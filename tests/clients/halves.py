"""The two halves of fal's Python client, the synchronous and the asynchronous, told as one."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

Connect = Callable[[str], Any]  # a key → a client

# The synchronous client opens a connection for each upload and never closes it.
UPLOADING = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


async def settled(value: Any) -> Any:
    """What the call of either half came to."""
    return await value if inspect.isawaitable(value) else value


async def collected(values: Any) -> list[Any]:
    """What the iterator of either half yields."""
    return [each async for each in values] if hasattr(values, "__aiter__") else list(values)
