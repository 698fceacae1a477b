"""A command run in the foreground as if it had been run by itself: its signals, its exit code."""

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress

FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)  # which a terminal sends to the command as well


async def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run it to its end. Returns what a shell would tell of it. Raises OSError where it cannot be run."""
    child = await asyncio.create_subprocess_exec(*command, env=environment)
    loop = asyncio.get_running_loop()
    is_told = _is_in_foreground()
    for number in FORWARDED:
        reaches_it = is_told and number in FROM_KEYBOARD
        loop.add_signal_handler(number, _pass_on, child, None if reaches_it else number)
    code = await child.wait()
    return code if code >= 0 else 128 - code


async def until_told() -> None:
    """Wait for Ctrl-C or its like."""
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()


def _pass_on(child: Process, number: int | None) -> None:
    if number is not None:
        with suppress(ProcessLookupError):
            child.send_signal(number)


def _is_in_foreground() -> bool:
    """Whether keys such as Ctrl-C come to this process, and so to its child."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
