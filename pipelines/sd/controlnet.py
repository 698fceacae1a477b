"""ControlNets in a forward: what they add to the UNet's activations of each row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.sd.grid import PIXELS_PER_CELL
from pipelines.sd.tiles import Tile


@dataclass(frozen=True, slots=True, eq=False)
class ControlUse:
    """One control image in one row."""

    net: Any  # a ControlNetModel
    image: Tensor  # pixels [3, height, width] in [0, 1], 8 times the latents' size
    scale: float
    mask: Tensor | None = None  # [1, height, width] in [0, 1]: where the net acts
    guess: bool = False  # the net acts from a tenth at the finest activations to all of it at the coarsest
    text: Tensor | None = None  # [tokens, width], read in place of the row's own (InstantID)

    def cropped(self, tile: Tile) -> "ControlUse":
        """The same for a part of the latents."""
        mask = None if self.mask is None else tile.crop(self.mask, PIXELS_PER_CELL)
        return replace(self, image=tile.crop(self.image, PIXELS_PER_CELL), mask=mask)


def pools(net: Any) -> bool:
    """Whether a net adds means over the whole picture, as that for shuffled pictures does.

    Such a net, like one that guesses, is meant for the rows of the prompt, not for the unconditional ones.
    """
    pooled: bool = net.config.global_pool_conditions
    return pooled


def residuals(
    uses: Sequence[Sequence[ControlUse]], inputs: Mapping[str, Any]
) -> tuple[list[Tensor] | None, Tensor | None]:
    """What is added to the UNet's skip connections and to its middle, summed over the nets.

    `uses[r]` are the controls of row r, `inputs` what the UNet is called with: sample [rows, channels, h, w],
    timestep [rows], encoder_hidden_states [rows, tokens, width] and, for SDXL, added_cond_kwargs. A net reads
    the sample's first channels only, the latents: the UNets of IC-Light and inpainting take more.

    Each net runs once for all its uses whose texts have one length; a use of scale 0 is none. The answer is
    [rows, channels, height, width] for each skip connection and for the middle, zeros for rows without
    controls, or (None, None) if no row has any.
    """
    shares = [
        _in_rows(_run(net, pairs, inputs), pairs, len(uses))
        for (net, _), pairs in _by_net(uses, inputs["encoder_hidden_states"].shape[1]).items()
    ]
    if not shares:
        return None, None
    *down, mid = (reduce(torch.add, each) for each in zip(*shares, strict=True))
    return down, mid


Pairs = Sequence[tuple[int, ControlUse]]  # rows, and what they use


def _by_net(uses: Sequence[Sequence[ControlUse]], tokens: int) -> dict[tuple[Any, int], Pairs]:
    """What may run in one forward: the uses of a net with texts of one length."""
    pairs: dict[tuple[Any, int], list[tuple[int, ControlUse]]] = {}
    for row, controls in enumerate(uses):
        for use in controls:
            if use.scale:
                length = tokens if use.text is None else len(use.text)
                pairs.setdefault((use.net, length), []).append((row, use))
    return dict(pairs)


def _run(net: Any, pairs: Pairs, inputs: Mapping[str, Any]) -> list[Tensor]:
    """One forward over the pairs: [pairs, channels, height, width] for each residual, the middle's last.

    They are not yet scaled.
    """
    sample, texts = inputs["sample"], inputs["encoder_hidden_states"]
    rows = torch.tensor([row for row, _ in pairs], device=sample.device)
    added = inputs.get("added_cond_kwargs") or {}
    size = (sample.shape[2], sample.shape[3])
    down, mid = net(
        sample[rows, : net.config.in_channels],
        inputs["timestep"][rows],
        encoder_hidden_states=torch.stack(
            [texts[row] if use.text is None else use.text.to(texts) for row, use in pairs]
        ),
        controlnet_cond=_images(pairs, size).to(sample),
        added_cond_kwargs={name: added[name][rows] for name in ("text_embeds", "time_ids") if name in added},
        return_dict=False,
    )
    found = [*down, mid]
    if pools(net):
        return [mean.repeat(1, 1, *size) for mean, size in zip(found, _sizes(net, size), strict=True)]
    return found


def _images(pairs: Pairs, size: tuple[int, int]) -> Tensor:
    """The control images, [pairs, 3, height, width]."""
    for _, use in pairs:
        expected = (3, 8 * size[0], 8 * size[1])
        assert tuple(use.image.shape) == expected, f"a control image is {expected}, not {use.image.shape}"
    return torch.stack([use.image for _, use in pairs])


def _sizes(net: Any, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The height and width of each residual; every step down halves them and rounds up."""
    yield size
    for block in net.down_blocks:
        yield from [size] * len(block.resnets)
        if block.downsamplers is not None:
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
            yield size
    yield size


def _in_rows(samples: Sequence[Tensor], pairs: Pairs, rows: int) -> list[Tensor]:
    """[pairs, channels, height, width] → [rows, channels, height, width] each: weighed, and summed by row."""
    for number, (_, use) in enumerate(pairs):
        _weigh([sample[number] for sample in samples], use)
    if [row for row, _ in pairs] == list(range(rows)):
        return list(samples)
    totals = [sample.new_zeros(rows, *sample.shape[1:]) for sample in samples]
    for total, sample in zip(totals, samples, strict=True):
        for (row, _), share in zip(pairs, sample, strict=True):
            total[row] += share
    return totals


def _weigh(shares: Sequence[Tensor], use: ControlUse) -> None:
    """Scale and mask what a net adds for one use, each [channels, height, width].

    In place, by the use's own numbers, so that a row's share is the same whatever its neighbours use.
    """
    for share, factor in zip(shares, _factors(use, len(shares)), strict=True):
        share *= factor
    if use.mask is not None:
        masks: dict[torch.Size, Tensor] = {}
        for share in shares:
            size = share.shape[1:]
            if size not in masks:
                masks[size] = interpolate(use.mask[None], size, mode="bilinear")[0].to(share)
            share *= masks[size]


def _factors(use: ControlUse, count: int) -> list[float]:
    """The scale of each residual. A net that guesses acts less on fine ones, as in diffusers' guess_mode."""
    if not use.guess or pools(use.net):
        return [use.scale] * count
    factors: list[float] = (torch.logspace(-1, 0, count, device="cpu") * use.scale).tolist()
    return factors
