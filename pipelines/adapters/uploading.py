"""The way of adapters from RAM to a GPU: in few copies."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipelines.adapters.lora import LoraLayer


def uploaded(layers: Mapping[str, LoraLayer], device: torch.device) -> Mapping[str, LoraLayer]:
    """The layers on a GPU, in the dtypes that they have; elsewhere nothing is moved."""
    return layers if device.type != "cuda" else in_blocks(layers, lambda block: block.to(device))


def in_blocks(layers: Mapping[str, LoraLayer], moved: Callable[[Tensor], Tensor]) -> Mapping[str, LoraLayer]:
    """The layers as views of what `moved` makes of the blocks of memory (uint8) that they lie in."""
    blocks: dict[int, tuple[Tensor, Tensor]] = {}  # by address: it, and what became of it

    def there(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            storage = tensor.untyped_storage()
        if storage.data_ptr() not in blocks:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            blocks[storage.data_ptr()] = whole, moved(whole)
        start = tensor.storage_offset() * tensor.itemsize
        part = blocks[storage.data_ptr()][1][start : start + tensor.nbytes]
        return part.view(tensor.dtype).view(tensor.shape)

    return {
        name: replace(
            layer,
            down=there(layer.down),
            up=there(layer.up),
            bias=None if layer.bias is None else there(layer.bias),
        )
        for name, layer in layers.items()
    }
