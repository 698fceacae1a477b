"""A request as a plain HTTP client follows it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx


def submit(
    http: httpx.Client, fields: Mapping[str, Any], endpoint: str = "fal-ai/flux/dev"
) -> dict[str, Any]:
    answer = http.post(f"/queue/{endpoint}", json=dict(fields))
    assert answer.status_code == 200, answer.text
    receipt: dict[str, Any] = answer.json()
    return receipt


def follow(http: httpx.Client, receipt: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The status stream's documents."""
    with http.stream("GET", f"{receipt['status_url']}/stream?logs=1") as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))
