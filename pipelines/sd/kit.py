"""What a request to the universal endpoint has resident: its base model, and what acts beside it."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.adapters.bank import LoraUse
from pipelines.adapters.lora import Lora
from pipelines.adapters.residents import Wanted
from pipelines.base import Assets, named_by
from pipelines.sd.base import Base
from pipelines.sd.controlnet_file import INVALID_CONFIG, read_config
from pipelines.sd.image_encoder import ImageEncoder
from pipelines.sd.ip_adapter import IpAdapter, scales_of
from pipelines.sd.loading import UnfitUnet
from pipelines.sd.loras import hold_loras
from pipelines.sd.model import SdModel
from schemas.endpoints.lora_image_to_image import ControlNet, Input, IPAdapter
from schemas.errors import AssetError, Location


@dataclass(frozen=True, slots=True, eq=False)
class ScaledAdapter:
    """An IP-Adapter of a request, and its scale in each cross-attention module."""

    adapter: IpAdapter
    scales: tuple[float, ...]

    @property
    def acts(self) -> bool:
        return any(self.scales)


@dataclass(frozen=True, slots=True, eq=False)
class Kit:
    """The request's weights in the order of its fields, resident."""

    base: Base  # with IC-Light's offsets, if there are any
    loras: tuple[LoraUse, ...]
    controlnets: tuple[Any, ...]
    ip_adapters: tuple[ScaledAdapter, ...]
    encoder: ImageEncoder | None


def gather(model: SdModel, request: Input, assets: Assets, held: ExitStack) -> Kit:
    """Load what is not here and keep all of it until `held` is closed. May wait for room.

    The base comes first, then what is beside it all at once, then the LoRAs: in this order requests cannot
    wait for one another in a circle. Raises InputError with the path of the field that cannot be honoured.
    """
    base = _base(model, request, assets, held)
    return _Gathering(model, base, request, assets).kit(held)


def _base(model: SdModel, request: Input, assets: Assets, held: ExitStack) -> Base:
    unet = assets.weights.get(("body", "unet_name"))
    with named_by(("body", "model_name")):
        path = assets.weights["body", "model_name"]
        try:
            return model.hold_base(path, held, variant=request.variant, unet=unet)
        except UnfitUnet as error:
            raise error.at(("body", "unet_name")) from None


@dataclass(frozen=True, slots=True, eq=False)
class _Gathering:
    """One request's weights on their way in."""

    model: SdModel
    base: Base
    request: Input
    assets: Assets

    def kit(self, held: ExitStack) -> Kit:
        request = self.request
        scales = [self._scales(index, each) for index, each in enumerate(request.ip_adapter)]
        nets = [self._controlnet(index, each) for index, each in enumerate(request.controlnets)]
        adapters = [self._ip_adapter(index) for index, _ in enumerate(request.ip_adapter)]
        encoder, light = self._encoder(), self._ic_light()
        wanted = {
            "controlnets": nets,
            "ip_adapter": adapters,
            "image_encoder_path": [encoder] if encoder else [],
            "ic_light_model_url": [light] if light else [],
        }
        first = next((field for field, named in wanted.items() if named), "model_name")
        with named_by(("body", first)):  # if they are too many together
            everything = dict(each for named in wanted.values() for each in named)
            found = held.enter_context(self.model.adapters.holding(everything))
        base: Base = found[light[0]] if light else self.base
        scaled = [ScaledAdapter(found[name], each) for (name, _), each in zip(adapters, scales, strict=True)]
        return Kit(
            base,
            hold_loras(
                self.model, base, self.request.loras, self.assets, held, others=self._of_faces(scaled)
            ),
            tuple(found[name] for name, _ in nets),
            tuple(scaled),
            found[encoder[0]] if encoder else None,
        )

    def _controlnet(self, index: int, wish: ControlNet) -> "_Named":
        loc: Location = ("body", "controlnets", index)
        path = self.assets.weights[*loc, "path"]
        text = self.assets.configs.get((*loc, "config_url"), b"")

        def load() -> Any:
            try:
                return self.base.load_controlnet(path, read_config(text) if text else None)
            except AssetError as error:
                field = "config_url" if error.kind == INVALID_CONFIG else "path"
                raise error.at((*loc, field)) from None

        name = f"{path} controlnet {self.base.name} {sha256(text).hexdigest()}"
        return name, self._wanted(path, (*loc, "path"), load)

    def _ip_adapter(self, index: int) -> "_Named":
        loc: Location = ("body", "ip_adapter", index, "path")
        path = self.assets.weights[loc]
        load = partial(self.base.load_ip_adapter, path)
        return f"{path} ip_adapter {self.base.name}", self._wanted(path, loc, load)

    def _encoder(self) -> "_Named | None":
        loc: Location = ("body", "image_encoder_path")
        path = self.assets.weights.get(loc)
        if path is None or not self.request.ip_adapter:
            return None
        load = partial(self.model.load_image_encoder, path)
        return f"{path} image_encoder", self._wanted(path, loc, load)

    def _ic_light(self) -> "_Named | None":
        """The base with IC-Light's offsets."""
        loc: Location = ("body", "ic_light_model_url")
        path = self.assets.weights.get(loc)
        if path is None:
            return None
        name = f"{path} {self.base.name}"

        def load() -> Base:
            return self.base.lit_anew(name, self.base.read_ic_light(path))

        return name, self._wanted(path, loc, load)

    def _wanted(self, path: Path, loc: Location, load: Callable[[], Any]) -> Wanted[Any]:
        def measure() -> int:
            with named_by(loc):
                return self.model.nbytes_of(path)

        def load_named() -> Any:
            with named_by(loc):
                return load()

        return Wanted(measure, load_named)

    def _scales(self, index: int, wish: IPAdapter) -> tuple[float, ...]:
        with named_by(("body", "ip_adapter", index, "scale_json")):
            return scales_of(wish.scale, wish.scale_json, self.base.cross_attention)

    def _of_faces(self, adapters: list[ScaledAdapter]) -> dict[str, Lora]:
        """The LoRAs that belong to adapters of faces, each once."""
        return {
            f"of {self.assets.weights['body', 'ip_adapter', index, 'path'].name}": each.adapter.lora
            for index, each in enumerate(adapters)
            if each.adapter.lora and each.acts
        }


_Named = tuple[str, Wanted[Any]]
