"""Combining predictions: plain guidance, and a step's whole guidance with its rule, channels and rescaling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.guidance.guidance import Guidance
from pliant.guidance.rules import Linear, Memory, rescaled

Map = Callable[[Tensor], Tensor]


def guide(conditional: Tensor, reference: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """`reference + scale*(conditional - reference)` on the first `channels`; the rest stays conditional.

    (B, C, ...) both. scale = 1 returns the conditional prediction itself, bit for bit.
    """
    if scale == 1.0:
        return conditional
    if channels is None or channels >= conditional.shape[1]:
        return torch.lerp(reference, conditional, scale)
    mixed = torch.lerp(reference[:, :channels], conditional[:, :channels], scale)
    return torch.cat([mixed, conditional[:, channels:]], dim=1)


def guided(
    guidance: Guidance,
    conditional: Tensor,
    reference: Tensor,
    memory: Memory,
    to_sample: Map | None = None,
    from_sample: Map | None = None,
) -> Tensor:
    """A step's guided prediction, (B, C, H, W), in the stored kind.

    to_sample, from_sample: the stored kind to a clean-data estimate of this state and back, which rules that work on
    clean data need. Memory is updated.
    """
    scale, channels = guidance.scale, guidance.channels
    if conditional.dtype != reference.dtype:  # calls of two precisions
        wide = torch.promote_types(conditional.dtype, reference.dtype)
        conditional, reference = conditional.to(wide), reference.to(wide)
    if isinstance(guidance.rule, Linear) and not guidance.rescale:
        return guide(conditional, reference, scale, channels)
    own, other = conditional, reference
    if channels is not None and channels < conditional.shape[1]:
        own, other = conditional[:, :channels], reference[:, :channels]
    if guidance.rule.space == "sample" and to_sample is not None and from_sample is not None:
        whole = from_sample(guidance.rule.combine(to_sample(own), to_sample(other), scale, memory))
    else:
        whole = guidance.rule.combine(own, other, scale, memory)
    if guidance.rescale:
        whole = rescaled(whole, own, guidance.rescale)
    return whole if own is conditional else torch.cat([whole, conditional[:, channels:]], dim=1)
