"""ControlNets in a forward: what they add to the blocks of each row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# The modes of InstantX's and Shakker-Labs' union nets, by the numbers that their model cards give them.
MODES: Mapping[str, int] = MappingProxyType(
    {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "low-quality": 6}
)

Residuals = list[Tensor] | None  # one for each block


@dataclass(frozen=True, slots=True, eq=False)
class ControlUse:
    """One control image in one row."""

    net: Any  # a FluxControlNetModel
    image: Tensor  # packed latents [tokens, 64]; where the net reads pixels, [3, height, width] in [-1, 1]
    scale: float
    mask: Tensor | None = None  # [tokens, 1] of zeros and ones: where the net acts
    mode: int | None = None  # which of a union net's modes; other nets ignore it


def reads_pixels(net: Any) -> bool:
    """Whether a net looks at the picture itself (XLabs), not at the VAE's latents of it."""
    return net.input_hint_block is not None


def modes(net: Any) -> int | None:
    """How many modes a union net has; None for other nets."""
    count: int | None = net.config.num_mode
    return count


def residuals(
    uses: Sequence[Sequence[ControlUse]], inputs: Mapping[str, Any], blocks: int, single_blocks: int
) -> tuple[Residuals, Residuals]:
    """What is added after each of the transformer's `blocks` and `single_blocks`, summed over the nets.

    `uses[r]` are the controls of row r, `inputs` what the transformer is called with. Each net runs once
    for all its uses; one of scale 0 is none. The lists hold [rows, tokens, width] for every block, one
    tensor for several blocks where it is the same, zeros for rows without controls. None stands for a
    list to which no net adds.
    """
    double, single = [], []
    for net, pairs in _by_net(uses).items():
        samples, single_samples = (
            [_in_rows(sample, pairs, len(uses)) for sample in each] for each in _run(net, pairs, inputs)
        )
        if samples:
            double.append(_spread(samples, blocks, repeated=reads_pixels(net)))
        if single_samples:
            single.append(_spread(single_samples, single_blocks, repeated=False))
    return _summed(double), _summed(single)


Pairs = Sequence[tuple[int, ControlUse]]  # rows, and what they use


def _by_net(uses: Sequence[Sequence[ControlUse]]) -> dict[Any, Pairs]:
    pairs: dict[Any, list[tuple[int, ControlUse]]] = {}
    for row, controls in enumerate(uses):
        for use in controls:
            if use.scale:
                pairs.setdefault(use.net, []).append((row, use))
    return dict(pairs)


def _run(net: Any, pairs: Pairs, inputs: Mapping[str, Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """One forward over the pairs: [pairs, tokens, width] for each block of the net, not yet scaled."""
    hidden = inputs["hidden_states"]
    rows = torch.tensor([row for row, _ in pairs], device=hidden.device)
    by_row = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    samples, single_samples = net(
        **{name: inputs[name][rows] for name in by_row},
        guidance=_guidance(inputs["guidance"], rows) if net.config.guidance_embeds else None,
        controlnet_cond=torch.stack([use.image for _, use in pairs]).to(hidden),
        controlnet_mode=_mode_numbers(net, pairs, hidden.device),
        txt_ids=inputs["txt_ids"],
        img_ids=inputs["img_ids"],
        return_dict=False,
    )
    return samples or (), single_samples or ()


def _guidance(guidance: Tensor | None, rows: Tensor) -> Tensor:
    """The rows' guidance; 1 under a base without any, such as FLUX.1 [schnell], for that is no guidance."""
    return torch.ones(len(rows), device=rows.device) if guidance is None else guidance[rows]


def _mode_numbers(net: Any, pairs: Pairs, device: torch.device) -> Tensor | None:
    """[pairs, 1] for a union net."""
    count = modes(net)
    if count is None:
        return None
    numbers = [-1 if use.mode is None else use.mode for _, use in pairs]
    assert all(0 <= number < count for number in numbers), f"a union net is told one of its {count} modes"
    return torch.tensor(numbers, device=device)[:, None]


def _in_rows(sample: Tensor, pairs: Pairs, rows: int) -> Tensor:
    """[pairs, tokens, width] → [rows, tokens, width]: scaled, masked, and summed by row.

    In place, each pair by its own numbers, so that a row's share is the same whatever its neighbours use.
    """
    for (_, use), share in zip(pairs, sample, strict=True):
        share *= use.scale
        if use.mask is not None:
            share *= use.mask.to(share)
    if [row for row, _ in pairs] == list(range(rows)):
        return sample
    total = sample.new_zeros(rows, *sample.shape[1:])
    for (row, _), share in zip(pairs, sample, strict=True):
        total[row] += share
    return total


def _spread(samples: Sequence[Tensor], blocks: int, *, repeated: bool) -> list[Tensor]:
    """Which sample each block gets, by the rule in diffusers' FluxTransformer2DModel.

    Neighbouring blocks share one; with `repeated`, which is how XLabs trained, they take turns.
    """
    every = math.ceil(blocks / len(samples))
    return [samples[block % len(samples) if repeated else block // every] for block in range(blocks)]


def _summed(lists: Sequence[list[Tensor]]) -> Residuals:
    """Block by block; blocks whose shares are the same get the same sum."""
    sums: dict[tuple[int, ...], Tensor] = {}
    chosen = []
    for shares in zip(*lists, strict=True):
        ids = tuple(map(id, shares))
        if ids not in sums:
            sums[ids] = reduce(torch.add, shares)
        chosen.append(sums[ids])
    return chosen or None
