"""Embedded models: the real classes at tiny sizes, which stand in for published weights.

Those with "world" in their names are trained on drawings (`world.py`) and lie in `weights/`; demos and first
starts use them. The others have random weights and are built on this machine; tests use them. Nothing here
knows how a picture is made; importing this package loads neither torch nor diffusers.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

Report = Callable[[str], None]

# Part of every folder's name. Raise it when a builder changes what it writes.
RECIPE = 1

_BUILDERS = {
    "flux": "pipelines.zoo.flux:build",
    "flux-redux": "pipelines.zoo.redux:build",
    "depth-anything": "pipelines.zoo.depth:build",
    "safety-checker": "pipelines.zoo.safety:build",
    "sd15": "pipelines.zoo.sd:build_sd15",
    "sd2": "pipelines.zoo.sd:build_sd2",
    "sdxl": "pipelines.zoo.sd:build_sdxl",
    "sdxl-canny": "pipelines.zoo.sd:build_sdxl_canny",
}

WEIGHTS = Path(__file__).parent / "weights"

_log = logging.getLogger(__name__)
_building = Lock()


def names() -> tuple[str, ...]:
    """Those with random weights."""
    return tuple(_BUILDERS)


def trained() -> tuple[str, ...]:
    """Those that are shipped."""
    return tuple(sorted(each.name for each in WEIGHTS.glob("[!.]*")))


def locate(name: str, root: Path | None = None, report: Report = _log.info) -> Path:
    """The folder of an embedded model; one with random weights is built under `root` if it is not there yet.

    Safe to call from several threads and processes at once: all get the same folder, which is
    either absent or whole. `report` gets one short line per stage of a build, and none when the
    folder is there; it must not call `locate` itself.
    Raises ValueError for a name that neither `names` nor `trained` lists.
    """
    if name in trained():
        return WEIGHTS / name
    if name not in _BUILDERS:
        raise ValueError(f"unknown embedded model {name!r}; known: {', '.join((*names(), *trained()))}")
    folder = (root or _cache()) / f"{name}-{RECIPE}"
    with _building:
        if not folder.is_dir():
            _build(name, folder, lambda stage: report(f"embedded {name}: {stage}"))
    return folder


def train(
    only: Sequence[str],
    report: Callable[[str, int, int], None],
    *,
    checkpoints: Path | None = None,
    into: Path = WEIGHTS,
    device: str = "cpu",
) -> list[Path]:
    """Train the models of these names, or all, and replace their folders in `into`. Hours on a CPU.

    A run goes on from `checkpoints`. `report` is told what is trained, the steps done, and the steps in all.
    Raises ValueError for a name that is not trained here.
    """
    workshop = import_module("pipelines.zoo.training.workshop")
    if unknown := [name for name in only if name not in workshop.MODELS]:
        raise ValueError(f"unknown model {unknown[0]!r}; known: {', '.join(workshop.MODELS)}")
    shop = workshop.Workshop(checkpoints or _cache() / "checkpoints", report, device)
    into.mkdir(parents=True, exist_ok=True)
    made = []
    for name in only or workshop.MODELS:
        with TemporaryDirectory(dir=into, prefix=f".{name}-") as staging:
            draft = Path(staging) / name
            draft.mkdir()
            shop.build(name, draft)
            shutil.rmtree(into / name, ignore_errors=True)
            _publish(draft, into / name)
        made.append(into / name)
    return made


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "darkroom" / "zoo"


def _build(name: str, folder: Path, report: Report) -> None:
    module, _, function = _BUILDERS[name].partition(":")
    build = getattr(import_module(module), function)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The draft lies one level down because a temporary folder is closed to other users.
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        draft = Path(staging) / folder.name
        draft.mkdir()
        build(draft, report)
        _publish(draft, folder)


def _publish(draft: Path, folder: Path) -> None:
    for weights in draft.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner alone, unlike the files beside them
    try:
        os.rename(draft, folder)
    except OSError:
        # A folder with files in it is never replaced: whoever came first has published theirs.
        if not folder.is_dir():
            raise
