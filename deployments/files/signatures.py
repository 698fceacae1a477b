"""Words that only this server can have written, so that it need not remember them.

Whoever shows one has what it says. It is JSON in base64url, a dot, and an HMAC over both the JSON and
the kind of the word, so that none passes for one of another kind.
"""

import hashlib
import hmac
import os
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from deployments import crash

WordT = TypeVar("WordT", bound=BaseModel)

SECRET_BYTES = 32
MAX_CHARACTERS = 2000


class Signer:
    """Writes and reads words under one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def write(self, word: BaseModel) -> str:
        payload = _encoded(word.model_dump_json(exclude_none=True).encode())
        return f"{payload}.{self._mac(type(word), payload)}"

    def read(self, kind: type[WordT], text: str) -> WordT:
        """Raises ValueError for what this server has not written as a word of this kind."""
        payload, _, mac = text.partition(".")
        is_plausible = len(text) <= MAX_CHARACTERS and text.isascii()
        if not is_plausible or not hmac.compare_digest(mac, self._mac(kind, payload)):
            raise ValueError("not signed by this server")
        return kind.model_validate_json(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))

    def _mac(self, kind: type[BaseModel], payload: str) -> str:
        message = f"{kind.__name__}.{payload}".encode()
        return _encoded(hmac.digest(self._secret, message, hashlib.sha256))


def load_secret(path: Path) -> bytes:
    """The secret in a file, for the owner's eyes only. Whoever comes first draws it."""
    if not path.exists():
        drawn = path.with_name(f"{path.name}#{secrets.token_hex(8)}")  # left by the dead, it is swept
        with open(os.open(drawn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())  # an empty one would be everybody's
        crash.point("secret.written")
        try:
            os.link(drawn, path)  # whole at once, and never over another's
            crash.point("secret.linked")
        except FileExistsError:
            pass
        finally:
            drawn.unlink()
    return path.read_bytes()


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
