"""An IP-Adapter for Stable Diffusion: pictures in the place of words, beside a frozen UNet."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss, scaled_dot_product_attention

from pipelines.sd.image_attention import cross_attention
from pipelines.zoo.training import stable_diffusion, text, vision
from pipelines.zoo.training.loop import Draw, Job, Report, fit

_TOKENS = 4
_UNSEEN = 0.1


class Adapter(nn.Module):
    """A projection of a picture's embedding to tokens, and keys and values of them for each attention."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        torch.manual_seed(14)
        width = unet.config.cross_attention_dim
        self.projection = ImageProjection(text.WIDTH, width, _TOKENS)
        names = cross_attention(unet)
        inner = [unet.get_submodule(name).to_q.out_features for name in names]
        self.keys = nn.ModuleList(nn.Linear(width, each, bias=False) for each in inner)
        self.values = nn.ModuleList(nn.Linear(width, each, bias=False) for each in inner)

    def tensors(self) -> dict[str, Tensor]:
        """Named as in published files: attention modules count with the self-attention between them."""
        found = {
            "image_proj.proj.weight": self.projection.image_embeds.weight,
            "image_proj.proj.bias": self.projection.image_embeds.bias,
            "image_proj.norm.weight": self.projection.norm.weight,
            "image_proj.norm.bias": self.projection.norm.bias,
        }
        for number, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            found[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"] = key.weight
            found[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] = value.weight
        return {name: each.detach().half().cpu().contiguous() for name, each in found.items()}


class _Beside(AttnProcessor2_0):  # type: ignore[misc]
    """What the queries find in the text, and what they find in the picture."""

    def __init__(self, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self._key, self._value = key, value
        self.tokens: Tensor | None = None  # [rows, tokens, width]

    def __call__(self, attn: Any, hidden_states: Tensor, *inputs: Any, **named: Any) -> Tensor:
        in_text: Tensor = super().__call__(attn, hidden_states, *inputs, **named)
        assert self.tokens is not None
        query, key, value = attn.to_q(hidden_states), self._key(self.tokens), self._value(self.tokens)
        heads = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value))
        seen = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return in_text + linear(seen, attn.to_out[0].weight)


def train(
    unet: Any,
    lesson: Callable[[], stable_diffusion.Lesson],
    encoder: Any,
    steps: int,
    folder: Path,
    report: Report,
    device: str,
    name: str,
) -> Adapter:
    """An adapter under which the UNet draws the picture that the encoder is shown."""
    unet.requires_grad_(False)
    adapter = Adapter(unet).to(device)
    pairs = zip(cross_attention(unet), adapter.keys, adapter.values, strict=True)
    places = {path: _Beside(key, value) for path, key, value in pairs}
    for path, processor in places.items():
        unet.get_submodule(path).set_processor(processor)

    @cache
    def embeddings() -> Tensor:
        return vision.embeddings(encoder, lesson().pictures, device)

    def loss(draw: Draw) -> Tensor:
        each = stable_diffusion.case(lesson(), draw, count=24)
        unseen = torch.from_numpy(draw.numpy.random(24) < _UNSEEN).to(device)
        seen = torch.where(unseen[:, None], 0.0, embeddings()[each.scenes])
        tokens = adapter.projection(seen)
        for processor in places.values():
            processor.tokens = tokens
        predicted = stable_diffusion.predict(unet, lesson().kind, each.noisy, each.time, each.said)
        return mse_loss(predicted, each.target)

    trained = fit(Job(name, adapter, loss, steps, muon=0.01, adam=1e-3), folder, report, device)
    assert isinstance(trained, Adapter)
    return trained


def save(adapter: Adapter, file: Path) -> None:
    save_file(adapter.tensors(), file)
