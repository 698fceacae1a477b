"""Who may import whom, without cycles, and where endpoint ids may stand."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.registry import ENDPOINTS

ROOT = Path(__file__).parents[2]
ROOMS = ("schemas", "pipelines", "deployments")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in submodules)


GRAPH = {name: set(imports(path)) for name, path in MODULES.items()}


def inside(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_downwards_only(name: str) -> None:
    own = ROOMS.index(name.split(".")[0])
    above = ROOMS[own + 1 :] + ("tests", "benchmarks", "examples")
    assert not {each for each in GRAPH[name] if inside(each, *above)}


# a library, and who may import it
SEAMS = {
    "ray": ("deployments.app", "deployments.server", "deployments.router"),
    "starlette": ("deployments.gateway",),
    "torch": ("pipelines", "deployments.worker"),
    "diffusers": ("pipelines",),
    "transformers": ("pipelines",),
    "sqlalchemy": ("deployments.queue",),
    "sqlite3": ("deployments.queue.sqlite",),
    "psycopg": ("deployments.queue.postgres", "deployments.queue.listener"),
    "alembic": ("deployments.queue.migrations",),
    "obstore": ("deployments.files",),
    "httpx": (
        "deployments.files",
        "deployments.webhooks",
        "deployments.remote",
        "deployments.server",
        "deployments.cli",
    ),
    "cryptography": ("deployments.webhooks.keyring", "deployments.connect.authority"),
    "h11": ("deployments.connect",),
    "opentelemetry": ("deployments.traces",),
    "pipelines.registry": (
        "deployments.gateway",
        "deployments.worker",
        "deployments.server",
        "deployments.app",
    ),
    "pipelines.zoo": ("pipelines.zoo", "pipelines.sources", "deployments.cli"),
    # rooms never import rooms: they meet in app
    "deployments.gateway": ("deployments.gateway", "deployments.app", "deployments.cli"),
    "deployments.dispatcher": ("deployments.app",),
    "deployments.worker": ("deployments.worker", "deployments.app"),
    "deployments.connect": ("deployments.connect", "deployments.cli"),
    "deployments.webhooks": ("deployments.webhooks", "deployments.app", "deployments.cli"),
}


@pytest.mark.parametrize("library", SEAMS)
def test_a_library_stays_behind_its_seam(library: str) -> None:
    users = {name for name, used in GRAPH.items() if any(inside(each, library) for each in used)}
    assert {name for name in users if not inside(name, *SEAMS[library])} == set()


LIGHT = ["schemas", "pipelines.registry", "deployments.app", "deployments.cli", "deployments.gateway.http"]


@pytest.mark.parametrize("name", [name for name in MODULES if inside(name, *LIGHT)])
def test_what_a_gateway_loads_does_not_pull_torch_in(name: str) -> None:
    seen: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        todo += top_imports(MODULES[module])
    heavy = {m for m in seen for used in top_imports(MODULES[m]) if inside(used, "torch", "diffusers")}
    assert heavy == set()


def top_imports(path: Path) -> list[str]:
    """What importing the file imports: not what its functions import when called."""
    tree = ast.parse(path.read_text())
    body = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    found: list[str] = []
    for node in body.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


DECODER = "deployments.pictures.child"


def test_t15_strangers_pictures_are_opened_in_the_decoders_process_only() -> None:
    openers = set()
    for name, path in MODULES.items():
        names = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and inside(node.module or "", "PIL.Image", "PIL.ImageFile")
            for alias in node.names
        }
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        opened = any(
            (isinstance(call, ast.Attribute) and ast.unparse(call).endswith(("Image.open", "cv2.imdecode")))
            or ast.unparse(call).endswith("ImageFile.Parser")
            for call in calls
        )
        if opened or "open" in names or "Parser" in names:
            openers.add(name)
    assert openers == {DECODER}


def test_t15_the_decoders_process_holds_nothing_of_the_server() -> None:
    roots = {each.split(".")[0] for each in GRAPH[DECODER]}
    assert roots - sys.stdlib_module_names == {"PIL"}


def families() -> list[str]:
    return sorted({known.family for known in ENDPOINTS.values()})


@pytest.mark.parametrize("family", families())
def test_families_never_import_families(family: str) -> None:
    others = tuple(f"pipelines.{other}" for other in families() if other != family)
    for name, used in GRAPH.items():
        if inside(name, f"pipelines.{family}"):
            assert not {each for each in used if inside(each, *others)}


def test_the_engine_knows_no_family() -> None:
    allowed = (
        "pipelines.engine",
        "torch",
        "logging",
        "collections",
        "threading",
        "typing",
        "abc",
        "dataclasses",
        "gc",
        "itertools",
        "math",
        "sys",
        "schemas.errors",
        "schemas.jobs",
    )
    for name, used in GRAPH.items():
        if inside(name, "pipelines.engine"):
            assert {each for each in used if not inside(each, *allowed)} == set()


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done and name in GRAPH:
            for each in sorted(GRAPH[name]):
                visit(each, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def strings(path: Path) -> Iterator[str]:
    """The string constants of a file, its docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("name", MODULES)
def test_endpoint_ids_stand_in_the_registry_only(name: str) -> None:
    if name != "pipelines.registry":
        text = "\n".join(strings(MODULES[name]))
        assert [known for known in ENDPOINTS if known in text] == []


@pytest.mark.parametrize("known", ENDPOINTS.values(), ids=lambda known: known.stem)
def test_an_endpoints_stem_is_its_id_and_names_its_files(known: object) -> None:
    from pipelines.registry import Endpoint

    assert isinstance(known, Endpoint)
    stem = known.id.removeprefix("fal-ai/").replace("/", "_").replace("-", "_")
    assert known.stem == stem
    assert (ROOT / "schemas" / "endpoints" / f"{stem}.py").exists()
    assert (ROOT / "pipelines" / known.family / f"{stem}.py").exists()
