"""Forms and uploads on bytes that are nearly right."""

from collections.abc import Iterator

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import example, given

from tests.gateway.conftest import ALICE
from tests.support.fuzzing import fuzzed, mutants
from tests.support.gateway import Place, gateway_at_work


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    at_work = gateway_at_work(tmp_path_factory.mktemp("fuzz"), keys=ALICE)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(at_work) as place:
        portal.call(place.model.open.set)
        yield place


@pytest.fixture(scope="module")
def http(place: Place) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=place.url, headers={"authorization": f"Key {ALICE}"}, timeout=30) as client:
        yield client


# Starlette leaves the file of a part that is cut off to Python's own tidying.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_form_does_any_harm(http: httpx.Client) -> None:
    @fuzzed
    @example(b"")
    @given(mutants("multipart"))
    def check(body: bytes) -> None:
        kind = "multipart/form-data; boundary=b"
        answer = http.post("/v1/images/edits", content=body, headers={"content-type": kind})
        assert answer.status_code in (200, 400, 404), answer.text

    check()


def test_what_is_uploaded_comes_back_as_it_is(http: httpx.Client) -> None:
    @fuzzed
    @given(mutants("multipart"))
    def check(body: bytes) -> None:
        sent = http.post("/cdn/files/upload", content=body, headers={"content-type": "a/b"})
        assert http.get(sent.json()["access_url"]).content == body

    check()
