"""Which of a Hub repository's files a request means."""

import posixpath
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath

from pipelines.sd import repository
from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Choice = str | Mapping[str, str]  # one file; or several, by the names that they get in a folder

_USUAL_STEMS = {  # of the files that diffusers and transformers write
    AssetKind.LORA: "pytorch_lora_weights",
    AssetKind.CONTROLNET: "diffusion_pytorch_model",
    AssetKind.EASYCONTROL: "pytorch_lora_weights",
    AssetKind.EMBEDDING: "learned_embeds",
    AssetKind.IMAGE_ENCODER: "model",
}
_OTHER_STEMS = {"pytorch_model": "model"}  # what transformers calls the same weights as safetensors


def choose(repo: str, names: Collection[str], asset: Asset) -> Choice:
    """The files of `repo` that `asset` means, of the names that it has. Raises AssetError."""
    match asset.kind:
        case AssetKind.BASE:
            return _base(repo, names, asset.variant)
        case AssetKind.UNET:
            return _unet(repo, names, asset.variant)
        case AssetKind.IMAGE_ENCODER:
            return _with_config(names, _one(repo, names, asset))
        case _:
            return _one(repo, names, asset)


def _base(repo: str, names: Collection[str], variant: str | None) -> Choice:
    if "unet/config.json" not in names:
        raise unavailable(
            f"It has no diffusers model, of which unet/config.json would tell. {_hint(repo, names)}"
        )
    return {name: name for name in repository.wanted(names, variant)}


def _unet(repo: str, names: Collection[str], variant: str | None) -> Choice:
    """The folder unet/, or else the top."""
    folder = next((each for each in ("unet", "") if posixpath.join(each, "config.json") in names), None)
    if folder is None:
        raise unavailable(f"It has no UNet with a config.json. {_hint(repo, names)}")
    inside = [PurePosixPath(name).name for name in names if posixpath.dirname(name) == folder]
    picked = repository.pick(folder or "its top", inside, variant)
    return {name: posixpath.join(folder, name) for name in ("config.json", *picked)}


def _with_config(names: Collection[str], file: str) -> Choice:
    """The file with the config.json beside it, or alone if there is none."""
    config = posixpath.join(posixpath.dirname(file), "config.json")
    return {posixpath.basename(file): file, "config.json": config} if config in names else file


def _one(repo: str, names: Collection[str], asset: Asset) -> str:
    """The one safetensors file, in the folder and of the name that may be asked for."""
    path = _plain(posixpath.join(asset.folder or "", asset.file or ""))
    folder = posixpath.dirname(path) if asset.file else path
    found = [name for name in _weights(names) if posixpath.dirname(name) == folder]
    if asset.file:
        return _named(repo, path, names, found)
    if not found:
        raise unavailable(_nothing_in(folder, names))
    usual = posixpath.join(folder, _usual_name(asset))
    if usual in found:
        return usual
    if len(found) == 1 and not asset.variant:
        return found[0]
    problem = f"It has no variant {asset.variant}, which would be {usual}. " if asset.variant else ""
    raise unavailable(f"{problem}Say which file: {listed(f'{repo}/{name}' for name in found)}.")


def _named(repo: str, path: str, names: Collection[str], found: list[str]) -> str:
    """The file at `path`, or the safetensors beside what would be a pickle."""
    stem, suffix = posixpath.splitext(path)
    folder, name = posixpath.split(stem)
    stems = [stem]
    if suffix in PICKLES and name in _OTHER_STEMS:
        stems.append(posixpath.join(folder, _OTHER_STEMS[name]))
    meant = [path] if suffix not in PICKLES else [f"{each}.safetensors" for each in stems]
    chosen = next((each for each in meant if each in found), None)
    if chosen:
        return chosen
    path = path[:200]
    if suffix in PICKLES:
        problem = (
            f"{path} is a pickle, which is not loaded, and there is no {' or '.join(meant)[:500]} beside it."
        )
    else:
        problem = f"{path} is no safetensors file." if path in names else f"It has no {path}."
    there = f"What is there: {listed(f'{repo}/{each}' for each in found)}." if found else ""
    raise unavailable(f"{problem} {there or _nothing_in(folder, names)}")


def _usual_name(asset: Asset) -> str:
    variant = f".{asset.variant}" if asset.variant else ""
    return f"{_USUAL_STEMS.get(asset.kind, '')}{variant}.safetensors"


def _nothing_in(folder: str, names: Collection[str]) -> str:
    place = f"in {folder[:200]}" if folder else "at its top"
    pickles = any(name.endswith(PICKLES) and posixpath.dirname(name) == folder for name in names)
    hint = "Pickles (.bin, .pt, .ckpt) are not loaded." if pickles else "Name one as owner/repo/folder/file."
    return f"The repository has no .safetensors file {place}. {hint}"


def _hint(repo: str, names: Collection[str]) -> str:
    """What of a repository may be named instead."""
    files = [f"{repo}/{name}" for name in _weights(names)]
    if files:
        return f"Name one of its files: {listed(files)}."
    if any(name.endswith(PICKLES) for name in names):
        return "It has pickles (.bin, .pt, .ckpt), which are not loaded."
    return "It has no safetensors file."


def _weights(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def _plain(path: str) -> str:
    """As the names in a listing are written: "./models/" → "models". It is only compared with those."""
    plain = posixpath.normpath(path).strip("/")
    return "" if plain == "." else plain


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:20])


def unavailable(message: str) -> AssetError:
    """The error for a source that gives no weights."""
    return AssetError(message, "file_download_error")
