"""Processes that decode the pictures in requests, so that no stranger's file is decoded in the worker's own.

A file that ends its process, or takes too much of it, is refused like any other that is no picture; the
process is replaced. They end with the one that has started them, however that ends.
"""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.Image import Image as Picture

from deployments.pictures import child
from schemas.errors import AssetError

logger = logging.getLogger(__name__)

TIME_S = 20.0  # for a picture, the start of a process included; its CPU time is bounded more narrowly
MAX_HEAD_BYTES = 2**16

_ROOT = Path(__file__).parents[2]
_KINDS = ("unsupported_image_format", "image_too_large", "image_load_error")


class Decoders:
    """Up to `most` processes, each with one picture at a time. The first is started at once and kept."""

    def __init__(self, most: int, time_s: float = TIME_S) -> None:
        self._time_s = time_s
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="picture")
        self._lock = threading.Lock()
        self._is_closed = False
        self._all: set[_Child] = set()
        self._idle = deque([self._start()])

    async def decode(self, data: bytes) -> Picture:
        """PNG, JPEG or WebP, of several frames the first → an upright RGB picture.

        The size is looked at before a pixel is decoded. Raises AssetError with fal's types, also where
        decoding ends the process or takes longer than there is time for it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, data)

    def close(self) -> None:
        """End the processes; what they decode is refused."""
        with self._lock:
            self._is_closed = True
            for each in self._all:
                each.kill()
        self._threads.shutdown(cancel_futures=True)
        for each in self._all:
            each.end()

    def pids(self) -> set[int]:
        with self._lock:
            return {each.pid for each in self._all}

    def _decode(self, data: bytes) -> Picture:
        decoder = self._take()
        try:
            picture = decoder.decode(data, time.monotonic() + self._time_s)
        except AssetError:
            self._idle.append(decoder)
            raise
        except (OSError, ValueError) as error:
            status = self._give_up(decoder)
            logger.warning("a picture has ended the process that decoded it (%s): %r", status, error)
            message = "The picture is broken, or decoding it takes more time or memory than there is for it."
            raise AssetError(message, "image_load_error") from error
        self._idle.append(decoder)
        return picture

    def _take(self) -> "_Child":
        """One that is alive and has nothing to do."""
        while self._idle:
            decoder = self._idle.pop()
            if decoder.is_alive:
                return decoder
            self._give_up(decoder)
        return self._start()

    def _start(self) -> "_Child":
        with self._lock:
            if self._is_closed:
                raise AssetError("The server is stopping.", "image_load_error")
            started = _Child()
            self._all.add(started)
            return started

    def _give_up(self, decoder: "_Child") -> int:
        with self._lock:
            self._all.discard(decoder)
        return decoder.end()


class _Child:
    """A process that runs `deployments.pictures.child`, with a socket to it. One thread at a time uses it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-B", "-W", "ignore", "-m", child.__name__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def decode(self, data: bytes, deadline: float) -> Picture:
        """Raises AssetError for a picture that is refused, OSError or ValueError where the process fails."""
        self._send(len(data).to_bytes(8), deadline)
        self._send(data, deadline)
        head = self._head(deadline)
        if "size" not in head:
            raise _refusal(head)
        size = _checked(head["size"])
        pixels = self._receive(3 * size[0] * size[1], deadline)
        return Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Returns the exit code, negative for a signal."""
        self._process.kill()
        self._socket.close()
        return self._process.wait()

    def _head(self, deadline: float) -> dict[str, Any]:
        length = int.from_bytes(self._receive(8, deadline))
        if length > MAX_HEAD_BYTES:
            raise ValueError(f"an answer's head of {length} bytes")
        head = json.loads(self._receive(length, deadline))
        if not isinstance(head, dict):
            raise ValueError("an answer's head that is no object")
        return head

    def _send(self, data: bytes, deadline: float) -> None:
        self._wait_until(deadline)
        self._socket.sendall(data)  # within the timeout in all

    def _receive(self, count: int, deadline: float) -> bytearray:
        data = bytearray(count)
        rest = memoryview(data)
        while rest:
            self._wait_until(deadline)
            received = self._socket.recv_into(rest)
            if not received:
                raise ConnectionError("the process has ended")
            rest = rest[received:]
        return data

    def _wait_until(self, deadline: float) -> None:
        self._socket.settimeout(max(1e-3, deadline - time.monotonic()))


def _environment() -> dict[str, str]:
    """What the interpreter needs to start as here, and no secret. Freed memory goes back at once."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    path = os.pathsep.join(dict.fromkeys([str(_ROOT), *filter(None, sys.path)]))
    return kept | {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "4194304"}


def _refusal(head: dict[str, Any]) -> AssetError:
    kind, ctx = head.get("kind"), head.get("ctx")
    return AssetError(
        str(head.get("message"))[:500],
        kind if kind in _KINDS else "image_load_error",
        ctx if isinstance(ctx, dict) else None,
    )


def _checked(size: Any) -> tuple[int, int]:
    """What a process says that strangers' files have passed through is looked at once more."""
    match size:
        case [int(width), int(height)] if width > 0 and height > 0 and width * height <= child.MAX_PIXELS:
            return width, height
    raise ValueError(f"a picture of {size!r}")
