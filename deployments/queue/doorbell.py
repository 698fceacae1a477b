"""Tells the other processes on this machine that something was committed.

SQLite has no LISTEN/NOTIFY, so each process binds a datagram socket in a folder that the database's
path names, and whoever commits sends a byte to every socket there. A lost ring costs a moment, never
a request: whoever waits also looks by itself now and then.
"""

import asyncio
import hashlib
import os
import socket
import stat
import tempfile
from pathlib import Path
from uuid import uuid4

from deployments.queue.bell import Bell


class Doorbell(Bell):
    """One process's bell for one database. Belongs to the event loop that it was made on."""

    def __init__(self, database: Path) -> None:
        digest = hashlib.sha256(str(database.resolve()).encode()).hexdigest()[:16]
        # in the temporary folder: a socket's path must be shorter than about 107 characters
        self._folder = Path(tempfile.gettempdir()) / f"darkroom-{os.getuid()}-{digest}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        status = self._folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(f"{self._folder} must be a folder of this user's alone; remove it")
        self._path = self._folder / f"{uuid4().hex[:12]}.bell"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(self._path))
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._hear)

    def _hear(self) -> None:
        try:
            while self._socket.recv(16):
                pass
        except BlockingIOError:
            pass
        self._rung.set()

    def ring(self) -> None:
        """Ring at every other process. Safe on any thread."""
        for path in self._folder.glob("*.bell"):
            if path == self._path:
                continue
            try:
                self._socket.sendto(b"!", str(path))
            except BlockingIOError:
                pass  # it has rings enough to hear
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)  # its process is gone

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)
