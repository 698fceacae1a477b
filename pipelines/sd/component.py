"""A module made without values by its config, and filled from files once they are known to fit it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings, CLIPVisionEmbeddings

from pipelines.adapters.tensor_file import check_finite, invalid, listed
from pipelines.sd.checkpoints import Stored


@dataclass(frozen=True, slots=True)
class Component:
    """A module without values, and where its values are."""

    name: str
    module: Any
    stored: Stored

    def check(self) -> None:
        """Raise AssetError unless the tensors on disk are those of the module, each in its shape."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        found = self.stored.shapes()
        unknown, missing = found.keys() - expected.keys(), expected.keys() - found.keys()
        if unknown:
            raise invalid(f"The {self.name} has no place for {listed(sorted(unknown))}.")
        if missing:
            raise invalid(f"The {self.name} is not complete. It lacks {listed(sorted(missing))}.")
        for name, shape in found.items():
            if shape != expected[name]:
                raise invalid(
                    f"The {self.name} does not fit its config: {name} has the shape {list(shape)} "
                    f"where {list(expected[name])} is expected."
                )

    def filled(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The module with its values, which must be finite in `dtype`."""
        tensors = self.stored.load()
        for name in tensors:
            tensors[name] = tensors[name].to(device, dtype)
        check_finite(tensors)
        self.module.load_state_dict(tensors, assign=True)
        for part in self.module.modules():
            if isinstance(part, CLIPTextEmbeddings | CLIPVisionEmbeddings):  # a buffer that is not in files
                part.position_ids = torch.arange(part.position_embedding.num_embeddings, device=device)[None]
        return self.module.eval().requires_grad_(False)


# What diffusers and transformers raise for settings that do not go together. Nothing is allocated meanwhile.
_MISCONFIGURED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


def made(name: str, make: Callable[[], Any]) -> Any:
    """What `make` makes of a config of this name, such as "model's unet", without values.

    Raises AssetError for settings that do not go together.
    """
    try:
        with torch.device("meta"):
            return make()
    except _MISCONFIGURED as error:
        raise invalid(f"The config of the {name} is not usable: {str(error)[:300]}") from error


_MOST = 1 << 17  # any size; CLIP's vocabulary has 49,408 words
_MOST_LAYERS = 64  # of one kind in one block; SDXL's second text encoder has 32
_MOST_BLOCKS = 8  # entries in a list; UNets and VAEs have 3 or 4 blocks


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Raise AssetError for numbers that would make a module larger than any real one."""
    for key, value in config.items():
        most = _MOST_LAYERS if "layers" in key else _MOST
        if any(not 0 <= number <= most for number in _numbers(value)):
            raise invalid(f"The config of the {name} is not usable: {key[:80]} is {str(value)[:80]}.")


def _numbers(value: Any, depth: int = 0) -> Iterator[int]:
    """The whole numbers in a value; a list that is too long or deep yields one that is refused."""
    if isinstance(value, list | tuple):
        if len(value) > _MOST_BLOCKS or depth > 2:
            yield -1
        else:
            for each in value:
                yield from _numbers(each, depth + 1)
    elif isinstance(value, int):
        yield value
