"""The playground's pages as a server hands them out, and what of the queue is there for them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.files.bucket import Bucket
from deployments.files.store import FileStore
from deployments.gateway.descriptions import type_name
from deployments.gateway.pages import FOLDER
from pipelines import registry
from schemas.jobs import Logged, Previewed
from schemas.settings import Catalogue
from tests.gateway.conftest import ALICE
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

ROOT = Path(__file__).parents[2]
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}  # as a browser asks for a page
PARTS = sorted(path.name for path in FOLDER.iterdir())
PAGES = [
    "/playground",
    "/playground/",
    f"/playground/{ENDPOINT}",
    *(f"/playground/static/{each}" for each in PARTS),
]


@pytest.mark.parametrize("path", PAGES)
async def test_t26_a_page_runs_only_scripts_of_this_server(path: str, stranger: httpx.AsyncClient) -> None:
    answer = await stranger.get(path)
    assert answer.status_code == 200
    policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "object-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", ["/playground", f"/playground/{ENDPOINT}", "/playground/fal-ai/nope"])
async def test_t27_a_page_lies_in_no_frame_and_tells_nobody_its_address(
    path: str, stranger: httpx.AsyncClient
) -> None:
    answer = await stranger.get(path)
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.html")), ids=lambda path: str(path.name))
def test_t26_a_page_has_nothing_inline_and_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert (
        re.findall(r"<script(?! (?:type=\"module\" )?src=\"/playground/static/[a-z]+\.js\"></script>)", text)
        == []
    )
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:|//", text) == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.js")), ids=lambda path: str(path.name))
def test_t26_no_script_makes_markup_or_code_of_text(path: Path) -> None:
    text = path.read_text().replace("console.log(data);", "")  # in the code to copy
    markup = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|createContextualFragment"
    )
    assert re.findall(rf"{markup}|\beval\b|new Function|setTimeout\(['\"`]|console\.", text) == []


def test_no_file_of_the_playground_names_an_endpoint() -> None:
    for part in FOLDER.iterdir():
        assert not [each for each in registry.ENDPOINTS if each in part.read_text()], part.name


async def test_a_page_is_asked_for_again_only_if_it_has_changed(stranger: httpx.AsyncClient) -> None:
    first = await stranger.get("/playground/static/form.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = await stranger.get("/playground/static/form.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = await stranger.get("/playground/static/form.js", headers={"if-none-match": '"x"'})
    assert other.status_code == 200


async def test_what_is_not_there_is_a_404(stranger: httpx.AsyncClient) -> None:
    missing = await stranger.get("/playground/static/nope.js")
    assert (missing.status_code, missing.json()["error_type"]) == (404, "not_found")
    unknown = await stranger.get("/playground/fal-ai/nope")
    assert (unknown.status_code, unknown.headers["content-type"]) == (404, "text/html; charset=utf-8")
    for path in ("/playground/static/..%2fgateway%2fpages.py", "/playground/static/%2e%2e/__init__.py"):
        assert (await stranger.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("path", "up"),
    [
        ("/playground", ""),
        ("/playground/", "../"),
        (f"/playground/{ENDPOINT}", "../../../"),
        ("/playground/fal-ai%2Fnope", "../"),  # one step for a browser
    ],
)
async def test_a_page_s_addresses_lead_there_from_where_it_is(
    path: str, up: str, stranger: httpx.AsyncClient
) -> None:
    """Without a word of the server's root, which a proxy may have put below a prefix."""
    places = re.findall(r'(?:src|href)="([^"#]+)"', (await stranger.get(path)).text)
    assert f"{up}playground/static/playground.css" in places
    assert [each for each in places if not re.match(rf"{re.escape(up)}(playground|v1/)", each)] == []


async def test_the_front_door_leads_a_browser_there_and_a_program_nowhere(
    alice: httpx.AsyncClient, stranger: httpx.AsyncClient
) -> None:
    led = await stranger.get("/", headers=HTML)
    assert (led.status_code, led.headers["location"]) == (307, "playground")
    assert (await stranger.get("/")).status_code == 401
    assert (await stranger.post("/", headers=HTML)).status_code == 401
    assert ENDPOINT in (await alice.get("/", headers=HTML)).json()["endpoints"]


async def test_t01_a_browser_s_headers_open_the_front_door_only(stranger: httpx.AsyncClient) -> None:
    for path in (f"/queue/{ENDPOINT}", "/v1/models/requests", "/run/", "/playgroundx", "/PLAYGROUND"):
        assert (await stranger.get(path, headers=HTML)).status_code == 401


async def test_pictures_may_come_from_the_server_s_other_names(tmp_path: Path) -> None:
    async with gateway_at_work(tmp_path, public_url="https://box.example:8443/x") as place:
        async with httpx.AsyncClient(base_url=place.url) as http:
            policy = (await http.get("/playground")).headers["content-security-policy"]
    assert "img-src 'self' data: https://box.example:8443;" in policy


async def test_a_bucket_s_pictures_come_from_where_its_redirects_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    options = "endpoint=http://inside:9000&public_endpoint=https://minio.example&region=us-east-1"
    leads_to = await FileStore(Bucket(f"s3://pictures/x?{options}")).leads_to()
    assert leads_to is not None and leads_to.startswith("https://minio.example/")
    kept = FileStore(Bucket(f"s3://pictures/x?{options}&presigned_s=0"))
    assert await kept.leads_to() is None


# --- what the API has for it ---


async def test_a_card_has_the_licence_and_hardware_that_the_operator_tells(
    place: Place, stranger: httpx.AsyncClient
) -> None:
    told = (await stranger.get("/v1/models")).json()["models"][0]["metadata"]
    assert "license_type" not in told and "hardware" not in told
    entry = {"endpoints": [ENDPOINT], "licence": "FLUX.1 [dev] Non-Commercial", "hardware": "1 × H100"}
    place.gateway.configure(Catalogue.model_validate({"models": {"flux": entry}}))
    [model] = (await stranger.get("/v1/models")).json()["models"]
    assert model["metadata"]["license_type"] == "FLUX.1 [dev] Non-Commercial"
    assert model["metadata"]["hardware"] == "1 × H100"


async def test_pages_begin_with_what_the_operator_shows_a_model_with(
    place: Place, stranger: httpx.AsyncClient
) -> None:
    drawing, remaking = registry.endpoint(ENDPOINT), registry.endpoint("fal-ai/lora/image-to-image")
    entry = {"endpoints": [drawing.id, remaking.id], "example": {"prompt": "a cat", "image_size": "square"}}
    place.gateway.configure(Catalogue.model_validate({"models": {"flux": entry}}))
    shown = []
    for each in (drawing, remaking):
        schemas = (await stranger.get(f"/openapi/{each.id}")).json()["components"]["schemas"]
        shown.append(schemas[f"{type_name(each)}Input"]["example"])
    assert shown[0] == drawing.schema().EXAMPLE | entry["example"]
    assert shown[1] == remaking.schema().EXAMPLE | {"prompt": "a cat"}, "it has no such field"


async def test_an_example_with_a_field_of_no_endpoint_is_refused(place: Place) -> None:
    entry = {"endpoints": [ENDPOINT], "example": {"promt": "a cat"}}
    with pytest.raises(ValueError, match="example of flux has fields of no endpoint: promt"):
        place.gateway.configure(Catalogue.model_validate({"models": {"flux": entry}}))


async def test_the_shipped_examples_are_taken_by_their_endpoints(
    place: Place, stranger: httpx.AsyncClient
) -> None:
    front, *_ = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"]
    place.gateway.configure(Catalogue.model_validate(front["deployments"][0]["user_config"]))
    for each in registry.ENDPOINTS.values():
        schemas = (await stranger.get(f"/openapi/{each.id}")).json()["components"]["schemas"]
        example = schemas[f"{type_name(each)}Input"]["example"]
        assert each.input_type().model_validate(example)
        assert example["prompt"] == "a red triangle in the center on a white background"


async def test_a_document_says_which_fields_take_files(stranger: httpx.AsyncClient) -> None:
    found = (await stranger.get("/openapi/fal-ai/flux-general/rf-inversion")).json()
    schemas = found["components"]["schemas"]
    fields = schemas["FluxGeneralRfInversionInput"]["properties"]
    assert fields["image_url"]["x-darkroom-asset"] == "image"
    assert fields["reference_image_url"]["x-darkroom-asset"] == "image"  # which may be absent
    assert schemas["ImageFillInput"]["properties"]["fill_image_url"]["x-darkroom-asset"] == "image"
    assert schemas["ControlNet"]["properties"]["path"]["x-darkroom-asset"] == "controlnet"
    assert "x-darkroom-asset" not in fields["prompt"]
    universal = (await stranger.get("/openapi/fal-ai/lora/image-to-image")).json()["components"]["schemas"]
    adapter = universal["IPAdapter"]["properties"]
    assert adapter["path"]["x-darkroom-asset"] == "ip_adapter"
    assert "x-darkroom-asset" not in adapter["insight_face_model_path"]  # a folder of the server's
    assert found["info"]["x-fal-metadata"]["playgroundUrl"].endswith(
        "/playground/fal-ai/flux-general/rf-inversion"
    )


async def statuses(
    http: httpx.AsyncClient,
    query: str,
    headers: dict[str, str],
    hear: Callable[[dict[str, Any]], None] = lambda each: None,
) -> list[dict[str, Any]]:
    """The status stream of a request of two previews; `hear` is told each as it comes."""
    receipt = (await http.post(f"/queue/{ENDPOINT}", json={"prompt": "x"}, headers=headers)).json()
    told = []
    async with http.stream("GET", f"{receipt['status_url']}/stream{query}") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                hear(told[-1])
    return told


async def test_a_status_stream_shows_previews_to_who_asks_for_them(
    place: Place, alice: httpx.AsyncClient
) -> None:
    place.model.events = (Previewed({"images": [1]}), Logged("step 1/2"), Previewed({"images": [2]}))
    place.model.open.clear()  # no end before the last preview: it would overtake that

    def end(each: dict[str, Any]) -> None:
        if each.get("preview") == {"images": [2]}:
            place.model.open.set()

    wanted = {"x-darkroom-previews": "1"}
    told = await statuses(alice, "?logs=1&previews=1", wanted, end)
    assert told[-1]["status"] == "COMPLETED"
    assert [line["message"] for each in told for line in each["logs"]] == ["step 1/2"]
    assert not [each for each in await statuses(alice, "?logs=1", wanted) if "preview" in each]


async def test_previews_are_made_for_a_submit_that_asks_and_no_other(
    place: Place, alice: httpx.AsyncClient
) -> None:
    made = []
    outcome = place.model.outcome

    def watched(job: Any) -> Any:
        made.append(job.previews)
        return outcome(job)

    place.model.outcome = watched
    for headers in ({}, {"x-darkroom-previews": "0"}, {"x-darkroom-previews": "true"}):
        await statuses(alice, "", headers)
    assert made == [False, False, True]
    refused = await alice.post(
        f"/queue/{ENDPOINT}", json={"prompt": "x"}, headers={"x-darkroom-previews": "maybe"}
    )
    assert refused.status_code == 400 and "x-darkroom-previews" in refused.json()["message"]


async def test_t23_a_key_in_the_pages_address_is_answered_by_no_page_that_repeats_it(
    stranger: httpx.AsyncClient,
) -> None:
    answer = await stranger.get(f"/playground/{ENDPOINT}?key={ALICE}&x=<script>")
    assert ALICE not in answer.text and ALICE not in str(answer.headers)
