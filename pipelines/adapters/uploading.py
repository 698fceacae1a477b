"""The way of adapters from RAM to a GPU: beside its work, and in few copies."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pipelines.adapters.lora import LoraLayer


class Uploading:
    """To `device`; where that is no GPU nothing is moved. Used by one thread at a time."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._is_gpu = device is not None and device.type == "cuda"
        self._side: torch.cuda.Stream | None = None  # made when it is first needed

    @contextmanager
    def stream(self) -> Iterator[None]:
        """What is copied inside is there at the end, and the forwards under way run on meanwhile.

        It begins when the GPU has done what was asked of it before: that may still read what is written.
        """
        if not self._is_gpu:
            yield
            return
        self._side = self._side or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    def uploaded(self, layers: Mapping[str, LoraLayer]) -> Mapping[str, LoraLayer]:
        """The layers on the device, in the dtypes that they have. Tensors of one block come in one copy."""
        if not self._is_gpu:
            return layers
        return in_blocks(layers, lambda block: block.to(self._device, non_blocking=True))


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
