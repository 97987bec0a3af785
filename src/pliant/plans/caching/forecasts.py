"""Rules that forecast: full steps at fixed places, in between an extrapolation of what they kept."""

from __future__ import annotations

import math
from typing import Literal

from pliant.compute import Chebyshev, Reuse
from pliant.compute.reuse import MAX_ORDER, MAX_WINDOW, Basis
from pliant.errors import PlanError
from pliant.plans.caching.intervals import BRANCHES
from pliant.plans.caching.options import number, period, warm, whole
from pliant.plans.caching.rows import Row, Target


def taylorseer(
    target: Target, *, interval: int = 3, order: int = 3, warmup: int = 2, basis: Basis = "newton"
) -> list[Row]:
    """TaylorSeer as in its DiT code (arXiv 2503.06923; sheet H, 7): every branch, forecast from the full steps.

    Full at the first `warmup` steps and then at every `interval`-th. basis "newton" is exact on polynomials up to the
    order; "taylor" is the published form, exact only for linear features. The order grows as there are full steps.
    """
    every = period(interval, target)
    first = warm("warmup", whole("warmup", warmup), target)
    cached = _forecast(target, order, basis)
    return [BRANCHES if i < first or (i - first + 1) % every == 0 else cached for i in range(target.steps)]


def taylorseer_diffusers(
    target: Target,
    *,
    interval: int = 5,
    order: int = 1,
    warmup: int = 3,
    cooldown: int | None = None,
    basis: Basis = "newton",
) -> list[Row]:
    """TaylorSeer as diffusers' `TaylorSeerCacheConfig` decides.

    Full at i < warmup, where `(i - warmup - 1) % interval == 0`, and from step `cooldown` on.

    With its defaults that is 0, 1, 2, 4, 9, 14, ...: step 3 is forecast. Our factors are float32, not bfloat16.
    """
    every = period(interval, target)
    first = warm("warmup", whole("warmup", warmup), target)
    end = target.steps if cooldown is None else whole("cooldown", cooldown)
    cached = _forecast(target, order, basis)
    return [BRANCHES if i < first or (i - first - 1) % every == 0 or i >= end else cached for i in range(target.steps)]


def spectrum(
    target: Target,
    *,
    degree: int = 4,
    ridge: float = 0.1,
    window: float = 2.0,
    growth: float = 0.75,
    warmup: int = 5,
    blend: float = 0.5,
    keep: int = 100,
    about: Literal["zero", "newest"] = "zero",
) -> list[Row]:
    """Spectrum (arXiv 2603.01623): ridge regression on Chebyshev polynomials of what the last block put out.

    Full at the first `warmup` steps, then where `(cached in a row + 1) % floor(window) == 0`, and each time the window
    grows by `growth`. The forecast is `blend` of the regression over the last `keep` full steps plus `1 - blend` of the
    polynomial through the last three (in Newton's form at the true steps, where the published code has the binomial of
    forward differences). about "newest" regresses distances from the newest value, which the penalty does not shrink.
    """
    first = warm("warmup", whole("warmup", warmup), target)
    window, growth = number("window", window, 1), number("growth", growth)
    keep = whole("keep", keep, 1, MAX_WINDOW)
    fit = Chebyshev(float(target.calls or target.steps), degree, ridge, blend, about)
    if math.floor(window) > target.steps - first:
        raise PlanError(f"window is {window:g}: none of the {target.steps - first} steps after the warm-up is full")
    rows: list[Row] = []
    full = cached = 0
    for i in range(target.steps):
        recompute = i < first or (cached + 1) % math.floor(window) == 0
        if recompute:
            window += growth if i >= first else 0.0
            full, cached = full + 1, 0
            rows.append(Row(write=("state",)))
        else:
            cached += 1
            reuse = Reuse("state", min(full, keep) - 1, "chebyshev", "step", fit)
            rows.append(Row(sites=f"C{target.sites}", reuse=reuse))
    return rows


def _forecast(target: Target, order: int, basis: Basis) -> Row:
    return Row(sites=f"C{target.sites}", reuse=Reuse("branch", whole("order", order, 0, MAX_ORDER), basis))
