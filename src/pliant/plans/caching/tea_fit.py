"""TeaCache's polynomial, measured on the model it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.compute.gate import mean_change, mean_size
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.plans.caching.measure import Calibration, watch
from pliant.plans.plan import Plan


@torch.no_grad()
def calibrate_teacache(
    plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int], degree: int = 4
) -> Calibration:
    """polynomial: coefficients, highest power first. Least squares of the change of the last state by the change of the
    first modulated input, per sample and pair of neighbouring steps of the plan without caching (both relative L1), of
    one token grid.

    "r2" says how much of the variance the fit explains, which in practice can be little.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    before: tuple[Tensor, Tensor, Any] | None = None
    for seen in watch(plan, model, cond, seeds):
        now = seen.sites.norm(0, seen.start, seen.context)[0], seen.end()[0], seen.grid
        if before is not None and before[2] == now[2]:
            inputs.append(mean_change(now[0], before[0]) / mean_size(before[0]))
            outputs.append(mean_change(now[1], before[1]) / mean_size(before[1]))
        before = now
    x, y = torch.cat(inputs).double().cpu(), torch.cat(outputs).double().cpu()
    if len(x) <= degree:
        raise ConfigError(f"{len(x)} changes cannot fit a polynomial of degree {degree}; take more steps or samples")
    scale = float(x.max()) or 1.0  # powers of small changes are badly conditioned otherwise
    rows = torch.stack([(x / scale) ** p for p in range(degree, -1, -1)], dim=1)
    fit = torch.linalg.lstsq(rows, y[:, None], driver="gelsd").solution[:, 0]
    left = float(((rows @ fit - y) ** 2).sum() / ((y - y.mean()) ** 2).sum().clamp_min(1e-30))
    powers = range(degree, -1, -1)
    polynomial = [float(c) / scale**p for c, p in zip(fit, powers, strict=True)]
    return Calibration({"polynomial": polynomial}, {"r2": 1 - left})
