"""Jumps of flow maps on any path, and a teacher's steps, for whole batches at times of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.paths import like

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser, Prediction

LEAST = 1e-3
"""Earliest time at which a network is asked; grids of jumps end at 0 and are coarser."""


def jump(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """Where the flow map takes states x (B, C, H, W) from house times t to s (B,): DDIM's step with its answer.

    Rows with s = t stay where they are, exactly, also at t = 0, where weak patch sizes predict nothing.
    """
    moved = ddim_step(denoiser(x, t.clamp(min=LEAST), labels, lands=s), s)
    return torch.where((t == s)[:, None, None, None], x, moved)


def ddim_step(prediction: Prediction, s: Tensor) -> Tensor:
    """The state at times s (B,) with the prediction's clean data and noise held (arXiv 2010.02502, sigma = 0)."""
    return prediction.path.mix(prediction.to("sample"), prediction.to("epsilon"), s)


def guided(teacher: Denoiser, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Prediction:
    """The teacher's prediction under classifier-free guidance `u + scale (c - u)`; scale 1 is one unguided call."""
    own = teacher(x, t, labels)
    if scale == 1.0:
        return own
    null = teacher(x, t, torch.full_like(labels, teacher.null_label))
    own.value = null.value + scale * (own.value - null.value)
    return own


def heun_step(teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The teacher's guided flow from times t to s (B,), second order: Heun's step in time, two calls."""
    h = like(s - t, x)
    first = guided(teacher, x, t, labels, scale).to("velocity")
    second = guided(teacher, x + h * first, s, labels, scale).to("velocity")
    return x + 0.5 * h * (first + second)
