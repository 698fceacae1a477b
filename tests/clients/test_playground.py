"""The playground in a real Chromium: on a real server, and on one whose every word is hostile."""

import ast
import asyncio
import json
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.gateway import openapi, pages, validation
from deployments.gateway.descriptions import type_name
from pipelines import registry
from schemas.errors import FieldError, InputError
from schemas.jobs import Job, JobResult, Logged, Previewed
from tests.clients.inputs import ALICE, ENDPOINT, drawing, encoded, log
from tests.support import values
from tests.support.gateway import gateway_at_work, listening
from tests.support.prefixes import Prefixed
from tests.support.server import Server

SHOWN = os.environ.get("DARKROOM_SCREENSHOTS", "")  # a folder that pictures of the pages are left in


async def tell(packages: Path, script: str, *words: str, given: Any = None) -> Any:
    """What a script tells."""
    process = await asyncio.create_subprocess_exec(
        "node",
        script,
        *words,
        cwd=packages,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(json.dumps(given).encode()), 400)
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


@pytest.fixture(scope="module")
def told(server: Server, node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the story of a whole visit came to."""
    picture = tmp_path_factory.mktemp("playground") / "start.png"
    picture.write_bytes(encoded(drawing()))
    words = [server.url, ALICE, str(picture), *([SHOWN] if SHOWN else [])]
    found: dict[str, Any] = asyncio.run(tell(node_packages, "playground.mjs", *words))
    return found


# --- on a real server ---


def test_the_front_door_leads_a_browser_to_a_card_for_each_model(
    told: dict[str, Any], server: Server
) -> None:
    gallery = told["gallery"]
    assert gallery["address"] == f"{server.url}/playground"
    assert len(gallery["cards"]) == len(registry.ENDPOINTS)
    [card] = [each for each in gallery["cards"] if ENDPOINT in each]
    assert "Text to image with FLUX.1 [dev]." in card
    assert str(registry.endpoint(ENDPOINT).schema().EXAMPLE["prompt"]) in card
    assert "Apache-2.0" in card and "CPU" in card


def test_a_wrong_key_is_told_and_a_right_one_stays_in_the_tab(told: dict[str, Any]) -> None:
    assert told["keys"]["fault"] == "The server does not know this key."
    left = told["left"]
    assert ALICE in left["session"]
    for place in ("local", "address", "cookies"):
        assert "s3cret" not in left[place]


def test_a_run_shows_its_steps_previews_and_picture(told: dict[str, Any]) -> None:
    drawn = told["drawn"]
    shown = [int(found[1]) for each in drawn["states"] if (found := re.fullmatch(r"Step (\d+) of 40", each))]
    assert shown == sorted(set(shown)) and shown[-1] == 40
    assert drawn["forming"] == 1
    assert drawn["natural"] == [512, 512]
    assert drawn["caption"].startswith("512 × 512 · JPEG")
    assert drawn["download"] is not None
    facts = dict(zip(*[iter(drawn["facts"].split("\n"))] * 2, strict=True))
    assert facts["Seed"] == "9007199254740993"
    assert re.fullmatch(r"\d+\.\d\d s", facts["Ran"])
    assert facts["Request"] == drawn["request"]
    assert drawn["history"] == 1


def test_the_code_beside_it_says_the_same(told: dict[str, Any], server: Server) -> None:
    arguments = arguments_of(told["drawn"]["code"])
    assert arguments["prompt"] == "a lighthouse"
    assert arguments["image_size"] == {"width": 512, "height": 512}
    assert arguments["seed"] == 9007199254740993
    assert server.url in told["drawn"]["code"] and "s3cret" not in told["drawn"]["code"]


def test_what_is_wrong_stands_at_its_field_and_goes_again(told: dict[str, Any]) -> None:
    faults = told["faults"]
    assert "valid integer" in faults["steps"]
    assert faults["images"] == "Input should be less than or equal to 4"  # though it was folded
    assert faults["seed"] == ""
    assert faults["focused"] and faults["steps"] in faults["described"]
    assert "num_inference_steps" in faults["failure"]
    assert faults["after"] == 0


def test_a_fault_deep_inside_stands_at_its_field(told: dict[str, Any]) -> None:
    nested = told["nested"]
    assert sorted(nested["invalid"]) == ["Image url *", "Path *", "Value *"]
    assert "Field required" in nested["faults"]
    assert arguments_of(nested["code"])["loras"] == [{"scale": {"double_blocks.0": 7}}]


def test_escape_cancels(told: dict[str, Any]) -> None:
    cancelled = told["cancelled"]
    assert cancelled["failure"] == "Request cancelled by the client."
    assert cancelled["history"] == "cancelled" and cancelled["runs"]


def test_a_page_that_is_loaded_again_goes_on_with_its_request(told: dict[str, Any]) -> None:
    resumed = told["resumed"]
    assert resumed["sameAddress"] and resumed["found"]
    assert (resumed["prompt"], resumed["steps"]) == ("a long one", "50")
    assert resumed["failure"] == "Request cancelled by the client."


def test_its_place_in_the_queue_is_told_as_it_changes(told: dict[str, Any]) -> None:
    assert told["waited"]["failure"] == "Request cancelled by the client."


def test_a_connection_that_breaks_loses_nothing_and_repeats_nothing(told: dict[str, Any]) -> None:
    broken = told["broken"]
    assert broken["states"].count("The connection broke; trying again") == 2
    assert "In the queue, 7 ahead" in broken["states"] and broken["left"] == 0
    assert broken["lines"] == log(28)


def test_a_picture_is_chosen_dropped_or_pasted(told: dict[str, Any], server: Server) -> None:
    remade = told["remade"]
    uploads = [remade[each] for each in ("chosen", "dropped", "pasted")]
    assert len(set(uploads)) == 3
    assert all(each.startswith(f"{server.url}/files/") for each in uploads)
    assert remade["natural"] == [80, 48]
    assert remade["again"] == [remade["pasted"], "the same by night"]


def test_the_code_is_copied_as_it_stands(told: dict[str, Any], server: Server) -> None:
    copied = told["copied"]
    assert arguments_of(copied["Python"]) == registry.endpoint(ENDPOINT).schema().EXAMPLE
    assert f'"{server.url}/api/fal/proxy"' in copied["JavaScript"]
    assert copied["curl"].startswith(f"curl '{server.url}/run/{ENDPOINT}'")


def test_dark_and_light_are_the_reader_s_choice_and_stay_so(told: dict[str, Any]) -> None:
    light, dark, again = told["themes"]
    assert light != dark == again


def test_it_fits_a_phone(told: dict[str, Any]) -> None:
    assert told["phone"] == dict.fromkeys(told["phone"], 320)


def test_axe_finds_nothing_in_either_theme(told: dict[str, Any]) -> None:
    assert told["axe"] == []


def test_an_unknown_endpoint_has_a_page_that_says_so(told: dict[str, Any]) -> None:
    assert ENDPOINT in told["unknown"]["said"]  # what there is


def test_the_browser_complains_of_refusals_only(told: dict[str, Any]) -> None:
    """What the policy of the pages blocks, or a script that fails, would be told here."""
    assert [each for each in told["complaints"] if "Failed to load resource" not in each] == []


# --- forms ---


def document(endpoint_id: str) -> dict[str, Any]:
    return openapi.document(registry.endpoint(endpoint_id), "http://box", None)


def drawn_values(endpoint_id: str, count: int) -> list[Any]:
    found, rng = document(endpoint_id), random.Random(endpoint_id)
    name = f"{type_name(registry.endpoint(endpoint_id))}Input"
    schema = found["components"]["schemas"][name]
    defaults = {name: each["default"] for name, each in schema["properties"].items() if "default" in each}
    drawn = (values.draw(schema, found, rng) for _ in range(count))
    return [registry.endpoint(endpoint_id).schema().EXAMPLE, defaults, *drawn]


async def test_a_form_says_what_it_was_filled_with(node_packages: Path, tmp_path: Path) -> None:
    """The example, the defaults, and whatever else the schema allows, of every endpoint."""
    given = {each: drawn_values(each, 60) for each in registry.ENDPOINTS}
    texts = {name: [json.dumps(value) for value in each] for name, each in given.items()}
    async with gateway_at_work(tmp_path) as place:
        told = await tell(node_packages, "forms.mjs", place.url, given=texts)
    assert told["complaints"] == []
    for endpoint_id, each in given.items():
        read = told["told"][endpoint_id]
        assert read["untouched"] == "{}"
        kind = registry.endpoint(endpoint_id).input_type()
        for text, value in zip(read["read"], each, strict=True):
            assert same(json.loads(text)) == same(value)
        for text in (read["read"][0], *read["read"][2:]):  # the defaults alone lack what is required
            validation.read(kind, json.loads(text))


async def test_items_have_the_numbers_of_their_places_and_their_own_faults(
    node_packages: Path, tmp_path: Path
) -> None:
    """Of three the second goes, one is added, the first goes; what is left then is given a file."""
    async with gateway_at_work(tmp_path) as place:
        told = await tell(node_packages, "items.mjs", place.url)
        async with httpx.AsyncClient() as http:
            sent = (await http.get(told["uploaded"])).content
    bounds = {"Prompt *": "up to 32,768 characters", "Strength": "0.01 – 1", "Loras": "up to 32"}
    assert told["hints"].items() >= bounds.items()
    assert told["invalid"] == {"item": "Loras 2 *", "path": "three", "field": "Scale"}
    assert told["fault"] == "Input should be less than or equal to 4"
    assert told["items"] == ["Loras 1 *", "Loras 2 *", "Loras 3 *"]
    assert told["buttons"] == ["Remove Loras 1", "Remove Loras 2", "Remove Loras 3"]
    assert told["left"] == "three"
    assert sent == b"weights" and told["uploaded"].endswith("stripes.safetensors")


def same(value: Any) -> Any:
    """The same for numbers that JSON does not tell apart, and another one for true and 1."""
    if isinstance(value, dict):
        return {name: same(each) for name, each in value.items()}
    if isinstance(value, list):
        return [same(each) for each in value]
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return type(value).__name__, value


# --- code ---

HOSTILE = [
    "'; touch pwned; '",
    '"; touch pwned; "',
    "$(touch pwned) `touch pwned` $HOME !! \\",
    "\\'\\\"\\n line\nbreak\r\ttab \x00 \x1b[31m",
    "\u2028 \u2029 \u202e gnp.exe \u2066 \ufeff \U0001f98a \ud83e",
    "*/ </script> %s {} {{}} #{x} ${x}",
    "\"\"\"\n'''",
]


def arguments_of(code: str) -> Any:
    """What Python understands of the code."""
    [call] = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fal_client.subscribe"
    ]
    [arguments] = [each.value for each in call.keywords if each.arg == "arguments"]
    return ast.literal_eval(arguments)


async def test_t26_code_to_copy_says_what_was_asked_and_does_nothing_else(
    node_packages: Path, tmp_path: Path
) -> None:
    given = [{"prompt": each, "seed": 2**63 - 1, each: [True, None, 0.5, {}]} for each in HOSTILE]
    texts = [json.dumps(each) for each in given]
    told = await tell(node_packages, "snippets.mjs", str(pages.FOLDER), given=texts)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/curl").write_text('#!/bin/sh\nfor each; do printf "%s\\0" "$each"; done\n')
    (tmp_path / "bin/curl").chmod(0o755)
    for code, value in zip(told, given, strict=True):
        assert arguments_of(code["Python"]) == value
        assert not re.search(
            "[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]", "".join(code.values())
        )
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAL_KEY": "me:secret"}
        sent = subprocess.run(["sh", "-c", code["curl"]], cwd=tmp_path, env=environment, capture_output=True)
        words = sent.stdout.split(b"\0")
        assert words[0] == f"http://box:8000/run/{ENDPOINT}".encode()
        assert json.loads(words[words.index(b"-d") + 1]) == value
        assert b"Authorization: Key me:secret" in words
        assert spoken_by_javascript(code["JavaScript"]) == {**value, "seed": str(2**63 - 1)}
    assert not (tmp_path / "pwned").exists()


def spoken_by_javascript(code: str) -> Any:
    """The input that a script gives to a client which only writes it down."""
    tell = "async subscribe(_, {input}) { console.log(JSON.stringify(input)); return {}; }"
    client = f"const fal = {{config() {{}}, {tell}}};"
    quiet = code.replace('import { fal } from "@fal-ai/client";', client).replace("console.log(data);", "")
    done = subprocess.run(["node", "--input-type=module", "-e", quiet], capture_output=True, check=True)
    return json.loads(done.stdout)


# --- the history ---


async def test_the_history_is_bounded_and_does_without_storage(node_packages: Path) -> None:
    told = await tell(node_packages, "past.mjs", str(pages.FOLDER))
    assert told["many"] == [str(each) for each in range(199, 139, -1)]  # the newest first
    assert 400_000 < told["long"] <= 500_000
    assert told["full"]["count"] > 3 and told["full"]["first"] == "59" and told["full"]["characters"] <= 1000
    assert told["forbidden"] == [] and told["broken"] == [[], [], [], []]
    one, other = told["changed"]
    assert one["id"] == "1" and "input" not in one
    assert (other["id"], other["state"], other["input"]) == ("0", "done", {"prompt": "x"})
    assert "picture" not in other
    assert told["seed"] == str(2**63 - 1)
    assert told["cleared"] == ["2"]


# --- behind a proxy ---


async def test_below_a_prefix_of_a_proxy_s_a_page_finds_all_that_it_needs(
    node_packages: Path, tmp_path: Path
) -> None:
    """Its parts, the API, uploads and pictures; nothing is asked for beside the prefix."""
    start = tmp_path / "start.png"
    start.write_bytes(encoded(drawing()))
    proxy = Prefixed("/pictures/darkroom")
    async with listening(proxy.app) as origin:
        url = f"{origin}{proxy.prefix}"
        async with gateway_at_work(tmp_path, public_url=f"{url}/") as place:
            proxy.server = place.url
            key, outcome = await place.files.save(start.read_bytes(), "image/png"), place.model.outcome

            def drawn(job: Job) -> JobResult:
                output = outcome(job).output() | {"images": [{"url": place.files.url(key, job.base_url)}]}
                return JobResult.success(output, 0.5)

            place.model.outcome = drawn
            place.model.open.set()
            told = await tell(node_packages, "prefixed.mjs", url, str(start))
    assert [each for each in proxy.strays if each != "/favicon.ico"] == []
    assert told["gallery"] == told["back"] == f"{url}/playground"
    assert told["page"] == f"{url}/playground/{ENDPOINT}"
    assert f'B = "{url}"\n' in told["code"]
    assert told["picture"] == told["remade"] == f"{url}/files/{key}"
    assert told["uploaded"].startswith(f"{url}/files/")
    assert [each for each in told["complaints"] if "Failed to load resource" not in each] == []


# --- hostile words ---

SCRIPT = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><svg onload="window.pwned=1">'


async def test_t26_no_words_become_a_script(node_packages: Path, tmp_path: Path) -> None:
    """Of prompts, file names, logs, errors, outputs, endpoints and what an earlier visit left."""
    picture = "data:image/png;base64," + "iVBORw0KGgo="
    output = {
        "images": [
            {"url": url, "width": 1, "height": 1, "content_type": kind, "file_name": SCRIPT}
            for url, kind in (
                ("javascript:window.pwned=1", "image/png"),
                ("data:text/html,<script>window.pwned=1</script>", "image/png"),
                ("data:image/svg+xml,<svg onload='window.pwned=1'/>", "image/svg+xml"),
                ("javascript:window.pwned=1", "text/html"),
                ("vbscript:x", SCRIPT),
                (picture, "image/png"),
            )
        ],
        SCRIPT: {SCRIPT: SCRIPT},
        "prompt": SCRIPT,
        "seed": 1,
    }
    faults = [FieldError(("body", name), SCRIPT, "value_error") for name in ("prompt", SCRIPT)]
    async with gateway_at_work(tmp_path) as place:
        place.model.events = (Logged(f"step 1/2 {SCRIPT}"), Logged(SCRIPT, "ERROR"), Previewed(output))
        outcomes = iter([JobResult.success(output, 0.5), JobResult.failure(InputError(faults))])
        place.model.outcome = lambda job: next(outcomes)
        place.model.open.set()
        told = await tell(node_packages, "injection.mjs", place.url, given={"script": SCRIPT})
    assert told["pwned"] is False
    assert told["violations"] == []  # nothing even tried
    assert [each for each in told["complaints"] if "Failed to load resource" not in each] == []
    assert told["addresses"] == []
    for part in ("result", "failure", "fault", "rest"):  # where it is read as what it is
        assert SCRIPT in told[part], part
    assert f"step 1/2 {SCRIPT}" in told["log"]
    assert told["file"] == f"{SCRIPT.replace('/', '')}.svg"
