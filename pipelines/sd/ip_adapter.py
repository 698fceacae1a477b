"""IP-Adapters: what a picture becomes for a UNet's cross-attention, and where it acts how much.

A projection makes tokens of what CLIP or a face analysis says of a picture; in each cross-attention module
the adapter has weights of its own that make keys and values of them (arXiv 2308.06721). InstantID's (arXiv
2401.07519) reads a face.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from pipelines.adapters.lora import Lora
from pipelines.adapters.tensor_file import invalid, listed
from pipelines.sd.image_attention import Pair
from pipelines.sd.image_encoder import ImageFeatures
from schemas.errors import AssetError

IpAdapterKind = Literal["plain", "full", "plus", "faceid", "faceid_plus", "instantid"]

INVALID_SCALE = "invalid_scale"
MAX_SCALE = 100.0  # of either sign


@dataclass(frozen=True, slots=True)
class Reads:
    """What an adapter is told of a picture: widths of features, None for those that it does not read."""

    embedding: int | None = None  # CLIP's image embedding
    hidden: int | None = None  # CLIP's last but one hidden states
    face: int | None = None  # a face's embedding, as InsightFace gives it
    normed_face: bool = True  # whether that is brought to length 1 before (InsightFace's normed_embedding)

    @property
    def clip(self) -> bool:
        """Whether an image encoder is needed."""
        return self.embedding is not None or self.hidden is not None


@dataclass(frozen=True, slots=True, eq=False)
class IpAdapter:
    """An IP-Adapter on its UNet's device, in its dtype. It is not changed by use, on any thread."""

    kind: IpAdapterKind
    reads: Reads
    lora: Lora | None  # what FaceID adds to the UNet's attention beside its tokens, at scale 1; on the CPU
    projection: Any  # diffusers' module for the kind
    weights: tuple[Pair, ...]  # of keys and values, [heads · head_dim, width], by cross-attention module

    @property
    def nbytes(self) -> int:
        """On the UNet's device; the LoRA is not there."""
        own: int = sum(each.nbytes for each in self.projection.parameters())
        return own + sum(key.nbytes + value.nbytes for key, value in self.weights)

    @torch.inference_mode()
    def tokens(
        self, image: ImageFeatures | None = None, face: Tensor | None = None, *, shortcut: bool = True
    ) -> Tensor:
        """One picture's tokens, [tokens, width of the UNet's text].

        Given is what `reads` names, `face` as [width]; more is ignored. `shortcut` is FaceID Plus's: true for
        its second version, false for its first. Raises AssetError where the image encoder is another than
        the adapter was made for.
        """
        match self.kind:
            case "plain":
                tokens = self.projection(self._embedding(image)[None])
            case "full" | "plus":
                tokens = self.projection(self._hidden(image)[None])
            case "faceid":
                tokens = self.projection(self._face(face)[None])
            case "instantid":
                tokens = self.projection(self._face(face)[None, None])
            case "faceid_plus":
                projection = copy(self.projection)  # the same weights; diffusers has these as attributes
                projection.clip_embeds = self._hidden(image)[None, None]
                projection.shortcut = shortcut
                tokens = projection(self._face(face)[None])
        shown: Tensor = tokens[0]
        return shown

    def negative_tokens(self, image: ImageFeatures | None = None, *, shortcut: bool = True) -> Tensor:
        """The unconditional row's, [tokens, width]: of no face, and of ImageEncoder.negative's `image`.

        One set serves however many pictures there are: attending to the same tokens twice changes nothing.
        """
        face = None if self.reads.face is None else torch.zeros(self.reads.face)
        return self.tokens(image, face, shortcut=shortcut)

    @torch.inference_mode()
    def pairs(self, tokens: Tensor) -> tuple[Pair, ...]:
        """Keys and values for every cross-attention module, of the tokens [any number, width].

        Several pictures' tokens, one after another, are seen together.
        """
        return tuple((linear(tokens, key), linear(tokens, value)) for key, value in self.weights)

    def _embedding(self, image: ImageFeatures | None) -> Tensor:
        assert image is not None, f"a {self.kind} IP-Adapter reads a picture"
        return self._as_read(image.embedding, self.reads.embedding, "image embeddings")

    def _hidden(self, image: ImageFeatures | None) -> Tensor:
        assert image is not None, f"a {self.kind} IP-Adapter reads a picture"
        return self._as_read(image.hidden, self.reads.hidden, "hidden states")

    def _face(self, face: Tensor | None) -> Tensor:
        assert face is not None, f"a {self.kind} IP-Adapter reads a face"
        assert face.shape == (self.reads.face,), f"a face is {self.reads.face} wide, not {tuple(face.shape)}"
        return face.to(self.weights[0][0])

    def _as_read(self, features: Tensor, width: int | None, what: str) -> Tensor:
        if features.shape[-1] != width:
            raise invalid(
                f"The IP-Adapter reads {what} {width} wide, the image encoder gives {features.shape[-1]}; "
                "use the image encoder that it was made for."
            )
        return features.to(self.weights[0][0])


def scales_of(scale: float, scale_json: Mapping[str, Any], modules: Sequence[str]) -> tuple[float, ...]:
    """The scale in each cross-attention module, named as ImageAttention names them.

    `scale_json` sets scales by place as diffusers' `set_ip_adapter_scale` takes them, in place of `scale`:
    {"down": {"block_2": [0.0, 1.0]}, "mid": 1.0, "up": 0.5}. A list has a number for each of a block's
    attentions, or one for all; what is not named is off. Raises AssetError ("invalid_scale") that names the
    key.
    """
    if not scale_json:
        return (scale,) * len(modules)
    places = [_place(module) for module in modules]
    attentions = Counter(block for block, _ in set(places))
    blocks = {part: sorted({each for where, each in attentions if where == part}) for part in _PARTS}
    _check_keys(scale_json, _PARTS, "scale_json")
    for part in ("down", "up"):
        if isinstance(scale_json.get(part), Mapping):
            _check_keys(scale_json[part], blocks[part], f"scale_json.{part}")
    return tuple(_scale_at(scale_json, *place, attentions[place[0]]) for place in places)


_PARTS = ("down", "mid", "up")
_PLACE = re.compile(r"(?P<part>down|mid|up)_block(s\.(?P<block>\d+))?\.attentions\.(?P<attention>\d+)\.")
_Block = tuple[str, str]  # "down", "block_2"; "mid", ""


def _place(module: str) -> tuple[_Block, int]:
    """The block of a module, and the number of its attention there."""
    match = _PLACE.match(module)
    assert match, f"{module} is in no block"
    block = f"block_{match['block']}" if match["block"] else ""
    return (match["part"], block), int(match["attention"])


def _scale_at(wish: Mapping[str, Any], block: _Block, attention: int, count: int) -> float:
    """What is wished for one of a block's `count` attentions."""
    part, name = block
    key, value = f"scale_json.{part}", wish.get(part, 0.0)
    if name and isinstance(value, Mapping):
        key, value = f"{key}.{name}", value.get(name, 0.0)
    if isinstance(value, list):
        if len(value) not in (1, count):
            raise _invalid_scale(f"{key} has {len(value)} numbers for {count} attentions")
        value = value[attention if len(value) == count else 0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SCALE:
        raise _invalid_scale(f"{key} is not a number from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(value)


def _check_keys(wish: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [str(key)[:80] for key in wish if key not in known]
    if unknown:
        raise _invalid_scale(f"{where} has no {listed(unknown)}; there are {listed(known, most=20)}")


def _invalid_scale(fault: str) -> AssetError:
    return AssetError(f"The IP-Adapter's {fault}.", INVALID_SCALE)
