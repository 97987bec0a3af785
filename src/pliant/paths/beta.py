"""The Beta distribution's function and quantile in plain floats: a time grid needs ten of them, not a dependency."""

from __future__ import annotations

import math


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(B <= x) for B ~ Beta(a, b): the regularised incomplete beta function, to about 1e-14."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast below the mean only
        return 1.0 - beta_cdf(1.0 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), the continued fraction of the incomplete beta function, from its tail."""
    tail = 1.0
    for m in range(20 + int(5.0 * math.sqrt(max(a, b))), 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        tail = 1.0 + even / (1.0 + odd / tail)
    return 1.0 - (a + b) * x / ((a + 1.0) * tail)


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x with `beta_cdf(x, a, b) = p`: Newton's method, kept inside a shrinking bracket."""
    if p <= 0.0 or p >= 1.0:
        return 0.0 if p <= 0.0 else 1.0
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    low, high, x = 0.0, 1.0, 0.5
    for _ in range(200):
        excess = beta_cdf(x, a, b) - p
        low, high = (low, x) if excess > 0.0 else (x, high)
        density = math.exp(log_norm + (a - 1.0) * math.log(x) + (b - 1.0) * math.log1p(-x))
        step = x - excess / density
        new = step if low < step < high else 0.5 * (low + high)
        if abs(new - x) <= 2e-16 * x:
            return new
        x = new
    return x
