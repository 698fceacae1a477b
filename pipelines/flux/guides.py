"""What a request gives the model to look at, made into what a denoising's rows are given."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture
from torch import Tensor

from pipelines import images, preprocess
from pipelines.adapters.residents import Wanted
from pipelines.adapters.tensor_file import invalid
from pipelines.base import Assets, named_by
from pipelines.flux import easycontrol
from pipelines.flux.controlnet import MODES, ControlUse, modes, reads_pixels
from pipelines.flux.controlnet_file import INVALID_CONFIG, ControlNetConfig, read_config
from pipelines.flux.lora_keys import WIDE
from pipelines.flux.model import FluxModel
from pipelines.flux.pipeline import FoundLora
from pipelines.flux.plan import Attended, Reference
from pipelines.flux.sampling import Grid, draw_noise
from pipelines.timed import Timed
from schemas.endpoints.flux_general_rf_inversion import (
    Control,
    ControlLoraWeight,
    ControlNet,
    ControlNetUnion,
    ControlNetUnionInput,
    EasyControlWeight,
)
from schemas.errors import AssetError, Location

REFERENCE_SEED = 0x5EED0F11FE  # of the noise that references are seen through, the same for all of them


@dataclass(frozen=True, slots=True)
class _Net:
    """A ControlNet of a request, read as far as its name, and its control images with their fields."""

    loc: Location
    name: str
    path: Path
    config: ControlNetConfig | None
    is_union: bool
    controls: tuple[tuple[Location, Control], ...]


class GuideReader:
    """Reads the guides of one request for pictures of one grid; `held` keeps what they need resident.

    Raises InputError with the path of the field that cannot be honoured.
    """

    def __init__(self, model: FluxModel, assets: Assets, grid: Grid, held: ExitStack) -> None:
        self._model = model
        self._assets = assets
        self._grid = grid
        self._held = held

    def embedding(self, found: Sequence[FoundLora], wishes: Sequence[ControlLoraWeight]) -> Tensor | None:
        """What control LoRAs add to the embedded latents together: [tokens, width]."""
        each = [
            self._embedding(lora, wish) for lora, wish in zip(found, wishes, strict=True) if lora.use.scale
        ]
        return sum(each[1:], each[0]) if each else None

    def controls(
        self, nets: Sequence[ControlNet], unions: Sequence[ControlNetUnion]
    ) -> tuple[Timed[ControlUse], ...]:
        """ControlNets, resident, each with its control images. One at scale 0 is checked and left out."""
        return tuple(
            Timed(use, control.start_percentage, control.end_percentage)
            for net, loaded in self.hold_nets(nets, unions)
            for loc, control in net.controls
            if (use := self._control(loaded, net, loc, control)).scale
        )

    def hold_nets(
        self, nets: Sequence[ControlNet], unions: Sequence[ControlNetUnion]
    ) -> list[tuple[_Net, Any]]:
        """The ControlNets and their networks, resident. May wait for room."""
        found = [self._net("controlnets", index, net) for index, net in enumerate(nets)]
        found += [self._net("controlnet_unions", index, net) for index, net in enumerate(unions)]
        with named_by(found[0].loc[:2] if found else ("body",)):
            loaded = self._held.enter_context(
                self._model.adapters.holding({net.name: self._wanted(net) for net in found})
            )
        return [(net, loaded[net.name]) for net in found]

    def conditions(self, wishes: Sequence[EasyControlWeight]) -> tuple[Attended, ...]:
        """EasyControl's conditions. One at scale 0 is checked and left out."""
        found = [self._condition(("body", "easycontrols", index), wish) for index, wish in enumerate(wishes)]
        return tuple(Attended(condition) for condition in found if condition.scale)

    def reference(self, strength: float, start: float, end: float) -> Timed[Reference] | None:
        """The picture to be like, of the field reference_image_url, if there is one and it counts."""
        picture = self._assets.images.get(("body", "reference_image_url"))
        if picture is None or not strength:
            return None
        latents = self._model.encode_image(picture, self._grid)
        noise = self._model.to_device(draw_noise(self._grid, REFERENCE_SEED))
        return Timed(Reference(latents, noise, strength), start, end)

    def _embedding(self, found: FoundLora, wish: ControlLoraWeight) -> Tensor:
        picture = self._fitted((*found.loc, "control_image_url"))
        if wish.preprocess == "canny":
            picture = preprocess.canny(picture)
        if wish.preprocess == "depth":
            with named_by((*found.loc, "preprocess")):
                picture = self._model.depth_of(picture)
        tokens = self._model.as_weights(self._model.encode_image(picture, self._grid))
        return found.lora.control_embedding(tokens, found.use.scale_at(WIDE))

    def _fitted(self, loc: Location) -> Picture:
        return images.fill(self._assets.images[loc], self._grid.width, self._grid.height)

    def _net(self, field: str, index: int, wish: ControlNet | ControlNetUnion) -> _Net:
        loc: Location = ("body", field, index)
        path = self._assets.weights[*loc, "path"]
        text = self._assets.configs.get((*loc, "config_url"), b"")
        with named_by((*loc, "config_url")):
            config = read_config(text) if text else None
        if isinstance(wish, ControlNetUnion):
            controls = tuple(((*loc, "controls", at), each) for at, each in enumerate(wish.controls))
            return _Net(loc, _name(path, text), path, config, True, controls)
        return _Net(loc, _name(path, text), path, config, False, ((loc, wish),))

    def _wanted(self, net: _Net) -> Wanted[Any]:
        return Wanted(partial(self._measure, net), partial(self._load, net))

    def _measure(self, net: _Net) -> int:
        with named_by((*net.loc, "path")):
            return self._model.nbytes_of(net.path)

    def _load(self, net: _Net) -> Any:
        try:
            return self._model.load_controlnet(net.path, net.config)
        except AssetError as error:
            field = "config_url" if error.kind == INVALID_CONFIG else "path"
            raise error.at((*net.loc, field)) from None

    def _control(self, loaded: Any, net: _Net, loc: Location, control: Control) -> ControlUse:
        with named_by((*net.loc, "path")):
            _check_kind(loaded, net.is_union)
        return ControlUse(
            loaded,
            self._control_image(loaded, (*loc, "control_image_url")),
            control.conditioning_scale,
            self._mask(loc, control),
            _mode(loaded, loc, control),
        )

    def _control_image(self, loaded: Any, loc: Location) -> Tensor:
        picture = self._assets.images[loc]
        if reads_pixels(loaded):
            return self._model.pixels(picture, self._grid)
        return self._model.as_weights(self._model.encode_image(picture, self._grid))

    def _mask(self, loc: Location, control: Control) -> Tensor | None:
        mask = self._assets.images.get((*loc, "mask_image_url"))
        if mask is None:
            return None
        image = self._assets.images[*loc, "control_image_url"]
        if mask.size != image.size:
            message = f"The mask is {_size(mask)}; it must have the control image's size, {_size(image)}."
            raise AssetError(message, "image_size_mismatch").at((*loc, "mask_image_url"))
        shape = self._grid.columns, self._grid.rows
        return self._model.as_weights(images.mask(mask, *shape, control.mask_threshold).view(-1, 1))

    def _condition(self, loc: Location, wish: EasyControlWeight) -> easycontrol.Condition:
        with named_by((*loc, "control_method_url")):
            method = self._model.read_easycontrol(self._assets.weights[*loc, "control_method_url"])
        pixels = easycontrol.fit(self._assets.images[*loc, "image_url"], wish.image_control_type)
        grid = Grid.of(pixels.shape[-1], pixels.shape[-2])
        return easycontrol.Condition(
            self._model.encode_pixels(pixels),
            easycontrol.position_ids(wish.image_control_type, grid, self._grid),
            method,
            wish.scale,
        )


def _name(path: Path, config: bytes) -> str:
    """Equal names mean the same network."""
    return f"{path.name} {sha256(config).hexdigest()}" if config else path.name


def _check_kind(loaded: Any, is_union: bool) -> None:
    if modes(loaded) and not is_union:
        raise invalid("The ControlNet has several modes; list it in controlnet_unions with a control_mode.")


def _mode(loaded: Any, loc: Location, control: Control) -> int | None:
    """The number of the control's mode in a net that has modes; such as have none take any."""
    known = modes(loaded)
    if known is None or not isinstance(control, ControlNetUnionInput):
        return None
    mode = MODES[control.control_mode]
    if mode >= known:
        message = f"The ControlNet has {known} modes; {control.control_mode} is number {mode}, from 0."
        raise invalid(message).at((*loc, "control_mode"))
    return mode


def _size(picture: Picture) -> str:
    return f"{picture.width} × {picture.height}"
