"""The files of a diffusers repository: what they are called, and how they come from the Hub."""

import json
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from pipelines.adapters.tensor_file import invalid, listed
from schemas.errors import AssetError

MAX_CONFIG_BYTES = 1 << 18

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = ("unet", "vae", *TEXT_ENCODERS)

Files = dict[str | None, list[Path]]


def fetch(repo: str, variant: str | None) -> Path:
    """The folder of a Hub repository, with the files that we read; what is here already is not fetched.

    Only components without the variant come in the plain form. Raises AssetError ("file_download_error").
    """
    folder = _snapshot(repo, [*_OTHER_FILES, *_patterns(COMPONENTS, variant)])
    plain = [each for each in COMPONENTS if variant not in weights(folder / each)]
    if variant is not None and len(plain) < len(COMPONENTS):
        folder = _snapshot(repo, _patterns(plain, None))
    return folder


def wanted(names: Collection[str], variant: str | None) -> list[str]:
    """Of the names of a repository's files, those that we read: what `fetch` brings, file by file.

    Raises AssetError where it is no model, has nothing of the variant, or a component has no safetensors.
    """
    if "unet/config.json" not in names:
        raise invalid("The repository is not a Stable Diffusion model: it has no unet/config.json.")
    parts = {each: [name[len(each) + 1 :] for name in names if _is_in(each, name)] for each in COMPONENTS}
    if variant is not None:
        _check_variant([_by_variant(part) for part in parts.values()], variant)
    others = [name for name in names if any(_fits(name, pattern) for pattern in _OTHER_FILES)]
    return others + [
        f"{each}/{name}" for each, part in parts.items() if part for name in pick(each, part, variant)
    ]


def weights(folder: Path) -> Files:
    """A component's safetensors files by their variants, plain ones by None."""
    found = _by_variant(path.name for path in _files(folder))
    return {variant: [folder / name for name in names] for variant, names in found.items()}


def choose(folder: Path, variant: str | None) -> list[Path]:
    """The variant's files, or else the plain ones. Raises AssetError where there are none."""
    names = [path.name for path in _files(folder)]
    return [folder / name for name in pick(folder.name, names, variant)]


def pick(folder: str, names: Collection[str], variant: str | None) -> list[str]:
    """The same by the names of a component's files. `folder` is for people."""
    found = _by_variant(names)
    chosen = found.get(variant) or found.get(None)
    if chosen:
        return chosen
    if found:
        hint = f"It has the variant {listed(sorted(map(str, found)))}."
    elif any(name.endswith((".bin", ".ckpt", ".pt")) for name in names):
        hint = "It has pickles (.bin, .pt, .ckpt), which are not loaded."
    else:
        hint = "Other formats are not loaded."
    raise invalid(f"The model has no safetensors file in {folder}. {hint}")


def check_variant(root: Path, variant: str) -> None:
    """Raise AssetError unless one component at least has the variant."""
    _check_variant([weights(root / component) for component in COMPONENTS], variant)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises AssetError."""
    where = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise invalid(f"The model has no {where}.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise invalid(f"The model's {where} is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise invalid(f"The model's {where} is not JSON.") from error
    if not isinstance(value, dict):
        raise invalid(f"The model's {where} is not an object.")
    return value


_OTHER_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{component}/config.json" for component in COMPONENTS),
    *(f"{tokenizer}/*.json" for tokenizer in ("tokenizer", "tokenizer_2")),
    *(f"{tokenizer}/merges.txt" for tokenizer in ("tokenizer", "tokenizer_2")),
)

# As diffusers and transformers call them: STEM.safetensors, STEM.fp16.safetensors, and in shards
# STEM-00001-of-00002.safetensors, STEM.fp16-00001-of-00002.safetensors, STEM-00001-of-00002.fp16.safetensors.
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(
    TEXT_ENCODERS, "model"
)
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)"
    r"(\.(?P<early>[\w-]+?))?(-\d{5}-of-\d{5})?(\.(?P<late>[\w-]+))?\.safetensors"
)


def _by_variant(names: Iterable[str]) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            found.setdefault(match["early"] or match["late"], []).append(name)
    return found


def _check_variant(components: Iterable[Collection[str | None]], variant: str) -> None:
    known = {each for variants in components for each in variants if each is not None}
    if variant not in known:
        has = f"it has {listed(sorted(known))}" if known else "it has plain ones only"
        raise invalid(f"The model has no safetensors files of the variant {variant!r:.50}; {has}.")


def _is_in(folder: str, name: str) -> bool:
    return name.startswith(f"{folder}/") and name.count("/") == 1


def _fits(name: str, pattern: str) -> bool:
    """Where the star stands for no slash."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _patterns(components: Iterable[str], variant: str | None) -> list[str]:
    """The same names as shell patterns, of one variant."""
    shard = "-?????-of-?????"
    if variant is None:
        names = ["", shard]
    elif re.fullmatch(r"[\w-]{1,40}", variant):
        names = [f".{variant}", f".{variant}{shard}", f"{shard}.{variant}"]
    else:
        raise invalid(f"The variant {variant!r:.50} is not a word, such as fp16.")
    return [f"{each}/{_STEMS[each]}{name}.safetensors" for each in components for name in names]


def _snapshot(repo: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AssetError(f"{repo} on the Hub: {reason}", "file_download_error") from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
