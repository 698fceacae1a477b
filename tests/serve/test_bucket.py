"""A server whose files lie in a bucket, and fal's own client, which knows nothing of it."""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import fal_client
import fal_client.client
import httpx
import pytest

from tests.clients.halves import UPLOADING
from tests.clients.inputs import REMAKE, REMAKE_EXAMPLE, drawing
from tests.support.buckets import CREDENTIALS, files_url, s3_at_work
from tests.support.server import Server, start, write_config

pytestmark = UPLOADING


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bucket")
    with s3_at_work() as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        url = files_url(s3, "pictures")
        server = start(write_config(folder, front={"files_url": url}, model={"files_url": url}))
        yield server
        assert server.stop() == 0
    assert not (folder / "files").exists()


@pytest.fixture
def fal(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[fal_client.SyncClient]:
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{server.url}/queue/")
    monkeypatch.setattr(fal_client.client, "REST_URL", f"{server.url}/rest")
    monkeypatch.setattr(fal_client.client, "CDN_URL", f"{server.url}/cdn")
    monkeypatch.setattr(fal_client.client, "MULTIPART_THRESHOLD", 100_000)
    monkeypatch.setattr(fal_client.client, "MULTIPART_CHUNK_SIZE", 100_000)
    client = fal_client.SyncClient(key="any:key")
    yield client
    client._client.close()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # see UPLOADING
        gc.collect()


def test_pictures_go_through_the_bucket(fal: fal_client.SyncClient, server: Server) -> None:
    start_url = fal.upload_image(drawing(), format="png")
    output = fal.subscribe(REMAKE, REMAKE_EXAMPLE | {"image_url": start_url})
    [image] = output["images"]
    for url, kind in ((start_url, "image/png"), (image["url"], "image/jpeg")):
        assert url.startswith(f"{server.url}/files/")
        answer = httpx.get(url, follow_redirects=True)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind
        assert len(answer.history) == 1
    assert answer.content.startswith(b"\xff\xd8\xff") and image["content_type"] == kind


def test_a_large_file_goes_in_parts(fal: fal_client.SyncClient, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(range(250)) * 4_001)
    url = fal.upload_file(path)
    assert httpx.get(url, follow_redirects=True).content == path.read_bytes()
