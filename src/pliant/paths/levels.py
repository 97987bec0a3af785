"""Where the steps of a grid lie, as invertible functions of the position u: 0 at the noisy end, 1 at the clean end.

Levels are noise ratios sigma/alpha (EDM's sigma) between `low` and `high`, or times; tensors of any shape, float64.
`*_position` is the inverse. Sheet D, 13.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.paths.beta import beta_cdf, beta_quantile
from pliant.paths.path import as_time


def karras_level(u: Tensor, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Linear in sigma^(1/rho): EDM, arXiv 2206.00364, eq. 5. Larger rho spends more steps near data."""
    top, bottom = high ** (1.0 / rho), low ** (1.0 / rho)
    return (top + as_time(u) * (bottom - top)) ** rho


def karras_position(level: Tensor, low: float, high: float, rho: float = 7.0) -> Tensor:
    top, bottom = high ** (1.0 / rho), low ** (1.0 / rho)
    return (top - as_time(level) ** (1.0 / rho)) / (top - bottom)


def exponential_level(u: Tensor, low: float, high: float, power: float = 1.0) -> Tensor:
    """Linear in ln(sigma), that is in log-SNR; k-diffusion's polyexponential for another power of 1 - u."""
    return torch.exp((1.0 - as_time(u)) ** power * math.log(high / low) + math.log(low))


def exponential_position(level: Tensor, low: float, high: float, power: float = 1.0) -> Tensor:
    share = (torch.log(as_time(level)) - math.log(low)) / math.log(high / low)
    return 1.0 - share.clamp(min=0.0) ** (1.0 / power)


def beta_level(u: Tensor, low: float, high: float, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of Beta(a, b), stretched to low..high (arXiv 2407.12173): a, b < 1 spend more steps at both ends."""
    u = as_time(u)
    quantiles = [beta_quantile(1.0 - p, a, b) for p in u.reshape(-1).tolist()]
    return low + torch.tensor(quantiles, dtype=torch.float64).reshape(u.shape) * (high - low)


def beta_position(level: Tensor, low: float, high: float, a: float = 0.6, b: float = 0.6) -> Tensor:
    x = (as_time(level) - low) / (high - low)
    values = [1.0 - beta_cdf(v, a, b) for v in x.reshape(-1).tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


def power_time(u: Tensor, power: float = 2.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Linear in t^(1/power); 2 is DDIM's and DPM-Solver's quadratic grid."""
    top, bottom = start ** (1.0 / power), end ** (1.0 / power)
    return (top + as_time(u) * (bottom - top)) ** power


def power_position(t: Tensor, power: float = 2.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    top, bottom = start ** (1.0 / power), end ** (1.0 / power)
    return (top - as_time(t) ** (1.0 / power)) / (top - bottom)


def sigmoid_time(u: Tensor, steepness: float = 6.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Linear in logit, cut to start..end: more steps at both ends. steepness: logits covered in each direction."""
    edge = 1.0 / (1.0 + math.exp(steepness))
    share = (torch.sigmoid(steepness * (1.0 - 2.0 * as_time(u))) - edge) / (1.0 - 2.0 * edge)
    return end + share * (start - end)


def sigmoid_position(t: Tensor, steepness: float = 6.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    edge = 1.0 / (1.0 + math.exp(steepness))
    share = edge + (as_time(t) - end) / (start - end) * (1.0 - 2.0 * edge)
    return 0.5 * (1.0 - torch.logit(share) / steepness)


# Shifts: maps of times to times -----------------------------------------------------------------------------------


def shifted_times(times: Tensor, shift: float | Tensor) -> Tensor:
    """SD3's shift `s t / (1 + (s-1) t)` (arXiv 2403.03206): s > 1 spends more steps near noise; 1 changes nothing.

    On the linear path it multiplies the noise ratio by s; the inverse is the shift 1/s. A tensor of shifts broadcasts.
    """
    if bool((torch.as_tensor(shift) <= 0).any()):
        raise PlanError(f"the time shift must be positive, got {shift}")
    return shift * times / (1.0 + (shift - 1.0) * times)


def resolution_shift(tokens: int, base_tokens: int) -> float:
    """SD3's shift for another resolution than the one trained at: sqrt(tokens/base_tokens)."""
    if tokens < 1 or base_tokens < 1:
        raise PlanError(f"a resolution has at least 1 token, got {tokens} and {base_tokens}")
    return math.sqrt(tokens / base_tokens)


def flux_mu(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_mu: float = 0.5, max_mu: float = 1.15
) -> float:
    """FLUX's mu for an image of so many tokens: linear between (256, 0.5) and (4096, 1.15), and beyond."""
    return base_mu + (max_mu - base_mu) * (tokens - base_tokens) / (max_tokens - base_tokens)


def dynamic_shift(times: Tensor, mu: float, kappa: float = 1.0, kind: str = "exponential") -> Tensor:
    """FLUX's shift `m / (m + (1/t - 1)^kappa)`, m = e^mu ("exponential") or mu ("linear"); SD3's if kappa = 1."""
    m = _dynamic_factor(mu, kind)
    t = as_time(times)
    return m * t**kappa / (m * t**kappa + (1.0 - t) ** kappa)


def dynamic_shift_inverse(times: Tensor, mu: float, kappa: float = 1.0, kind: str = "exponential") -> Tensor:
    root = _dynamic_factor(mu, kind) ** (1.0 / kappa)
    t = as_time(times) ** (1.0 / kappa)
    return t / (t + root * (1.0 - as_time(times)) ** (1.0 / kappa))


def _dynamic_factor(mu: float, kind: str) -> float:
    if kind not in ("exponential", "linear"):
        raise PlanError(f"a dynamic shift is 'exponential' or 'linear', not {kind!r}")
    m = math.exp(mu) if kind == "exponential" else mu
    if m <= 0.0:
        raise PlanError(f"a linear dynamic shift needs mu > 0, got {mu}")
    return m


def stretched_times(times: Tensor, last: float, terminal: float) -> Tensor:
    """`1 - (1-t) (1-terminal)/(1-last)`: moves the time `last` to `terminal` and keeps 1 (diffusers' shift_terminal).

    The inverse is `stretched_times(., terminal, last)`.
    """
    if not (0.0 <= terminal < 1.0 and 0.0 <= last < 1.0):
        raise PlanError(f"a terminal time lies in [0, 1), got {terminal} (from {last})")
    return 1.0 - (1.0 - as_time(times)) * (1.0 - terminal) / (1.0 - last)
