"""Pairs of times for flow maps: where a state is and where its step lands."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.paths import TimeDensity
from pliant.training.draws import Draws


def jump_times(density: TimeDensity, still: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """(t, s), both (B,) float64 house times with t >= s: two draws, sorted; a share `still` of rows has s = t.

    MeanFlow (arXiv 2505.13447). The still rows, on which a flow map is an ordinary velocity field, are drawn at random
    (the official code takes the first of the batch: the same law, since samples come shuffled).
    """
    a, b = draws.each(density.sample).double(), draws.each(density.sample).double()
    t, s = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.where(draws.uniform() < still, t, s)
