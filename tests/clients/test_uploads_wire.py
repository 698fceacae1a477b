"""Uploads where fal's clients hide them: signatures, parts, limits, and how files are served."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import BODY_GRACE_S, MAX_UPLOAD_BYTES
from tests.clients.inputs import ALICE, ENDPOINT, REMAKE, REMAKE_EXAMPLE, SMALL, drawing, encoded
from tests.support.server import Server

INITIATE = "/rest/storage/upload/initiate"
PNG = {"content-type": "image/png"}


def initiate(
    http: httpx.Client, kind: str = "image/png", name: str = "cat.png", **headers: str
) -> dict[str, str]:
    answer = http.post(INITIATE, json={"content_type": kind, "file_name": name}, headers=headers)
    assert answer.status_code == 200, answer.text
    urls: dict[str, str] = answer.json()
    return urls


def upload(http: httpx.Client, data: bytes, kind: str = "image/png", name: str = "cat.png") -> str:
    """The URL of a file that has been sent."""
    urls = initiate(http, kind, name)
    answer = httpx.put(urls["upload_url"], content=data, headers={"content-type": kind})
    assert answer.status_code == 200, answer.text
    return urls["file_url"]


def part(url: str, number: int, tail: str = "") -> str:
    """Where a JavaScript client sends a part."""
    parsed = httpx.URL(url)
    return str(parsed.copy_with(path=f"{parsed.path}/{tail or number}"))


def complete(url: str, parts: Any) -> httpx.Response:
    return httpx.post(part(url, 0, "complete"), json={"parts": parts})


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and type of an error in fal's shape."""
    body = answer.json()
    assert body["detail"] == body["message"] and isinstance(body["message"], str)
    assert answer.headers["x-fal-error-type"] == body["error_type"]
    assert answer.headers["access-control-allow-origin"] == "*"
    return answer.status_code, body["error_type"]


# --- who may ---


@pytest.mark.parametrize(
    "path",
    [INITIATE, f"{INITIATE}-multipart", "/rest/storage/auth/token", "/cdn/files/upload", "/files/upload"],
)
def test_an_upload_begins_with_a_key(path: str, stranger: httpx.Client, alice: httpx.Client) -> None:
    for headers in ({}, {"authorization": "Key alice:guess"}, {"authorization": "Bearer nonsense.x"}):
        assert refusal(stranger.post(path, json={}, headers=headers)) == (401, "auth_error")
    assert alice.post(path, json={}).status_code == 200


def test_a_pass_opens_the_cdn_and_nothing_else(alice: httpx.Client, stranger: httpx.Client) -> None:
    issued = alice.post("/rest/storage/auth/token?storage_type=fal-cdn-v3", json={}).json()
    assert issued["token_type"] == "Bearer"
    headers = {"authorization": f"Bearer {issued['token']}"}
    assert stranger.post("/cdn/files/upload", content=b"x", headers=headers).status_code == 200
    assert refusal(stranger.post(f"/run/{ENDPOINT}", json={}, headers=headers)) == (401, "auth_error")
    assert refusal(stranger.post(INITIATE, json={}, headers=headers)) == (401, "auth_error")


def test_a_changed_upload_url_is_refused(alice: httpx.Client) -> None:
    url, other = (initiate(alice)["upload_url"] for _ in range(2))
    start, _, ticket = url.partition("?ticket=")
    payload, _, signature = ticket.partition(".")
    for changed in (
        start,  # without a ticket
        f"{start}?ticket=",
        f"{start}?ticket={payload}",
        f"{start}?ticket={payload}.",
        f"{start}?ticket={payload}.{signature[:-2]}AA",
        f"{start}?ticket={payload[:-2]}AA.{signature}",
        f"{other.partition('?')[0]}?ticket={ticket}",  # another file's
        f"{start}?ticket={other.partition('?ticket=')[2]}",
    ):
        assert refusal(httpx.put(changed, content=b"x", headers=PNG)) == (403, "auth_error")
        assert refusal(httpx.put(part(changed, 1), content=b"x")) == (403, "auth_error")
        assert refusal(complete(changed, [{"partNumber": 1, "etag": "x"}])) == (403, "auth_error")
    assert httpx.get(start).status_code == 404
    for number in ("x", "9" * 5000, "-1"):
        assert refusal(httpx.put(part(url, 0, number), content=b"x")) == (404, "not_found")


def test_an_upload_url_is_for_one_type_and_one_content(alice: httpx.Client) -> None:
    urls = initiate(alice)
    wrong = httpx.put(urls["upload_url"], content=b"x", headers={"content-type": "text/html"})
    assert refusal(wrong) == (403, "auth_error")
    assert "image/png" in wrong.json()["message"]
    for _ in range(2):  # a client that lost the answer sends the same again
        assert httpx.put(urls["upload_url"], content=b"first", headers=PNG).status_code == 200
    assert refusal(httpx.put(urls["upload_url"], content=b"second")) == (403, "auth_error")
    assert httpx.get(urls["file_url"]).content == b"first"


def test_a_key_is_not_needed_to_send_and_read(alice: httpx.Client) -> None:
    urls = initiate(alice)
    assert httpx.get(urls["file_url"]).status_code == 404  # not before it is there
    sent = httpx.put(urls["upload_url"], content=b"x", headers={"authorization": "Key alice:guess"})
    assert sent.status_code == 200
    assert httpx.get(urls["file_url"]).content == b"x"


# --- parts ---


@pytest.mark.parametrize(
    ("named", "status"),
    [
        ([], 422),  # none
        ([2], 400),  # the first is missing
        ([1, 2, 3], 400),  # the third has not come
        ([1, 3], 400),
    ],
)
def test_a_file_without_one_of_its_parts_is_refused(
    named: list[int], status: int, alice: httpx.Client
) -> None:
    urls = initiate(alice)
    tags = {}
    for number in (2, 1):
        answer = httpx.put(part(urls["upload_url"], number), content=b"x" * number)
        assert answer.json() == {"partNumber": number, "etag": answer.headers["etag"].strip('"')}
        tags[number] = answer.json()["etag"]
    parts = [{"partNumber": number, "etag": tags.get(number, "x" * 32)} for number in named]
    answer = complete(urls["upload_url"], parts)
    assert answer.status_code == status
    if status == 400:
        assert refusal(answer) == (400, "bad_request")
        assert f"Part {min({1, 2, 3} - ({*named} & {1, 2}))} is missing" in answer.json()["message"]
    assert httpx.get(urls["file_url"]).status_code == 404
    whole = [{"partNumber": number, "etag": f'"{tags[number]}"'} for number in (2, 1)]
    for _ in range(2):
        assert complete(urls["upload_url"], whole).status_code == 200
    assert httpx.get(urls["file_url"]).content == b"xxx"


@pytest.mark.parametrize(
    "parts",
    [
        "1",
        [{"partNumber": 1}],
        [{"etag": "x"}],
        [{"partNumber": 0, "etag": "x"}],
        [{"partNumber": 10**9, "etag": "x"}],
        [{"partNumber": 1, "etag": 7}],
        [1],
    ],
)
def test_a_list_of_parts_that_is_none_is_refused(parts: Any, alice: httpx.Client) -> None:
    answer = complete(initiate(alice)["upload_url"], parts)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][:2] == ["body", "parts"]


def test_parts_of_python_uploads_need_their_ticket(alice: httpx.Client) -> None:
    begun = alice.post("/cdn/files/upload/multipart", headers=PNG | {"x-fal-file-name": "cat.png"}).json()
    parts = f"{begun['access_url']}/multipart"
    good, bad = f"{parts}/{begun['uploadId']}", f"{parts}/{begun['uploadId'][:-2]}AA"
    for url in (bad, f"{parts}/x"):
        assert refusal(httpx.put(f"{url}/1", content=b"x")) == (403, "auth_error")
        assert refusal(httpx.post(f"{url}/complete", json={"parts": []})) == (403, "auth_error")
    tag = httpx.put(f"{good}/1", content=b"x").headers["etag"]
    parts_list = {"parts": [{"partNumber": 1, "etag": tag}]}
    assert httpx.post(f"{good}/complete", json=parts_list).status_code == 200
    assert httpx.get(begun["access_url"]).content == b"x"


# --- limits ---


def test_a_file_that_is_announced_too_large_is_refused_before_it_comes(
    alice: httpx.Client, server: Server
) -> None:
    target = httpx.URL(initiate(alice)["upload_url"])
    head = f"PUT {target.raw_path.decode()} HTTP/1.1\r\nhost: box\r\ncontent-type: image/png\r\n"
    with socket.create_connection((target.host, target.port)) as sender:
        sender.sendall(f"{head}content-length: {MAX_UPLOAD_BYTES + 1}\r\n\r\n".encode())
        answer = sender.recv(65_536).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    assert "request_too_large" in answer


def test_t19_a_file_that_turns_out_too_large_is_refused(alice: httpx.Client) -> None:
    urls = initiate(alice)

    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_UPLOAD_BYTES // 1_000_000 + 1):
            yield bytes(1_000_000)

    answer = httpx.put(urls["upload_url"], content=chunks(), headers=PNG, timeout=60)
    assert refusal(answer) == (413, "request_too_large")
    assert httpx.get(urls["file_url"]).status_code == 404


def test_the_gateway_does_not_hold_files_in_memory(alice: httpx.Client, server: Server) -> None:
    [gateway] = server.pids("ServeReplica:darkroom:gateway")

    def peak() -> int:
        [line] = [
            x for x in Path(f"/proc/{gateway}/status").read_text().splitlines() if x.startswith("VmHWM")
        ]
        return int(line.split()[1]) * 1024

    block = bytes(1_000_000)

    def send(megabytes: int) -> None:
        urls = initiate(alice)
        sent = httpx.put(
            urls["upload_url"], content=(block for _ in range(megabytes)), headers=PNG, timeout=60
        )
        assert sent.status_code == 200, sent.text
        assert int(httpx.head(urls["file_url"]).headers["content-length"]) == megabytes * len(block)

    def send_at_once(count: int, megabytes: int) -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(send, [megabytes] * count))

    send_at_once(4, 10)
    before = peak()
    send_at_once(4, 90)
    assert peak() - before < 60_000_000  # of 360 million


# --- bodies that are not what they say ---


@pytest.fixture
def begun(alice: httpx.Client) -> httpx.URL:
    """An upload URL."""
    return httpx.URL(initiate(alice)["upload_url"])


@contextmanager
def sending(url: httpx.URL, headers: str, path: str | None = None) -> Iterator[socket.socket]:
    """A PUT whose body is still to come."""
    target = path or url.raw_path.decode()
    with socket.create_connection((url.host, url.port), timeout=30) as sender:
        sender.sendall(
            f"PUT {target} HTTP/1.1\r\nhost: box\r\ncontent-type: image/png\r\n{headers}\r\n\r\n".encode()
        )
        yield sender


def heard(sender: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer."""
    answer = HTTPResponse(sender)
    answer.begin()
    body: dict[str, Any] = json.loads(answer.read())
    return answer.status, body


def of_upload(server: Server, url: httpx.URL) -> list[Path]:
    """What the server keeps of it."""
    key = url.path.rpartition("/")[2]
    return [path for path in (server.log.parent / "files").rglob(f"*{key}*/**/*") if path.is_file()]


def begins(server: Server, url: httpx.URL) -> bool:
    """Whether a body that is being sent has begun to be kept."""
    return within(10, lambda: bool(of_upload(server, url)))


def gone(server: Server, url: httpx.URL) -> bool:
    """Whether nothing is kept of an upload; a broken connection takes a moment to be noticed."""
    is_kept_nowhere = within(10, lambda: not of_upload(server, url))
    return is_kept_nowhere and httpx.get(url.copy_with(query=None)).status_code == 404


def within(limit_s: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("is_part", [False, True])
def test_a_body_that_breaks_off_leaves_nothing(begun: httpx.URL, server: Server, is_part: bool) -> None:
    path = httpx.URL(part(str(begun), 1)).raw_path.decode() if is_part else None
    with sending(begun, "content-length: 2000000", path) as sender:
        sender.sendall(b"x" * 1_000_000)
        assert begins(server, begun)
    assert gone(server, begun)


def test_a_body_that_breaks_off_between_chunks_leaves_nothing(begun: httpx.URL, server: Server) -> None:
    with sending(begun, "transfer-encoding: chunked") as sender:
        sender.sendall(b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n")
        assert begins(server, begun)
    assert gone(server, begun)


def test_a_file_is_no_longer_than_it_says(begun: httpx.URL) -> None:
    with sending(begun, "content-length: 3") as sender:
        sender.sendall(b"onetwo")
        assert heard(sender)[0] == 200
    assert httpx.get(begun.copy_with(query=None)).content == b"one"


@pytest.mark.parametrize(
    "headers",
    [
        "content-length: -1",
        "content-length: x",
        "content-length: 1\r\ncontent-length: 2",
        "content-length: 1e3",
        f"content-length: {'9' * 100}",
    ],
)
def test_t21_a_length_that_is_none_is_refused(headers: str, begun: httpx.URL, server: Server) -> None:
    with sending(begun, headers) as sender:
        sender.sendall(b"x")
        status = int(sender.recv(65_536).split(b" ")[1])
    assert status in (400, 413)
    assert gone(server, begun)


@pytest.mark.parametrize(
    ("headers", "piece"), [("content-length: 100", b"x"), ("transfer-encoding: chunked", b"1\r\nx\r\n")]
)
def test_t18_a_body_that_drips_is_given_up(
    headers: str, piece: bytes, begun: httpx.URL, server: Server
) -> None:
    with sending(begun, headers) as sender:
        dripping = threading.Event()

        def drip() -> None:
            while not dripping.wait(0.5):
                sender.sendall(piece)

        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(drip)
            began = time.monotonic()
            status, answer = heard(sender)
            dripping.set()
            ended.exception()  # the connection may have been closed on it
    assert (status, answer["error_type"]) == (408, "request_timeout")
    assert answer["detail"] == answer["message"]
    assert BODY_GRACE_S - 1 < time.monotonic() - began < BODY_GRACE_S + 30
    assert gone(server, begun)


# --- addresses ---


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (INITIATE, {}),
        (f"{INITIATE}?storage_type=fal-cdn-v3", {}),
        (f"{INITIATE}?storage_type=gcs", {}),
        ("/storage/upload/initiate", {"host": "rest.fal.ai"}),
        ("/storage/upload/initiate", {"host": "rest.alpha.fal.ai"}),
        ("/api/fal/proxy", {"x-fal-target-url": "https://rest.fal.ai/storage/upload/initiate"}),
        ("/api/fal/proxy", {"x-fal-target-url": "https://rest.alpha.fal.ai/storage/upload/initiate?x=1"}),
    ],
)
def test_every_way_in_begins_an_upload(path: str, headers: dict[str, str], alice: httpx.Client) -> None:
    urls = alice.post(path, json={"content_type": "image/png", "file_name": "a.png"}, headers=headers).json()
    reached = f"http://{headers['host']}" if "host" in headers else str(alice.base_url)
    assert urls["upload_url"].startswith(f"{reached}/files/")
    here = alice.base_url.join(httpx.URL(urls["upload_url"]).raw_path.decode())
    assert httpx.put(here, content=b"x").status_code == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/cdn/files/upload", {}),
        ("/files/upload", {}),
        ("/files/upload", {"host": "v3.fal.media"}),
        ("/files/upload", {"host": "fal.media"}),  # the Python client before 0.5, with its key
        ("/api/fal/proxy", {"x-fal-target-url": "https://v3.fal.media/files/upload"}),
    ],
)
def test_every_way_in_to_the_cdn_takes_a_file(
    path: str, headers: dict[str, str], alice: httpx.Client
) -> None:
    answer = alice.post(path, content=b"data", headers={"content-type": "text/css", **headers})
    url = httpx.URL(answer.json()["access_url"])
    for place in (url.path, f"/cdn{url.path}"):
        read = httpx.get(alice.base_url.join(place))
        assert (read.content, read.headers["content-type"]) == (b"data", "text/css")


def test_urls_follow_the_proxy_in_front(alice: httpx.Client) -> None:
    front = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.example"}
    urls = initiate(alice, **front)
    assert all(url.startswith("https://pictures.example/files/") for url in urls.values())
    issued = alice.post("/rest/storage/auth/token", json={}, headers=front).json()
    assert issued["base_url"] == "https://pictures.example/cdn"


def test_a_file_is_known_under_any_name_of_the_server(alice: httpx.Client) -> None:
    """As when it was uploaded through a public name and is used through an inner one."""
    front = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.invalid"}
    urls = initiate(alice, **front)
    here = alice.base_url.join(httpx.URL(urls["upload_url"]).raw_path.decode())
    assert httpx.put(here, content=encoded(drawing()), headers=PNG).status_code == 200
    answer = alice.post(f"/run/{REMAKE}", json=REMAKE_EXAMPLE | {"image_url": urls["file_url"]})
    assert answer.status_code == 200, answer.text
    missing = urls["file_url"].replace("files/", "files/0")
    answer = alice.post(f"/run/{REMAKE}", json=REMAKE_EXAMPLE | {"image_url": missing})
    assert answer.json()["detail"][0]["loc"] == ["body", "image_url"]


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (INITIATE, "POST"),
        (f"{INITIATE}-multipart", "POST"),
        ("/rest/storage/auth/token", "POST"),
        ("/cdn/files/upload", "POST"),
        ("/files/0123456789abcdef0123456789abcdef_cat.png?ticket=x", "PUT"),
        ("/files/0123456789abcdef0123456789abcdef_cat.png/1?ticket=x", "PUT"),
        ("/files/0123456789abcdef0123456789abcdef_cat.png/complete?ticket=x", "POST"),
        ("/files/0123456789abcdef0123456789abcdef_cat.png/multipart/ticket/1", "PUT"),
    ],
)
def test_a_preflight_needs_no_key(path: str, method: str, stranger: httpx.Client) -> None:
    answer = stranger.options(
        path,
        headers={
            "origin": "https://app.example",
            "access-control-request-method": method,
            "access-control-request-headers": "authorization,content-type,x-fal-object-lifecycle",
        },
    )
    assert answer.status_code == 200
    assert method in answer.headers["access-control-allow-methods"]
    assert "x-fal-object-lifecycle" in answer.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", INITIATE, 404),
        ("PUT", "/files/upload", 403),  # a file called upload
        ("GET", "/files/upload", 404),
        ("DELETE", "/files/0123456789abcdef0123456789abcdef.jpg", 405),
        ("PUT", "/files/a/b", 403),  # a part of an upload, without a ticket
        ("PUT", "/files/a/1/2", 404),
        ("POST", "/files/a", 405),
        ("GET", "/files/..%2fsecret", 405),  # as of a part
        ("GET", "/files/secret", 404),
        ("GET", "/files/details%2fx", 405),
        ("GET", "/files/uploads", 404),
        ("GET", "/cdn/files/../../queue.sqlite3", 404),
    ],
)
def test_what_does_not_exist_is_refused(method: str, path: str, status: int, alice: httpx.Client) -> None:
    answer = alice.request(method, path)
    assert refusal(answer)[0] == status


# --- what is told of a file ---


@pytest.mark.parametrize(
    ("kind", "name", "disposition"),
    [
        ("image/png", "cat.png", "inline"),
        ("image/jpeg", "cat.jpg", "inline"),
        ("video/mp4", "cat.mp4", "inline"),
        ("audio/mpeg", "cat.mp3", "inline"),
        ("text/plain", "cat.txt", "inline"),
        ("image/svg+xml", "cat.svg", "attachment"),  # may hold scripts
        ("IMAGE/SVG+XML", "cat.svg", "attachment"),
        ("text/html", "cat.html", "attachment"),
        ("application/xhtml+xml", "cat.xhtml", "attachment"),
        ("text/xml", "cat.xml", "attachment"),
        ("application/pdf", "cat.pdf", "attachment"),
        ("text/javascript", "cat.js", "attachment"),
        ("application/json", "cat.json", "attachment"),
        ("application/octet-stream", "cat.safetensors", "attachment"),
        ("model/gltf-binary", "cat.glb", "attachment"),
    ],
)
def test_t26_a_file_is_shown_but_never_run(
    kind: str, name: str, disposition: str, alice: httpx.Client
) -> None:
    data = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    answer = httpx.get(upload(alice, data, kind, name))
    assert answer.content == data
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'{disposition}; filename="{name}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "kind",
    ["", "png", "image/", "/png", "a/b/c", "image/png\r\nx: y", "image/png\0", "ä/b", "x" * 300 + "/y"],
)
def test_t20_what_is_no_content_type_is_refused(kind: str, alice: httpx.Client) -> None:
    answer = alice.post(INITIATE, json={"content_type": kind, "file_name": "a"})
    assert answer.status_code in (400, 422)
    assert answer.json()["message"]


@pytest.mark.parametrize(
    "name", ["a\r\nset-cookie: b", '";x', "../../etc/passwd", "x" * 9_999, "\u202egnp.exe"]
)
def test_t11_a_name_does_not_escape(name: str, alice: httpx.Client) -> None:
    answer = httpx.get(upload(alice, b"x", name=name))
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    shown = answer.headers["content-disposition"].partition("filename=")[2]
    assert shown.startswith('"') and shown.endswith('"') and len(shown) <= 82
    assert not set(shown[1:-1]) & set('"/\\;\r\n')


@pytest.mark.parametrize("fields", [{"content_type": 7}, {"file_name": ["a"]}])
def test_a_wrong_field_is_named(fields: dict[str, Any], alice: httpx.Client) -> None:
    answer = alice.post(INITIATE, json=fields)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", *fields]


@pytest.mark.parametrize(
    ("asked", "status", "answered", "data"),
    [
        ("bytes=2-4", 206, "bytes 2-4/10", b"234"),
        ("bytes=7-", 206, "bytes 7-9/10", b"789"),
        ("bytes=-3", 206, "bytes 7-9/10", b"789"),
        ("bytes=-99", 206, "bytes 0-9/10", b"0123456789"),
        ("bytes=0-0", 206, "bytes 0-0/10", b"0"),
        ("bytes=8-99", 206, "bytes 8-9/10", b"89"),
        ("bytes=10-", 416, "bytes */10", b""),  # nothing there
        ("bytes=5-4", 416, "bytes */10", b""),
        ("bytes=-0", 416, "bytes */10", b""),
        ("bytes=0-1,3-4", 200, None, b"0123456789"),  # not understood: all of it
        ("bytes=-", 200, None, b"0123456789"),
        ("lines=1-2", 200, None, b"0123456789"),
    ],
)
def test_a_part_of_a_file_can_be_read(
    asked: str, status: int, answered: str | None, data: bytes, digits: str
) -> None:
    answer = httpx.get(digits, headers={"range": asked})
    assert (answer.status_code, answer.content) == (status, data)
    assert answer.headers.get("content-range") == answered
    assert answer.headers["content-length"] == str(len(data))


@pytest.fixture(scope="module")
def digits(alice: httpx.Client) -> str:
    """The URL of a file of ten bytes."""
    return upload(alice, b"0123456789", "text/plain", "digits.txt")


# --- lifecycle ---


def test_a_file_goes_when_its_sender_wanted(alice: httpx.Client) -> None:
    urls = initiate(alice, **{"x-fal-object-lifecycle": '{"expiration_duration_seconds": 1}'})
    assert httpx.put(urls["upload_url"], content=b"x", headers=PNG).status_code == 200
    deadline = time.monotonic() + 10
    while httpx.get(urls["file_url"]).status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ("{}", 200),
        ('{"expiration_duration_seconds": null}', 200),
        ('{"expiration_duration_seconds": 3600, "initial_acl": {"default": "allow", "rules": []}}', 200),
        ('{"initial_acl": {"default": "allow", "rules": [{"user": "bob", "decision": "allow"}]}}', 200),
        ("soon", 400),
        ("[]", 400),
        ('{"expiration_duration_seconds": 0}', 400),
        ('{"expiration_duration_seconds": 1e99}', 400),
        ('{"initial_acl": {"default": "forbid"}}', 400),  # files are open to whoever has the URL
        ('{"initial_acl": {"default": "hide"}}', 400),
        ('{"initial_acl": {"rules": [{"user": "bob", "decision": "forbid"}]}}', 400),
    ],
)
@pytest.mark.parametrize("header", ["x-fal-object-lifecycle", "x-fal-object-lifecycle-preference"])
def test_a_lifecycle_is_kept_or_refused(header: str, wish: str, status: int, alice: httpx.Client) -> None:
    answer = alice.post(INITIATE, json={}, headers={header: wish})
    assert answer.status_code == status
    if status == 400:
        assert header in answer.json()["message"]


def test_pictures_go_when_their_caller_wanted(alice: httpx.Client) -> None:
    wish = {"x-fal-object-lifecycle-preference": '{"expiration_duration_seconds": 1}'}
    answer = alice.post(f"/run/{ENDPOINT}", json=SMALL, headers=wish)
    assert answer.status_code == 200, answer.text
    url = answer.json()["images"][0]["url"]
    deadline = time.monotonic() + 10
    while (gone := httpx.get(url)).status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert refusal(gone) == (404, "not_found")
    soon = alice.post(f"/run/{ENDPOINT}", json=SMALL, headers={[*wish][0]: "soon"})
    assert refusal(soon) == (400, "bad_request")


def test_a_command_line_needs_no_more_than_a_key(stranger: httpx.Client) -> None:
    headers = {"authorization": f"Key {ALICE}"}
    answer = stranger.post("/cdn/files/upload", content=io.BytesIO(b"x").getvalue(), headers=headers)
    assert httpx.get(answer.json()["access_url"]).content == b"x"
