"""The keys that sign webhooks. Receivers find the public halves in a JWKS, and may keep it for a day.

A folder holds one PEM file a key, named by the second from which it signs: `0.pem` is the first. A key
that is to follow is therefore published before it signs, and the one before it for as long afterwards.
A key that has leaked is gone when its file is. No other place holds them, and nothing here is logged.
"""

import os
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from deployments import crash
from schemas.settings import local_path

DRAWING_S = 60.0  # a process that draws a key for so long is dead
FIRST = 0  # when the first key begins to sign: nobody knows an older one


@dataclass(frozen=True, slots=True)
class _Key:
    signs_from: int  # unix seconds
    private: Ed25519PrivateKey = field(repr=False)

    def jwk(self) -> dict[str, str]:
        """As RFC 8037 has it, but for the padding of `x`: the verifier in fal's documentation needs it."""
        public = self.private.public_key().public_bytes_raw()
        x = urlsafe_b64encode(public).decode()
        return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": sha256(public).hexdigest()[:16]}


class Keyring:
    """The keys in a folder that several processes share. Each use looks at the folder again.

    `overlap_s` is how long a key is published before its first and after its last signature.
    """

    def __init__(self, folder: Path, overlap_s: float, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._overlap_s = overlap_s
        self._clock = clock

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature by the key whose time it is."""
        return self._signing(self._keys()).private.sign(message)

    def jwks(self) -> dict[str, Any]:
        """The public keys of all signatures that receivers may meet, the one that signs now first."""
        keys = self._keys()
        signing = self._signing(keys)
        listed = sorted(self._listed(keys), key=lambda key: key is not signing)
        return {"keys": [key.jwk() for key in listed]}

    def rotate(self) -> int:
        """Draw a key that signs from the end of the overlap on; returns that unix second.

        Removes the keys that are not published any more. Raises ValueError while a key waits already.
        """
        now = self._clock()
        keys = self._keys()
        if keys[-1].signs_from > now:
            raise ValueError(f"a new key is published already; it signs from {keys[-1].signs_from} on")
        signs_from = int(now + self._overlap_s) + 1
        self._clear(now)
        self._draw(signs_from)
        crash.point("keyring.drawn")
        keys = self._keys()
        listed = self._listed(keys)
        for key in keys:
            if key not in listed:
                self._path(key.signs_from).unlink(missing_ok=True)
                crash.point("keyring.removed")
        return signs_from

    def _signing(self, keys: list[_Key]) -> _Key:
        """The youngest of those whose time has come."""
        now = self._clock()
        return next((key for key in reversed(keys) if key.signs_from <= now), keys[0])

    def _listed(self, keys: list[_Key]) -> list[_Key]:
        """All but those whose successor has signed for the overlap."""
        now = self._clock()
        successors = [*keys[1:], None]
        return [
            key
            for key, successor in zip(keys, successors, strict=True)
            if successor is None or successor.signs_from + self._overlap_s > now
        ]

    def _keys(self) -> list[_Key]:
        """The keys in the folder, the oldest first; at least one."""
        if not (paths := self._paths()):
            self._draw(FIRST)
            paths = self._paths()
        return sorted(map(_load, paths), key=lambda key: key.signs_from)

    def _paths(self) -> list[Path]:
        return [path for path in self._folder.glob("*.pem") if path.stem.isdecimal()]

    def _draw(self, signs_from: int) -> None:
        """Put a new key into the folder, whole at once, unless another process was first."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        drawn = self._folder / f"{secrets.token_hex(8)}.new"
        with open(os.open(drawn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        crash.point("keyring.written")
        try:
            os.link(drawn, self._path(signs_from))  # never over another's
            crash.point("keyring.linked")
        except FileExistsError:
            pass
        finally:
            drawn.unlink()

    def _clear(self, now: float) -> None:
        """Remove the copies of keys that were left by processes that died while they drew them."""
        for drawn in self._folder.glob("*.new"):
            if drawn.stat().st_mtime < now - DRAWING_S:
                drawn.unlink(missing_ok=True)

    def _path(self, signs_from: int) -> Path:
        return self._folder / f"{signs_from}.pem"


def _load(path: Path) -> _Key:
    private = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(private, Ed25519PrivateKey):
        raise ValueError(f"{path} holds no Ed25519 key")
    return _Key(int(path.stem), private)


def open_keyring(url: str, overlap_s: float) -> Keyring:
    """The keyring at `file://FOLDER`. Touches no disk before its first use."""
    folder = local_path(url, "file")
    if folder is None:
        raise ValueError(f"webhooks.keys must begin with file://, got {url!r}")
    return Keyring(folder, overlap_s)
