"""Whatever is sent, by the server's own OpenAPI documents or not, the answer is one that they describe.

`make fuzz` looks deeper, and each time elsewhere.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from pipelines.registry import ENDPOINTS, Endpoint
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

ALICE = "alice:s3cret"
HEADERS = {"authorization": f"Key {ALICE}"}
EXAMPLES = os.environ.get("DARKROOM_FUZZ")
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]  # what a document allows, and what it does not

examples = settings(
    max_examples=int(EXAMPLES or 300) // 20,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A gateway in a thread of its own, whose model answers at once."""
    at_work = gateway_at_work(tmp_path_factory.mktemp("properties"), keys=ALICE)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(at_work) as place:
        portal.call(place.model.open.set)
        yield place


@pytest.fixture(scope="module")
def http(place: Place) -> Iterator[httpx.Client]:
    fresh = httpx.Limits(keepalive_expiry=1)  # s; after five the server closes, just as httpx would
    with httpx.Client(base_url=place.url, headers=HEADERS, timeout=30, limits=fresh) as client:
        yield client


@pytest.fixture(scope="module", params=ENDPOINTS.values(), ids=lambda known: known.stem)
def known(request: pytest.FixtureRequest) -> Endpoint:
    endpoint: Endpoint = request.param
    return endpoint


@pytest.fixture(scope="module")
def document(known: Endpoint, place: Place) -> Any:
    """What the server says of an endpoint."""
    return schemathesis.openapi.from_url(f"{place.url}/openapi/{known.id}")


def called(case: Any) -> Any:
    """The answer, which is as the document says and no fault of the server's."""
    return case.call_and_validate(headers=HEADERS, checks=CHECKS)


def is_told(answer: httpx.Response) -> bool:
    """Whether it is no fault of the server's, and a refusal says why in fal's shape."""
    if answer.status_code >= 500:
        return False
    if answer.status_code < 400:
        return True
    body = answer.json()
    if answer.url.path.startswith("/v1/images/"):
        return isinstance(body["error"]["message"], str)  # in OpenAI's shape
    faults = body["detail"]
    if isinstance(faults, list):
        assert answer.status_code == 422
        assert all({"loc", "msg", "type"} <= set(fault) for fault in faults)
    else:
        assert faults == body["message"]
    assert answer.headers["x-fal-error-type"] == body["error_type"]
    return isinstance(body["message"], str) and "x-fal-request-id" in answer.headers


def test_an_input_that_the_document_allows_is_taken_and_comes_to_an_output(
    known: Endpoint, document: Any, http: httpx.Client
) -> None:
    request = f"/{known.id}/requests/{{request_id}}"

    @examples
    @given(case=document[f"/{known.id}"]["post"].as_strategy(GenerationMode.POSITIVE))
    def check(case: Any) -> None:
        answer = called(case)
        if answer.status_code == 422:  # what no schema can tell, such as bounds over several fields
            return
        assert answer.status_code == 200
        receipt = answer.json()
        http.get(f"{receipt['status_url']}/stream").raise_for_status()  # to its end
        place = {"request_id": receipt["request_id"]}
        for path, status in ((f"{request}/status", 200), (request, 200)):
            found = called(document[path]["get"].Case(path_parameters=place))
            assert found.status_code == status, found.text
        assert called(document[f"{request}/cancel"]["put"].Case(path_parameters=place)).status_code == 400

    check()


def test_an_input_that_the_document_forbids_does_no_harm(known: Endpoint, document: Any) -> None:
    @examples
    @given(case=document[f"/{known.id}"]["post"].as_strategy(GenerationMode.NEGATIVE))
    def check(case: Any) -> None:
        # Some types are converted, as at fal; and a document tells that a key must be sent.
        assert called(case).status_code in (200, 400, 401, 422)

    check()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: str(mode.value))
@pytest.mark.parametrize(("method", "tail"), [("get", ""), ("get", "/status"), ("put", "/cancel")])
def test_no_id_of_a_request_can_be_guessed(
    method: str, tail: str, mode: GenerationMode, known: Endpoint, document: Any
) -> None:
    path = f"/{known.id}/requests/{{request_id}}{tail}"

    @examples
    @given(case=document[path][method].as_strategy(mode))
    def check(case: Any) -> None:
        assert called(case).status_code in (400, 401, 404, 405)

    check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = {
    "/rest/storage/upload/initiate": ("content_type", "file_name"),
    "/rest/storage/upload/initiate-multipart": ("content_type", "file_name"),
    "/rest/storage/auth/token": (),
    "/rest/tokens": ("app", "duration", "allowed_apps", "token_expiration"),
    "/rest/tokens/realtime": ("app", "duration", "allowed_apps", "token_expiration"),
    "/v1/images/generations": ("prompt", "model", "n", "size", "quality", "output_format", "response_format"),
    f"/run/{ENDPOINT}": ("prompt", "image_size", "seed", "num_images", "loras"),
    f"/run/{ENDPOINT}/stream": ("prompt", "image_size"),
    f"/queue/{ENDPOINT}": ("prompt", "image_size", "sync_mode", "guidance_scale"),
}


@pytest.mark.parametrize("path", FIELDS)
def test_no_body_does_any_harm(path: str, http: httpx.Client) -> None:
    """JSON with the right names and wrong values, JSON of any form, and what is no JSON."""
    fields = st.fixed_dictionaries({}, optional={name: json_values for name in FIELDS[path]})
    bodies = (fields | json_values).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=64)

    @examples
    @given(body=bodies)
    def check(body: bytes) -> None:
        assert is_told(http.post(path, content=body, headers={"content-type": "application/json"}))

    check()


NAMED = (
    "authorization",
    "content-type",
    "host",
    "idempotency-key",
    "x-fal-no-retry",
    "x-fal-object-lifecycle",
    "x-fal-object-lifecycle-preference",
    "x-fal-queue-priority",
    "x-fal-request-start-timeout",
    "x-fal-request-timeout",
    "x-fal-retry-config",
    "x-fal-runner-hint",
    "x-fal-store-io",
    "x-fal-tags",
    "x-fal-target-url",
    "x-forwarded-host",
    "x-forwarded-proto",
)
# What a header can hold at all, with the forms that some of them have.
values = (
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
    | st.sampled_from(["", "0", "-1", "nan", "inf", "1e999", "{}", "[]", "null", '{"expiration": 1e999}'])
    | st.sampled_from(["http://[", "https://queue.fal.run:x/", "//", "Key ", "Bearer :", "a,b"])
    | json_values.map(json.dumps)
).map(lambda text: text.encode("latin-1", "replace").strip())


@pytest.mark.parametrize("path", [f"/queue/{ENDPOINT}", "/api/fal/proxy", "/rest/storage/upload/initiate"])
@pytest.mark.parametrize("name", NAMED)
def test_no_header_does_any_harm(name: str, path: str, http: httpx.Client) -> None:
    usual = {b"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}".encode()}

    @examples
    @given(value=values)
    def check(value: bytes) -> None:
        headers = {**usual, name.encode(): value}
        assert is_told(http.post(path, json={"prompt": "a cat"}, headers=headers))

    check()


WHERE = ("/v1/models", "/v1/models/requests", "/v1/models/requests/by-endpoint", f"/queue/{ENDPOINT}")
ASKED = ("limit", "cursor", "expand", "endpoint_id", "q", "status", "start", "end", "fal_webhook", "prompt")


@pytest.mark.parametrize("path", [*WHERE, "/openapi/", "/files/", "/rest/", "/cdn/", "/run/", "/queue/"])
def test_no_address_does_any_harm(path: str, http: httpx.Client) -> None:
    texts = st.text(st.characters(codec="utf-8"), max_size=40)
    query = st.dictionaries(st.sampled_from(ASKED), texts | st.integers().map(str), max_size=3)

    @examples
    @given(tail=texts if path.endswith("/") else st.just(""), query=query)
    def check(tail: str, query: dict[str, str]) -> None:
        url = httpx.URL(http.base_url.join(path), params=query)
        encoded = "".join(f"%{byte:02X}" for byte in tail.encode())
        url = url.copy_with(raw_path=url.raw_path.replace(path.encode(), (path + encoded).encode(), 1))
        assert is_told(http.get(url))

    check()
