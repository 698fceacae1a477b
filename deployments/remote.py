"""A darkroom server as its command line sees it: fal's queue protocol over HTTP."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

SUBMIT_TIMEOUT_S = 120.0


class Refused(Exception):
    """The server answered with an error; the message is its own."""


class Remote:
    """One server, one key."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Key {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SUBMIT_TIMEOUT_S)

    def close(self) -> None:
        self._http.close()

    def endpoints(self) -> list[str]:
        found: list[str] = self._json("GET", "/")["endpoints"]
        return found

    def submit(self, endpoint_id: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The receipt; its URLs lead to everything else."""
        answer = self._http.post(f"/queue/{endpoint_id}", json=dict(fields))
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise Refused(
                f"the server has no endpoint {endpoint_id}; `darkroom models` lists those that it has"
            )
        return _document(answer)

    def follow(self, status_url: str) -> Iterator[dict[str, Any]]:
        """Status documents with the new log lines of each, until the request is completed."""
        with self._http.stream("GET", f"{status_url}/stream?logs=1", timeout=None) as answer:
            if answer.is_error:
                answer.read()
            _check(answer)
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def result(self, response_url: str) -> dict[str, Any]:
        return self._json("GET", response_url)

    def status(self, request_id: str) -> dict[str, Any]:
        return self._json("GET", f"{self._request(request_id)}/status?logs=1")

    def cancel(self, request_id: str) -> dict[str, Any]:
        return self._json("PUT", f"{self._request(request_id)}/cancel")

    def download(self, url: str) -> bytes:
        answer = self._http.get(url)
        _check(answer)
        return answer.content

    def _request(self, request_id: str) -> str:
        """The URL of a request whose application we do not know: the one that knows it."""
        apps = {"/".join(endpoint_id.split("/")[:2]) for endpoint_id in self.endpoints()}
        urls = [f"/queue/{app}/requests/{request_id}" for app in sorted(apps)]
        found = [url for url in urls if self._http.get(f"{url}/status").status_code != 404]
        if not found:
            raise Refused(f"no request {request_id}")
        return found[0]

    def _json(self, method: str, url: str, **options: Any) -> dict[str, Any]:
        return _document(self._http.request(method, url, **options))


def _document(answer: httpx.Response) -> dict[str, Any]:
    _check(answer)
    document: dict[str, Any] = answer.json()
    return document


def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        reason = answer.json().get("message", answer.text)
    except ValueError:
        reason = answer.text
    raise Refused(f"{answer.status_code}: {reason}")
