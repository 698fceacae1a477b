"""Clients that call a server all the time, as fal's do, and write down what they were answered."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from tests.support.jobs import ENDPOINT

POLL_S = 0.1  # as fal's Python client
LIMIT_S = 600.0
RIGHT = (200, 202)


@dataclass
class Callers:
    """What so many clients saw. Each submits under a key, looks until it is done, and fetches the result.

    An answer that is not the right one is written down, and the call repeated at the next address.
    """

    urls: Sequence[str]
    document: Mapping[str, Any]
    faults: list[str] = field(default_factory=list)  # what came in place of an answer
    wrong: list[str] = field(default_factory=list)  # results that are none
    answers: list[float] = field(default_factory=list)  # when there was one, by the monotonic clock
    done: list[str] = field(default_factory=list)  # request ids
    waits: list[float] = field(default_factory=list)  # seconds of each
    _stopped: threading.Event = field(default_factory=threading.Event)

    def call(self) -> None:
        """Requests one after another until stopped; the last one is ended too."""
        with httpx.Client(timeout=60) as http:
            while not self._stopped.is_set():
                began = time.monotonic()
                receipt = self._ask(http, "POST", f"/queue/{ENDPOINT}", self.document, uuid4().hex)
                path = f"/queue/{ENDPOINT}/requests/{receipt['request_id']}"
                while self._ask(http, "GET", f"{path}/status")["status"] != "COMPLETED":
                    time.sleep(POLL_S)
                output = self._ask(http, "GET", path)
                if output.get("seed") != self.document["seed"]:
                    self.wrong.append(f"{receipt['request_id']}: {output}")
                self.done.append(receipt["request_id"])
                self.waits.append(time.monotonic() - began)

    def await_more(self, count: int) -> None:
        """Until so many more requests are done."""
        enough, deadline = len(self.done) + count, time.monotonic() + LIMIT_S
        while len(self.done) < enough:
            assert time.monotonic() < deadline, f"no more is done: {self.faults[-3:]}"
            time.sleep(POLL_S)

    def stop(self) -> None:
        self._stopped.set()

    @property
    def longest_gap_s(self) -> float:
        """Between two answers, whoever got them."""
        times = sorted(self.answers)
        return max((after - before for before, after in zip(times, times[1:], strict=False)), default=0.0)

    def _ask(
        self, http: httpx.Client, method: str, path: str, document: Any = None, key: str = ""
    ) -> dict[str, Any]:
        """Ask until there is an answer."""
        deadline = time.monotonic() + LIMIT_S
        attempt = 0
        while time.monotonic() < deadline:
            url = self.urls[attempt % len(self.urls)] + path
            headers = {"Idempotency-Key": key} if key else {}
            try:
                answer = http.request(method, url, json=document, headers=headers)
            except httpx.TransportError as error:
                fault = f"{method} {path}: {error!r}"
            else:
                if answer.status_code in RIGHT:
                    self.answers.append(time.monotonic())
                    return answer.json()  # type: ignore[no-any-return]
                fault = f"{method} {path}: {answer.status_code} {answer.text[:200]}"
            self.faults.append(fault)
            attempt += 1
            time.sleep(POLL_S)
        raise AssertionError(f"no answer: {self.faults[-3:]}")


@contextmanager
def calling(urls: Sequence[str], document: Mapping[str, Any], clients: int = 2) -> Iterator[Callers]:
    """Callers at work; at the end all that they had accepted has ended."""
    callers = Callers(urls, document)
    threads = [threading.Thread(target=callers.call, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield callers
    finally:
        callers.stop()
        for thread in threads:
            thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "a request did not end"
