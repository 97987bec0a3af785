"""MagCache (arXiv 2506.09045): how the size of the residual changes says when it may be reused; a static plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from pliant.compute import Reuse
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PlanError
from pliant.plans.caching.measure import Calibration, residuals
from pliant.plans.caching.options import number, whole
from pliant.plans.caching.rows import Row, Target
from pliant.plans.plan import Plan


def magcache(
    target: Target,
    *,
    ratios: Sequence[float] | None = None,
    threshold: float = 0.06,
    max_run: int = 3,
    retention: float = 0.2,
) -> list[Row]:
    """From step `int(retention S + .5)` on: `rho *= ratio_i; err += |1 - rho|`.

    Reuse iff `err <= threshold` and at most `max_run` steps in a row; else full, and both begin anew.

    ratios: this model's, one per step (`calibrate` measures them); those of another number of steps are resampled.
    The defaults are diffusers'; the authors' FLUX script has 0.24, 5 and 0.1.
    """
    if ratios is None:
        raise ConfigError(
            "magcache needs this model's ratios: measure them with calibrate=8 (samples), or pass ratios="
        )
    threshold, max_run = number("threshold", threshold), whole("max_run", max_run)
    first = max(1, int(number("retention", retention, 0, 1) * target.steps + 0.5))
    if first >= target.steps:
        raise PlanError(f"retention {retention:g} keeps all {target.steps} steps in full; lower it")
    if threshold >= 1 and max_run >= target.steps - first:
        raise ConfigError(
            f"threshold is {threshold:g} and max_run {max_run}: an error of 100 % would still count as none, so "
            f"nothing would be recomputed; lower one of them"
        )
    m = target.sites
    full = Row(write=(f"span(0,{m})",))
    cached = Row(sites=f"C{m}", reuse=Reuse("span"))
    rows = [full] * first
    rho, error, run = 1.0, 0.0, 0
    for ratio in resampled(ratios, target.steps)[first:]:
        rho, run = rho * ratio, run + 1
        error += abs(1 - rho)
        if threshold > 0 and error <= threshold and run <= max_run:
            rows.append(cached)
        else:
            rho, error, run = 1.0, 0.0, 0
            rows.append(full)
    return rows


def resampled(ratios: Sequence[float], steps: int) -> list[float]:
    """Ratios for another number of steps: the logarithm of their running product is interpolated, for a ratio belongs
    to the gap between two steps and not to a step. Raises ConfigError.
    """
    given: object = ratios  # plans and command lines may hold anything
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(f"ratios are {ratios!r}; expected a list of positive numbers, one per step")
    if len(ratios) < 2 or not all(isinstance(r, (int, float)) and r > 0 and math.isfinite(r) for r in ratios):
        raise ConfigError(f"ratios are {list(ratios)!r}; expected a positive number per step, at least two")
    if len(ratios) == steps:
        return [float(r) for r in ratios]
    sums = [0.0]
    for ratio in ratios[1:]:
        sums.append(sums[-1] + math.log(ratio))
    places = [i * (len(sums) - 1) / max(1, steps - 1) for i in range(steps)]
    at = [sums[int(p)] + (p - int(p)) * (sums[min(int(p) + 1, len(sums) - 1)] - sums[int(p)]) for p in places]
    return [1.0, *(math.exp(b - a) for a, b in pairwise(at))]


def calibrate_magcache(plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int]) -> Calibration:
    """ratios: one per step, the mean over tokens and samples of |residual| over |residual of the step before|.

    Of the conditional stream, measured on the plan without caching. 1 where there is nothing to compare: at the first
    step, after a switch of the token grid, and in steps without a network call.
    """
    ratios = [1.0] * len(plan.steps)
    before: tuple[Any, torch.Tensor] | None = None
    for seen, residual in residuals(plan, model, cond, seeds):
        now = residual.float().norm(dim=-1)
        if before is not None and before[0] == seen.grid:
            ratios[seen.step] = float((now / before[1].clamp_min(1e-12)).mean())
        before = seen.grid, now
    return Calibration({"ratios": ratios}, {})
