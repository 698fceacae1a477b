"""A receiver of webhooks, and the verification that fal's documentation tells receivers to do."""

import base64
import hashlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PATIENCE_S = 60.0  # a test that waits longer has failed
TOLERANCE_S = 300  # what receivers allow between the timestamp and their clock


@dataclass(frozen=True)
class Post:
    """One call of a receiver. Header names are lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    came_at: float = field(default_factory=time.time)  # unix seconds


@dataclass
class Receiver:
    """Notes what it gets and answers as it is told: for each path a list of statuses, the last one stays.

    A path in `gates` is answered once its gate is open, one in `locations` with a redirect there, and
    one in `cut` by closing the connection. What it says is in `answers`.
    """

    url: str = ""
    posts: "queue.Queue[Post]" = field(default_factory=queue.Queue)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    answers: dict[str, bytes] = field(default_factory=dict)

    def next(self) -> Post:
        """The next call, waited for."""
        return self.posts.get(timeout=PATIENCE_S)

    def all(self) -> list[Post]:
        """The calls that have come and were not taken yet."""
        found = []
        while not self.posts.empty():
            found.append(self.posts.get_nowait())
        return found

    def answer(self, path: str) -> int:
        statuses = self.statuses.get(path, [200])
        return statuses.pop(0) if len(statuses) > 1 else statuses[0]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a port of this machine, until the end of the block."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = self.rfile.read(length)
            if len(body) < length:
                return  # whoever sent it has died
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.posts.put(Post(self.path, headers, body))
            if gate := receiver.gates.get(self.path):
                gate.wait(PATIENCE_S)
            if self.path in receiver.cut:
                return
            try:
                self.send_response(receiver.answer(self.path))
                if location := receiver.locations.get(self.path):
                    self.send_header("location", location)
                self.end_headers()
                self.wfile.write(receiver.answers.get(self.path, b"a receiver's own words"))
            except ConnectionError:
                pass  # the sender has given up

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        serve = partial(server.serve_forever, poll_interval=0.05)
        threading.Thread(target=serve, daemon=True).start()
        yield receiver
        for gate in receiver.gates.values():
            gate.set()
        server.shutdown()


def keys_at(url: str) -> list[dict[str, str]]:
    """The keys of the server at `url`, fetched without any credentials."""
    answer = httpx.get(f"{url}/rest/.well-known/jwks.json", timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    keys: list[dict[str, str]] = answer.json()["keys"]
    return keys


def is_genuine(post: Post, keys: list[dict[str, str]], now: float) -> bool:
    """The steps in https://docs.fal.ai/model-apis/model-endpoints/webhooks, "Verifying Your Webhook"."""
    try:
        request_id, user_id, timestamp, signature_hex = (
            post.headers[f"x-fal-webhook-{name}"]
            for name in ("request-id", "user-id", "timestamp", "signature")
        )
        if abs(now - int(timestamp)) > TOLERANCE_S:
            return False
        digest = hashlib.sha256(post.body).hexdigest()
        message = "\n".join([request_id, user_id, timestamp, digest]).encode("utf-8")
        signature = bytes.fromhex(signature_hex)
    except (KeyError, ValueError):
        return False
    return any(_is_signed(key, message, signature) for key in keys)


def _is_signed(key: Mapping[str, str], message: bytes, signature: bytes) -> bool:
    public = base64.urlsafe_b64decode(key["x"])  # as in the documentation: adds no padding
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True
