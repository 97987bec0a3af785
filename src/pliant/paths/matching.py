"""Walking along one path with a network that was trained on another (sheet C, 15.3).

Two Gaussian paths with the same noise ratio sigma/alpha hold the same states up to a factor, and the pair (x0, eps)
does not depend on the path at all. So a network trained on path A serves path B: it is shown `scale * x` and told A's
time of equal noise ratio, and what it says about the pair is B's prediction. Exact for independent couplings of data
and noise; for reflowed models it is a change of variables that keeps trajectories but not the meaning of the score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pliant.paths.path import Path, as_time
from pliant.paths.predictions import conversion, row


class Match(NamedTuple):
    """Where times of one path lie on the path a network was trained on. All of the shape of t."""

    time: Tensor
    """The time of equal noise ratio there, float64, clipped to the times the network knows."""
    scale: Tensor
    """What states are multiplied with to become its states, float64."""
    clipped: Tensor
    """Where no trained time has this noise ratio, bool."""


def match(trained: Path, path: Path, t: float | Tensor) -> Match:
    """Times t of `path` on the path `trained`."""
    low, high = trained.trained_times
    here, wanted = path.alpha_sigma(t), path.log_snr(t)
    ends = trained.log_snr(torch.tensor([high, low], dtype=torch.float64)).to(wanted.device)
    clipped = (wanted < ends[0] - 1e-9) | (wanted > ends[1] + 1e-9)
    time = trained.time_of_log_snr(wanted.clamp(-1e3, 1e3)).clamp(low, high)
    there = trained.alpha_sigma(time)
    # alpha/alpha and sigma/sigma are this same number where noise ratios match; the lengths are never 0, and where the
    # ratio had to be clipped they keep the size of a state of unit-variance data.
    scale = torch.hypot(there.alpha, there.sigma) / torch.hypot(here.alpha, here.sigma)
    return Match(time, scale, clipped)


def carried(
    trained: Path, time: Tensor, kind_from: str, path: Path, t: float | Tensor, kind_to: str
) -> tuple[Tensor, Tensor]:
    """(p, q): `p*y + q*value` is the prediction of `kind_to` at t on `path`.

    y: the network's own state, at `time` on `trained`; value: its prediction there, of `kind_from`. Float64; infinite
    or nan where the value does not determine the pair (x0, eps), for instance epsilon at alpha = 0.
    """
    there = trained.alpha_sigma(time)
    clean, noise = conversion(kind_from, "sample", there), conversion(kind_from, "epsilon", there)
    u, w = row(kind_to, path.alpha_sigma(as_time(t)))
    return _times(u, clean[0]) + _times(w, noise[0]), _times(u, clean[1]) + _times(w, noise[1])


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """The product, 0 where the weight is 0: what is not needed need not be determined."""
    return torch.where(weight == 0.0, torch.zeros_like(value), weight * value)
