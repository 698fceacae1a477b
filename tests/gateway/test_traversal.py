"""No name that a caller gives leads out of the server's folders, and none to what lies in them unnamed."""

import json
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.corpus.paths import PAYLOADS
from tests.support.audit import watching
from tests.support.gateway import Place
from tests.support.jobs import ENDPOINT

CANARY = b"outside of the server's folder"


def around(folder: Path) -> dict[str, bytes]:
    """All files beside the server's own, with their content."""
    own = (folder / "files", folder / "queue.sqlite3")
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(str(path).startswith(str(each)) for each in own)
    }


@pytest.fixture
def folder(tmp_path: Path, place: Place) -> Path:
    for name in ("outside", "etc/passwd", "x.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(CANARY)
    return tmp_path


def forms(payload: str) -> list[str]:
    """As it is, as far as a request line takes it, and encoded."""
    raw = payload.encode("utf-8", "surrogatepass")
    whole = "".join(f"%{byte:02x}" for byte in raw)
    bare = quote(raw, safe="/\\%.:;*|~$-")  # what need not be encoded is not
    return list(dict.fromkeys([whole, bare]))


async def exactly(client: httpx.AsyncClient, method: str, path: str, body: bytes) -> httpx.Response:
    """A path as it is written, which the client would tidy up."""
    return await client.request(method, "/", content=body, extensions={"target": path.encode("ascii")})


def test_there_are_enough() -> None:
    assert len(set(PAYLOADS)) >= 80


async def test_t11_no_name_of_an_upload_leads_out(folder: Path, alice: httpx.AsyncClient) -> None:
    before = around(folder)
    with watching() as seen:
        for payload in PAYLOADS:
            body = json.dumps({"file_name": payload, "content_type": "image/png"}).encode()
            begun = await alice.post("/rest/storage/upload/initiate", content=body)
            assert begun.status_code in (200, 422), payload
            if begun.status_code == 200:
                url = httpx.URL(begun.json()["upload_url"])
                assert url.path.count("/") == 2 and ".." not in url.path.split("_", 1)[0]
                sent = await alice.put(url, content=b"mine", headers={"content-type": "image/png"})
                assert sent.status_code == 200, (payload, sent.text)
                assert (await alice.get(begun.json()["file_url"])).content == b"mine"
            header = payload.encode("utf-8", "surrogatepass")
            if not set(header) & set(b"\x00\r\n"):
                sent = await alice.post(
                    "/cdn/files/upload", content=b"mine", headers={b"x-fal-file-name": header}
                )
                assert sent.status_code in (200, 400), (payload, sent.text)
    assert around(folder) == before
    assert [
        each for each in seen.opened if not each.startswith((str(folder / "files"), str(folder / "queue")))
    ] == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
async def test_t11_no_key_of_a_file_leads_out(method: str, folder: Path, alice: httpx.AsyncClient) -> None:
    await alice.post("/rest/storage/upload/initiate", json={})  # draws the secret
    secret = (folder / "files" / "secret").read_bytes()
    before = around(folder)
    for payload in PAYLOADS:
        for text in forms(payload):
            for path in (f"/files/{text}", f"/cdn/files/{text}", f"/files/{'0' * 32}_{text}"):
                answer = await exactly(alice, method, path, b"x" if method == "PUT" else b"")
                assert answer.status_code in (400, 403, 404, 405), (path, answer.status_code)
                assert secret not in answer.content and CANARY not in answer.content
    assert around(folder) == before


async def test_t11_no_id_of_a_request_leads_out(folder: Path, alice: httpx.AsyncClient) -> None:
    before = around(folder)
    for payload in PAYLOADS:
        for text in forms(payload):
            for method, path in (
                ("GET", f"/queue/{ENDPOINT}/requests/{text}"),
                ("GET", f"/queue/{ENDPOINT}/requests/{text}/status"),
                ("PUT", f"/queue/{ENDPOINT}/requests/{text}/cancel"),
                ("DELETE", f"/v1/models/requests/{text}/payloads"),
                ("POST", f"/run/{text}"),
                ("POST", f"/queue/{text}"),
                ("GET", f"/openapi/{text}"),
            ):
                answer = await exactly(alice, method, path, b"{}" if method == "POST" else b"")
                assert 400 <= answer.status_code < 500, (method, path, answer.status_code)
                assert CANARY not in answer.content
    assert around(folder) == before
