"""Everything that is trained, each thing once and from what it needs, and how it is saved."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from diffusers import FluxPriorReduxPipeline

from pipelines.zoo.training import (
    autoencoder,
    controlnet,
    flux,
    inversion,
    ip_adapter,
    lora,
    stable_diffusion,
    text,
    vision,
)
from pipelines.zoo.training.loop import Report
from pipelines.zoo.training.stable_diffusion import Kind

# Steps of each training.
STEPS = {
    "vae16": 2400,
    "vae4": 700,
    "clip": 400,
    "t5": 500,
    "flux": 1900,
    "flux-guided": 60,
    "sd15": 1200,
    "sdxl": 4000,
    "lora": 400,
    "sd15-outline": 1200,
    "sd15-stripes": 500,
    "sdxl-outline": 900,
    "sdxl-stripes": 600,
    "canny": 900,
    "checker": 500,
    "redux": 250,
    "clip-vision": 400,
    "ip-adapter": 300,
    "word": 400,
}


_FEW = 400  # scenes, for what is learned beside a trained model
_SLOW = 0.006  # the rate of UNets' LoRAs: at the transformer's the loss goes up and down
_LATE = {"outline": 2.0, "stripes": 0.5}  # see stable_diffusion.case: stripes are of the last steps' making


class Workshop:
    """Trains what is asked for, and what that needs. Checkpoints lie in `folder`; a run goes on from them."""

    def __init__(self, folder: Path, report: Report, device: str = "cpu") -> None:
        self._where = (folder, report, device)
        self._device = device

    def build(self, name: str, folder: Path) -> None:
        """Fill an empty folder with the model of this name. Raises KeyError for an unknown one."""
        MODELS[name](self, folder)

    @cached_property
    def vae16(self) -> Any:
        return autoencoder.train(16, STEPS["vae16"], *self._where)

    @cached_property
    def vae4(self) -> Any:
        return autoencoder.train(4, STEPS["vae4"], *self._where, start=self.vae16)

    @cached_property
    def clip(self) -> Any:
        return text.train_clip(STEPS["clip"], *self._where)

    @cached_property
    def t5(self) -> Any:
        return text.train_t5(STEPS["t5"], *self._where)

    @cached_property
    def transformer(self) -> Any:
        lesson = cache(self._flux_lesson)
        taught = flux.train(lesson, STEPS["flux"], *self._where)
        return flux.distil(taught, lesson, STEPS["flux-guided"], *self._where)

    @cached_property
    def sd15_unet(self) -> Any:
        return self._unet("sd15")

    @cached_property
    def sdxl_unet(self) -> Any:
        return self._unet("sdxl", start=self.sd15_unet)

    def flux_lora(self, style: str) -> lora.LowRank:
        # its hooks stay with the model, so the model is one of its own
        transformer = _copy(self.transformer)
        lesson = cache(partial(self._flux_lesson, style, _FEW))
        loss = flux.lora_loss(transformer, lesson)
        return lora.train(f"flux-{style}", transformer, loss, STEPS["lora"], *self._where)

    def sd_lora(self, kind: Kind, style: str) -> lora.LowRank:
        unet = _copy(self.sd15_unet if kind == "sd15" else self.sdxl_unet)
        lesson = cache(partial(self._sd_lesson, kind, style, _FEW))
        loss = stable_diffusion.loss_of(unet, lesson, count=24, late=_LATE[style])
        name = f"{kind}-{style}"
        return lora.train(name, unet, loss, STEPS[name], *self._where, rate=_SLOW)

    def flux_canny(self) -> Any:
        lesson = cache(partial(self._flux_lesson, count=_FEW))
        return controlnet.train_flux(
            _copy(self.transformer), lesson, self.vae16, STEPS["canny"], *self._where
        )

    def sd_canny(self, kind: Kind) -> Any:
        unet = _copy(self.sd15_unet if kind == "sd15" else self.sdxl_unet)
        lesson = cache(partial(self._sd_lesson, kind, count=_FEW))
        return controlnet.train_sd(unet, lesson, STEPS["canny"], *self._where, name=f"{kind}-canny")

    @cached_property
    def image_encoder(self) -> Any:
        return vision.train_clip_vision(STEPS["clip-vision"], *self._where)

    def ip_adapter(self, kind: Kind) -> ip_adapter.Adapter:
        unet = _copy(self.sd15_unet if kind == "sd15" else self.sdxl_unet)
        lesson = cache(partial(self._sd_lesson, kind, count=_FEW))
        steps, name = STEPS["ip-adapter"], f"{kind}-ip-adapter"
        return ip_adapter.train(unet, lesson, self.image_encoder, steps, *self._where, name=name)

    def word(self) -> Any:
        return inversion.train(_copy(self.sd15_unet), self.clip, self.vae4, STEPS["word"], *self._where)

    def checker(self) -> Any:
        return vision.train_checker(STEPS["checker"], *self._where)

    def redux(self) -> tuple[Any, Any]:
        return vision.train_redux(self.t5, STEPS["redux"], *self._where)

    def _unet(self, kind: Kind, start: Any = None) -> Any:
        lesson = cache(partial(self._sd_lesson, kind))
        return stable_diffusion.train(kind, lesson, STEPS[kind], *self._where, start=start)

    def _flux_lesson(self, style: str = "plain", count: int = flux.SCENES) -> flux.Lesson:
        encoders = flux.Encoders(text.plain(self.clip), self.t5, self._device)
        return flux.lesson(self.vae16, encoders, self._device, style, count)

    def _sd_lesson(
        self, kind: Kind, style: str = "plain", count: int = stable_diffusion.SCENES
    ) -> stable_diffusion.Lesson:
        return stable_diffusion.lesson(kind, self.vae4, self.clip, self._device, style, count)


def _copy(model: Any) -> Any:
    copied = type(model).from_config(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.to(model.device).eval()


def _half(model: Any) -> Any:
    """A copy on the CPU in float16, as all are shipped."""
    return deepcopy(model).cpu().half()


def _flux(shop: Workshop, folder: Path) -> None:
    parts = (shop.clip, shop.t5, shop.vae16, shop.transformer)
    flux.pipeline(*map(_half, parts)).save_pretrained(folder)


def _sd(kind: Kind, shop: Workshop, folder: Path) -> None:
    unet = shop.sd15_unet if kind == "sd15" else shop.sdxl_unet
    parts = (shop.clip, shop.vae4, unet)
    stable_diffusion.pipeline(kind, *map(_half, parts)).save_pretrained(folder)


def _file(folder: Path) -> Path:
    """A LoRA's; servers tell weights apart by their files' names."""
    return folder / f"{folder.name}.safetensors"


def _flux_lora(style: str, shop: Workshop, folder: Path) -> None:
    lora.save(shop.flux_lora(style), "transformer", _file(folder))


def _sd_lora(kind: Kind, style: str, shop: Workshop, folder: Path) -> None:
    lora.save(shop.sd_lora(kind, style), "unet", _file(folder))


def _flux_canny(shop: Workshop, folder: Path) -> None:
    _half(shop.flux_canny()).save_pretrained(folder)


def _sd_canny(kind: Kind, shop: Workshop, folder: Path) -> None:
    _half(shop.sd_canny(kind)).save_pretrained(folder)


def _ip_adapter(kind: Kind, shop: Workshop, folder: Path) -> None:
    """The adapter, and beside it the image encoder that it reads."""
    ip_adapter.save(shop.ip_adapter(kind), folder / "ip_adapter.safetensors")
    _half(shop.image_encoder).save_pretrained(folder / "image_encoder")


def _word(shop: Workshop, folder: Path) -> None:
    inversion.save(shop.word(), folder / "embedding.safetensors")


def _checker(shop: Workshop, folder: Path) -> None:
    _half(shop.checker()).save_pretrained(folder / "safety_checker")
    vision.clip_processor().save_pretrained(folder / "feature_extractor")


def _redux(shop: Workshop, folder: Path) -> None:
    encoder, embedder = map(_half, shop.redux())
    processor = vision.siglip_processor()
    FluxPriorReduxPipeline(
        image_encoder=encoder, feature_extractor=processor, image_embedder=embedder
    ).save_pretrained(folder)


# What is shipped: its name, and what fills its folder.
MODELS: dict[str, Callable[[Workshop, Path], None]] = {
    "flux-world": _flux,
    "sd15-world": partial(_sd, "sd15"),
    "sdxl-world": partial(_sd, "sdxl"),
    "sdxl-world-canny": partial(_sd_canny, "sdxl"),
    "flux-world-outline": partial(_flux_lora, "outline"),
    "flux-world-stripes": partial(_flux_lora, "stripes"),
    "flux-world-redux": _redux,
    "world-safety-checker": _checker,
    "flux-world-canny": _flux_canny,
    "sd15-world-outline": partial(_sd_lora, "sd15", "outline"),
    "sd15-world-stripes": partial(_sd_lora, "sd15", "stripes"),
    "sdxl-world-outline": partial(_sd_lora, "sdxl", "outline"),
    "sdxl-world-stripes": partial(_sd_lora, "sdxl", "stripes"),
    "sd15-world-canny": partial(_sd_canny, "sd15"),
    "sd15-world-ip-adapter": partial(_ip_adapter, "sd15"),
    "sd15-world-word": _word,
}
