"""What the server tells of its models: the list, and OpenAPI for each."""

from typing import Any

import httpx
import pytest
from openapi_schema_validator import OAS30ReadValidator, OAS30WriteValidator
from openapi_spec_validator import OpenAPIV30SpecValidator

from deployments.gateway.descriptions import type_name
from pipelines.registry import ENDPOINTS, Endpoint
from tests.support.gateway import Place
from tests.support.jobs import ENDPOINT

IDS = sorted(ENDPOINTS)


@pytest.fixture(params=ENDPOINTS.values(), ids=lambda known: known.stem)
def known(request: pytest.FixtureRequest) -> Endpoint:
    endpoint: Endpoint = request.param
    return endpoint


async def document(http: httpx.AsyncClient, endpoint_id: str) -> dict[str, Any]:
    answer = await http.get(f"/openapi/{endpoint_id}")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def part(document: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema with all that it refers to."""
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


async def test_every_document_is_valid_openapi(known: Endpoint, stranger: httpx.AsyncClient) -> None:
    found = await document(stranger, known.id)
    OpenAPIV30SpecValidator(found).validate()
    assert found["openapi"] == "3.0.4"
    assert found["info"]["title"] == f"Queue OpenAPI for {known.id}"
    assert found["info"]["x-fal-metadata"]["endpointId"] == known.id
    assert found["servers"] == [{"url": f"{str(stranger.base_url).rstrip('/')}/queue"}]


async def test_the_documents_paths_are_those_of_the_queue(known: Endpoint, alice: httpx.AsyncClient) -> None:
    paths = (await document(alice, known.id))["paths"]
    request = f"/{known.id}/requests/{{request_id}}"
    assert {path: [*methods] for path, methods in paths.items()} == {
        f"/{known.id}": ["post"],
        request: ["get"],
        f"{request}/status": ["get"],
        f"{request}/cancel": ["put"],
    }


async def test_the_example_is_valid_by_the_document(known: Endpoint, stranger: httpx.AsyncClient) -> None:
    schema = part(await document(stranger, known.id), f"{type_name(known)}Input")
    OAS30WriteValidator(schema).validate(known.schema().EXAMPLE)


async def test_the_document_refuses_what_the_server_refuses(stranger: httpx.AsyncClient) -> None:
    validator = OAS30WriteValidator(part(await document(stranger, ENDPOINT), "FluxDevInput"))
    assert validator.is_valid({"prompt": "x", "image_size": "square", "seed": -(2**63)})
    assert validator.is_valid({"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": None})
    for wrong in (
        {},
        {"prompt": 7},
        {"prompt": "x", "num_images": 5},
        {"prompt": "x", "image_size": "huge"},
        {"prompt": "x", "image_size": {"width": 0, "height": 64}},  # an open bound
        {"prompt": "x", "seed": 2**63},
    ):
        assert not validator.is_valid(wrong), wrong


async def test_the_order_of_the_fields_is_told_as_fal_tells_it(
    known: Endpoint, stranger: httpx.AsyncClient
) -> None:
    schemas = (await document(stranger, known.id))["components"]["schemas"]
    assert schemas[f"{type_name(known)}Input"]["x-fal-order-properties"] == list(
        known.input_type().model_fields
    )


async def test_what_the_queue_answers_is_valid_by_the_document(
    known: Endpoint, alice: httpx.AsyncClient
) -> None:
    found = await document(alice, known.id)
    status = OAS30ReadValidator(part(found, "QueueStatus"))
    receipt = (await alice.post(f"/queue/{known.id}", json=known.schema().EXAMPLE)).json()
    status.validate(receipt)
    async with alice.stream("GET", f"{receipt['status_url']}/stream") as answer:
        await answer.aread()  # to its end
    status.validate((await alice.get(f"{receipt['status_url']}?logs=1")).json())
    OAS30ReadValidator(part(found, f"{type_name(known)}Output")).validate(
        (await alice.get(receipt["response_url"])).json()
    )
    OAS30ReadValidator(part(found, "CancelStatus")).validate((await alice.put(receipt["cancel_url"])).json())
    refusal = await alice.post(f"/queue/{known.id}", json={})
    assert refusal.status_code == 422
    OAS30ReadValidator(part(found, "Error")).validate(refusal.json())


@pytest.mark.parametrize(
    "form",
    [
        "/openapi/{id}",
        "/openapi/{id}/",
        "/openapi/{id}/openapi.json",
        "/api/openapi/queue/openapi.json?endpoint_id={id}",  # as at fal.ai
    ],
)
async def test_a_document_is_found_in_every_form(form: str, stranger: httpx.AsyncClient) -> None:
    answer = await stranger.get(form.format(id=ENDPOINT))
    assert answer.json() == await document(stranger, ENDPOINT)


async def test_the_proxy_leads_to_the_platform(alice: httpx.AsyncClient) -> None:
    async def proxied(target: str) -> Any:
        return (await alice.get("/api/fal/proxy", headers={"x-fal-target-url": target})).json()

    listed = await proxied(f"https://api.fal.ai/v1/models?endpoint_id={ENDPOINT}")
    assert [each["endpoint_id"] for each in listed["models"]] == [ENDPOINT]
    url = f"https://fal.ai/api/openapi/queue/openapi.json?endpoint_id={ENDPOINT}"
    assert (await proxied(url))["info"]["title"] == f"Queue OpenAPI for {ENDPOINT}"


@pytest.mark.parametrize("path", ["/openapi/fal-ai/nope", "/openapi/", "/api/openapi/queue/openapi.json"])
async def test_an_unknown_endpoint_has_no_document(path: str, stranger: httpx.AsyncClient) -> None:
    answer = await stranger.get(path)
    assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found")
    assert ENDPOINT in answer.json()["message"]  # what there is


async def test_every_model_is_listed(stranger: httpx.AsyncClient, place: Place) -> None:
    found = (await stranger.get("/v1/models")).json()
    assert [each["endpoint_id"] for each in found["models"]] == IDS
    assert (found["next_cursor"], found["has_more"]) == (None, False)
    for each in found["models"]:
        told = each["metadata"]
        assert told["display_name"] and told["description"] and told["updated_at"]
        assert (told["status"], told["model_url"]) == ("active", f"{place.url}/run/{each['endpoint_id']}")
        assert "openapi" not in each


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"endpoint_id": ENDPOINT}, [ENDPOINT]),
        ({"endpoint_id": IDS[:2]}, IDS[:2]),
        ({"endpoint_id": "fal-ai/nope"}, []),
        ({"q": "FLUX inversion"}, [each for each in IDS if "inversion" in each]),
        ({"q": "no such words"}, []),
        ({"category": "text-to-image"}, [ENDPOINT]),
        ({"category": "text-to-video"}, []),
        ({"q": "canny", "category": "image-to-image"}, [each for each in IDS if "canny" in each]),
        ({"status": "active"}, IDS),
        ({"status": "deprecated"}, []),
    ],
)
async def test_models_can_be_searched(query: Any, found: list[str], stranger: httpx.AsyncClient) -> None:
    answer = await stranger.get("/v1/models", params=query)
    assert [each["endpoint_id"] for each in answer.json()["models"]] == found


async def test_pages_follow_each_other_to_the_end(stranger: httpx.AsyncClient) -> None:
    seen, query = [], {"limit": 1}
    while True:
        page = (await stranger.get("/v1/models", params=query)).json()
        seen += [each["endpoint_id"] for each in page["models"]]
        if not page["has_more"]:
            break
        query |= {"cursor": page["next_cursor"]}
    assert seen == IDS


async def test_a_list_may_have_the_documents_in_it(stranger: httpx.AsyncClient) -> None:
    answer = await stranger.get("/v1/models", params={"expand": "openapi-3.0"})
    for each in answer.json()["models"]:
        assert each["openapi"] == await document(stranger, each["endpoint_id"])


@pytest.mark.parametrize(
    "query",
    ["expand=everything", "limit=0", "limit=x", "limit=11&expand=openapi-3.0", "limit=101", "cursor=%%%"],
)
async def test_a_malformed_search_is_refused(query: str, stranger: httpx.AsyncClient) -> None:
    answer = await stranger.get(f"/v1/models?{query}")
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")
