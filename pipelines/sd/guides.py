"""What a request to the universal endpoint gives the model to look at, made into what rows are given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as Picture
from torch import Tensor

from pipelines import images
from pipelines.base import Assets, named_by
from pipelines.faces import Face
from pipelines.sd.controlnet import ControlUse, pools
from pipelines.sd.grid import CHANNELS, Grid
from pipelines.sd.image_attention import ImagePrompt
from pipelines.sd.image_encoder import ImageEncoder
from pipelines.sd.ip_adapter import IpAdapter
from pipelines.sd.kit import Kit
from pipelines.sd.model import SdModel
from pipelines.sd.plan import Side
from pipelines.sd.text import Encoding
from pipelines.timed import Timed
from schemas.endpoints.lora_image_to_image import ControlNet, Input, IPAdapter
from schemas.errors import AssetError, Location


class GuideReader:
    """Reads the guides of one request for pictures of one grid, all but noise once.

    Raises InputError with the path of the field that cannot be honoured.
    """

    def __init__(self, model: SdModel, kit: Kit, request: Input, assets: Assets, grid: Grid) -> None:
        self._model = model
        self._kit = kit
        self._request = request
        self._assets = assets
        self._grid = grid
        self._controls = [self._control(index, wish) for index, wish in enumerate(request.controlnets)]
        self._masks = [self._picture_mask(index) for index, _ in enumerate(request.ip_adapter)]
        self._shown = self._look([self._tokens(index, wish) for index, wish in enumerate(request.ip_adapter)])
        self._nothing = self._look_at_nothing(seed=0) if not self._shows_noise else None

    def sides(self, prompt: Encoding, negative: Encoding, seed: int) -> tuple[Side, Side]:
        """All that steers the prompt's row, and the other, of the picture of a seed."""
        nothing = self._nothing or self._look_at_nothing(seed)
        everywhere = [each for each in self._controls if not (each.use.guess or pools(each.use.net))]
        return (
            Side(
                prompt,
                tuple(each.reading(self._shown.tokens) for each in self._controls),
                self._shown.prompts,
            ),
            Side(negative, tuple(each.reading(nothing.tokens) for each in everywhere), nothing.prompts),
        )

    def beside(self) -> Tensor | None:
        """What IC-Light reads beside the latents: the foreground, and the background if it reads one."""
        fields = ("ic_light_image_url", "ic_light_model_background_image_url")
        count = self._kit.base.channels // CHANNELS - 1
        for field in fields[count:]:
            if count and ("body", field) in self._assets.images:
                message = "This IC-Light model reads no background: leave it out, or name the one that does."
                raise AssetError(message, "value_error").at(("body", field))
        pictures = [self._light(field) for field in fields[:count]]
        latents = [self._kit.base.encode_image(picture, self._grid) for picture in pictures]
        return torch.cat(latents) if latents else None

    def _light(self, field: str) -> Picture:
        picture = self._assets.images.get(("body", field))
        if picture is None:
            raise AssetError("This IC-Light model reads a picture here.", "missing").at(("body", field))
        return picture

    def _control(self, index: int, wish: ControlNet) -> "_Control":
        loc: Location = ("body", "controlnets", index)
        picture = self._assets.images[*loc, "image_url"]
        pixels = images.to_tensor(images.fill(picture, self._grid.width, self._grid.height))
        mask = self._mask((*loc, "mask_url"), [picture], self._grid.width, self._grid.height)
        use = ControlUse(
            self._kit.controlnets[index],
            self._kit.base.as_weights((pixels + 1) / 2),
            wish.conditioning_scale,
            mask,
            self._request.controlnet_guess_mode,
        )
        return _Control(use, wish)

    @property
    def _shows_noise(self) -> bool:
        return any(wish.unconditional_noising_factor for wish in self._request.ip_adapter)

    def _tokens(self, index: int, wish: IPAdapter) -> Tensor:
        """The tokens of an IP-Adapter's pictures: [tokens, width of the text]."""
        loc: Location = ("body", "ip_adapter", index)
        adapter = self._kit.ip_adapters[index].adapter
        encoder = self._encoder(adapter)
        with named_by(("body", "image_encoder_path")):
            tokens = [
                adapter.tokens(
                    encoder.features(picture) if encoder else None,
                    self._face(loc, wish, adapter, picture),
                    shortcut=wish.image_projection_shortcut,
                )
                for picture in self._pictures(loc, wish)
            ]
        return torch.cat(tokens)

    def _look_at_nothing(self, seed: int) -> "_Look":
        """What the row without pictures is shown in their place; `seed` is of noise, where that is it."""
        tokens = []
        for scaled, wish in zip(self._kit.ip_adapters, self._request.ip_adapter, strict=True):
            encoder = self._encoder(scaled.adapter)
            generator = torch.Generator("cpu").manual_seed(seed)
            factor = wish.unconditional_noising_factor
            nothing = encoder.negative(factor, generator) if encoder else None
            tokens.append(scaled.adapter.negative_tokens(nothing, shortcut=wish.image_projection_shortcut))
        return self._look(tokens)

    def _look(self, tokens: Sequence[Tensor]) -> "_Look":
        """Tokens for each IP-Adapter, and what rows look at; an adapter that acts nowhere is left out."""
        prompts = (
            ImagePrompt(scaled.adapter.pairs(shown), scaled.scales, mask)
            for scaled, shown, mask in zip(self._kit.ip_adapters, tokens, self._masks, strict=True)
            if scaled.acts
        )
        return _Look(tokens, tuple(prompts))

    def _pictures(self, loc: Location, wish: IPAdapter) -> list[Picture]:
        field: Location = (*loc, "ip_adapter_image_url")
        urls = wish.ip_adapter_image_url
        locs = [field] if isinstance(urls, str) else [(*field, number) for number in range(len(urls))]
        return [self._assets.images[each] for each in locs]

    def _picture_mask(self, index: int) -> Tensor | None:
        loc: Location = ("body", "ip_adapter", index)
        pictures = self._pictures(loc, self._request.ip_adapter[index])
        return self._mask((*loc, "ip_adapter_mask_url"), pictures, self._grid.columns, self._grid.rows)

    def _encoder(self, adapter: IpAdapter) -> ImageEncoder | None:
        """The image encoder, if the adapter needs it."""
        if not adapter.reads.clip:
            return None
        if self._kit.encoder is None:
            message = "This IP-Adapter reads pictures through an image encoder: name the one it was made for."
            raise AssetError(message, "missing").at(("body", "image_encoder_path"))
        return self._kit.encoder

    def _face(self, loc: Location, wish: IPAdapter, adapter: IpAdapter, picture: Picture) -> Tensor | None:
        """The largest face in a picture as the adapter reads it, if it does."""
        if adapter.reads.face is None:
            return None
        face = self._largest(loc, picture)
        if face is None:
            message = "No face was found in the picture; give one that shows a face, upright and large."
            raise AssetError(message, "face_detection_error").at((*loc, "ip_adapter_image_url"))
        return face.normed if adapter.reads.normed_face else face.embedding

    def _largest(self, loc: Location, picture: Picture) -> Face | None:
        field: Location = (*loc, "insight_face_model_path")
        folder = self._assets.weights.get(field)
        if folder is None:
            message = "This IP-Adapter reads a face: name the face analysis that finds it."
            raise AssetError(message, "missing").at(field)
        with named_by(field):
            return self._model.faces(folder).largest(picture)

    def _mask(self, loc: Location, pictures: Sequence[Picture], width: int, height: int) -> Tensor | None:
        """A mask fitted as the pictures are, whose size it must have: [1, height, width] in [0, 1]."""
        mask = self._assets.images.get(loc)
        if mask is None:
            return None
        for picture in pictures:
            if picture.size != mask.size:
                sizes = [f"{each.width} × {each.height}" for each in (mask, picture)]
                message = f"The mask is {sizes[0]}; it must have its image's size, {sizes[1]}."
                raise AssetError(message, "image_size_mismatch").at(loc)
        fitted = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.BILINEAR)
        return self._kit.base.as_weights(torch.from_numpy(np.asarray(fitted).copy())[None] / 255)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """The tokens of each IP-Adapter, and what a row looks at."""

    tokens: Sequence[Tensor]
    prompts: tuple[ImagePrompt, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Control:
    """A ControlNet's use, and the request's words about it."""

    use: ControlUse
    wish: ControlNet

    def reading(self, tokens: Sequence[Tensor]) -> Timed[ControlUse]:
        """The use in its steps; where the request says so it reads an IP-Adapter's tokens for the text."""
        index = self.wish.ip_adapter_index
        use = self.use if index is None else replace(self.use, text=tokens[index])
        return Timed(use, self.wish.start_percentage, self.wish.end_percentage)
