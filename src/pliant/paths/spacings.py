"""Choosing entries of a table of timesteps, as DiT, diffusers and ComfyUI do, and the tables of Align Your Steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.errors import PlanError, suggest

SPACINGS = ("linspace", "leading", "trailing")
POINTS = ("closed", "open")


def spaced_timesteps(
    total: int, steps: int, spacing: str, points: str = "closed", offset: int = 0, used: int | None = None
) -> list[float]:
    """diffusers' timesteps, noisiest first, of a table of `total` entries (sheet D, 13.5; arXiv 2305.08891, table 2).

    points: "closed" (DDIM, PNDM, Euler: the last step starts at timestep 0 or `offset`) or "open" (DPM-Solver, UniPC,
    DEIS: one more point is spaced and the last dropped; no difference for "trailing"). offset: added to "leading".
    used: how many entries may be used, where the noisiest are left out (`clipped_entries`).
    """
    if spacing not in SPACINGS:
        raise PlanError(f"unknown spacing {spacing!r}: {suggest(spacing, SPACINGS)}")
    if points not in POINTS:
        raise PlanError(f"unknown choice of points {points!r}: {suggest(points, POINTS)}")
    last = total if used is None else used
    if not 1 <= steps <= last:
        raise PlanError(f"a table of {last} timesteps gives 1 to {last} steps, not {steps}")
    count = steps + 1 if points == "open" else steps
    if spacing == "linspace":
        gap = (last - 1) / (count - 1) if count > 1 else 0.0
        chosen = [float(round(k * gap)) for k in range(count)][::-1]
    elif spacing == "leading":
        stride = last // count
        chosen = [float(k * stride + offset) for k in range(count)][::-1]
    else:
        stride_ = total / steps
        count = math.ceil(last / stride_)
        return [float(round(last - k * stride_)) - 1.0 for k in range(count)]
    return chosen[:steps]


def clipped_entries(log_snr: Tensor, least: float) -> int:
    """How many entries of a table (its log-SNR falls with the timestep) have at least this one; DPM-Solver: -5.1."""
    return int((log_snr >= least).sum())


def simple_times(steps: int, entries: int = 1000) -> Tensor:
    """ComfyUI's "simple": entry `-(1 + floor(i L/N))` of L times 1/L, 2/L, ..., 1, then 0. Float64."""
    if not 1 <= steps <= entries:
        raise PlanError(f"a table of {entries} times gives 1 to {entries} steps, not {steps}")
    picked = [entries - i * entries // steps for i in range(steps)]
    return torch.tensor([*picked, 0], dtype=torch.float64) / entries


# Align Your Steps, arXiv 2404.14507, as published: the levels of 10 steps, and the level that the last one stands for
# when other numbers of steps are interpolated.
_AYS_LEVELS: dict[str, tuple[list[float], float]] = {
    "sd": ([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152], 0.029),
    "sdxl": ([14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113], 0.029),
    "svd": ([700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034], 0.002),
}
_AYS_TIMESTEPS: dict[str, list[int]] = {
    "sd": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    "sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
}


def align_your_steps_levels(steps: int, model: str = "sd") -> Tensor:
    """The `steps` noise ratios before the final 0: the published 10, or ln(sigma) linear in the index for others."""
    if model not in _AYS_LEVELS:
        raise PlanError(f"no Align Your Steps table for {model!r}: {suggest(model, _AYS_LEVELS)}")
    levels, last = _AYS_LEVELS[model]
    return torch.exp(_resampled(torch.log(torch.tensor([*levels, last], dtype=torch.float64)), steps))


def align_your_steps_timesteps(steps: int, model: str = "sd") -> Tensor:
    """The same in timesteps of Stable Diffusion's table: the published 10, or linear in the index for others."""
    if model not in _AYS_TIMESTEPS:
        raise PlanError(f"no Align Your Steps timesteps for {model!r}: {suggest(model, _AYS_TIMESTEPS)}")
    return _resampled(torch.tensor([*_AYS_TIMESTEPS[model], -1], dtype=torch.float64), steps)


def _resampled(values: Tensor, steps: int) -> Tensor:
    """`values` (N+1 points, the last being the grid's end) interpolated to steps+1 points, without the last."""
    if steps < 1:
        raise PlanError(f"a time grid needs at least 1 step, got {steps}")
    place = torch.arange(steps, dtype=torch.float64) * (len(values) - 1) / steps
    left = place.floor().long()
    return values[left] + (place - left) * (values[left + 1] - values[left])
