"""What runs in the processes that decode, run in this one: those may write no file, not even of what ran."""

import json
import os
import resource
import runpy
import socket
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from deployments.pictures import child
from deployments.pictures.decoders import Decoders, _checked, _Child, _refusal
from schemas.errors import AssetError
from tests.support.hostile_pictures import encoded, scene, sized, turned


def answered(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The head of the answer, and the pixels."""
    answers = BytesIO()
    child._answer(data, answers)
    return taken_apart(BytesIO(answers.getvalue()))


def taken_apart(answers: Any) -> tuple[dict[str, Any], bytes]:
    head = json.loads(answers.read(int.from_bytes(answers.read(8))))
    width, height = head.get("size", (0, 0))
    return head, answers.read(3 * width * height)


@pytest.mark.parametrize("way", range(10))
def test_t15_a_picture_is_answered_with_its_size_and_its_pixels(way: int) -> None:
    head, pixels = answered(turned(way))
    assert len(pixels) == 3 * head["size"][0] * head["size"][1] > 0


def test_t15_each_refusal_says_what_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"unsupported_image_format": b"text", "image_too_large": sized(2**13, 2**13 + 1)}
    kinds["image_load_error"] = encoded(scene(), "PNG")[:-40]
    for kind, data in kinds.items():
        head, pixels = answered(data)
        assert head["kind"] == kind and not pixels
        assert bool(head["ctx"]) == (kind != "image_load_error")

    def takes_too_much(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", takes_too_much)
    assert "more memory" in answered(encoded(scene(), "PNG"))[0]["message"]


def test_t15_a_picture_without_pixels_is_none() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        child._check_size(Image.new("RGB", (0, 5)))


@pytest.fixture
def stdin() -> Iterator[socket.socket]:
    """The other end of a socket that is this process's standard input for a while."""
    ours, theirs = socket.socketpair()
    before = os.dup(0)
    with ours, theirs:
        os.dup2(theirs.fileno(), 0)
        theirs.close()
        try:
            yield ours
        finally:
            os.dup2(before, 0)
            os.close(before)


def test_t15_a_process_confines_itself_answers_and_ends_with_its_server(
    stdin: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, tuple[int, int]]] = []
    ended = threading.Event()
    monkeypatch.setattr(resource, "setrlimit", lambda *given: limits.append(given))
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    before = threading.stack_size()
    main = threading.Thread(
        target=runpy.run_path, args=(child.__file__,), kwargs={"run_name": "__main__"}, daemon=True
    )
    main.start()
    try:
        data = encoded(scene(), "PNG")
        with stdin.makefile("rwb") as jobs:
            for _ in range(2):
                jobs.write(len(data).to_bytes(8) + data)
                jobs.flush()
                head, pixels = taken_apart(jobs)
                assert head == {"size": [*scene().size]} and pixels == scene().tobytes()
        stdin.close()
        main.join(60)
        assert not main.is_alive() and ended.wait(60)
    finally:
        threading.stack_size(before)
    kinds = [kind for kind, _ in limits]
    assert kinds[0] == resource.RLIMIT_AS, "confined before the first picture"
    assert kinds.count(resource.RLIMIT_CPU) == 2, "time for each picture"


# -- what the other end makes of answers that no such process gives


def test_t15_a_process_that_answers_anything_else_is_given_up() -> None:
    for head in ({"size": [0, 5]}, {"size": [2**14, 2**13]}, {"size": ["5", 5]}, {"size": 5}):
        with pytest.raises(ValueError, match="a picture of"):
            _checked(head["size"])
    assert _refusal({"message": 5, "kind": "code", "ctx": "text"}).kind == "image_load_error"
    assert _refusal({"message": "no", "kind": "image_too_large", "ctx": {"a": 1}}).ctx == {"a": 1}


@pytest.mark.parametrize("head", [(2**20).to_bytes(8), (2).to_bytes(8) + b"[]", b""])
def test_t15_an_answer_that_is_none_is_told_from_one(head: bytes) -> None:
    asked = _Child()
    ours, theirs = socket.socketpair()
    asked._socket.close()
    asked._socket = ours
    try:
        with theirs:
            theirs.sendall(head)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises((ValueError, ConnectionError)):
                asked.decode(b"data", time.monotonic() + 60)
    finally:
        asked.end()


def test_t15_nothing_is_decoded_after_the_end() -> None:
    decoders = Decoders(1)
    [only] = decoders._all
    decoders._idle.clear()
    decoders.close()
    with pytest.raises(AssetError, match="stopping"):
        decoders._decode(b"data")
    assert not only.is_alive
