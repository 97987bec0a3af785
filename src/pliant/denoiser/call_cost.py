"""What one call costs for one image: its shape for the cost model, and FLOPs (a multiply-add counts 2)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pliant.adapters.exit_dit import ExitDiT
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.low_band import coarse_config
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.adapters.width import DynamicDiT
from pliant.compute import Compute, Convention, TransformerShape, spent_macs

if TYPE_CHECKING:
    from pliant.denoiser.denoiser import Denoiser


def shape(model: Denoiser, compute: Compute) -> TransformerShape:
    """Of a call with this compute."""
    config, core = model.config, model.core
    patch, leave = model.patch_of(compute), model.exit_of(compute)
    if leave is not None and isinstance(model.network, ExitDiT):
        config = model.network.exit_config(leave)
    if compute.scale is not None:
        config = coarse_config(model.dit_config, compute.scale)
    found = config.shape(model.size, patch)
    if isinstance(core, FlexiDiT) and core.spec.recipe == "lora":
        extra = patch != config.patch_size and not compute.merged
        found = replace(found, lora_rank=core.spec.rank if extra else 0)
    if isinstance(model.network, TokenRoutedDiT):
        found = replace(found, router_hidden=model.network.spec.features(model.dit_config))
    return found


def flops(model: Denoiser, compute: Compute, convention: Convention, t: float | None) -> int:
    """The most that a call can cost at house time t, on which only routed width depends (None: at full width)."""
    if t is not None and isinstance(model.network, DynamicDiT):
        return 2 * _width_macs(model, t, 1.0, convention)
    return 2 * spent_macs(shape(model, compute), compute, convention)


def least_flops(model: Denoiser, compute: Compute, convention: Convention, t: float | None) -> int:
    """The least: its gate reuses, or its token routers let every token pass the MLPs by."""
    if t is not None and isinstance(model.network, DynamicDiT):
        return 2 * _width_macs(model, t, 0.0, convention)
    return 2 * spent_macs(shape(model, compute), compute, convention, hit=True)


def _width_macs(model: Denoiser, t: float, tokens: float, convention: Convention) -> int:
    """At house time t, with this share of the tokens in every MLP."""
    from pliant.adapters.width_slicing import width_macs, width_variants

    assert isinstance(model.network, DynamicDiT)
    time = model.encode(torch.tensor([t], dtype=torch.float64)).float().to(model.device)
    return width_macs(width_variants(model.network, time)[0], (tokens,) * model.config.depth, convention)
