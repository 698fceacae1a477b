"""What texts and pictures were encoded to, in case they come again, from whomever."""

from collections.abc import Callable, Hashable
from hashlib import sha256
from typing import Generic

from PIL.Image import Image as Picture
from torch import Tensor

from pipelines.adapters.cache import Cache, V
from schemas.settings import ModelSettings


class Encodings(Generic[V]):
    """Encoded texts and pictures by what they were made of. They are shared, so nobody may change them.

    Every name holds what the value depends on: the content, the encoder, and what acts in it.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self.texts: Cache[Hashable, V] = Cache(settings.text_cache_bytes)
        self._pictures: Cache[Hashable, Tensor] = Cache(settings.picture_cache_bytes)

    def picture(self, encoder: Hashable, picture: Picture, encode: Callable[[Picture], Tensor]) -> Tensor:
        """What `encode` makes of a picture, with the encoder that `encoder` stands for."""
        name = encoder, picture.mode, picture.size, sha256(picture.tobytes()).digest()
        return self._pictures.get(name, lambda: encode(picture))
