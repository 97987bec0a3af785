"""The path families. Each is a few closed-form lines; tables of values are in sheet C, section 15.1.

Names: `linear` (rectified flow), `vp-discrete` (DDPM's and Stable Diffusion's tables), `vp` (continuous), `sub-vp`,
`cosine` (Nichol-Dhariwal), `gvp` (trigonometric). All have a Gaussian source. Further families have files of their own:
`edm.py`, `interpolants.py`, `mean_reverting.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths.path import Coefficients, Path, as_time, register_path


@register_path
@dataclass(frozen=True)
class Linear(Path):
    """Rectified flow, arXiv 2209.03003: `x_t = (1-t)*x0 + t*x1`, x1 ~ N(0, I). Velocity `x1 - x0`."""

    name: ClassVar[str] = "linear"

    def coefficients(self, t: float | Tensor) -> Coefficients:
        t = as_time(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return Coefficients(1.0 - t, t, zero, -one, one, zero)

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        return torch.sigmoid(-as_time(log_snr))  # n/(1+n) with n = exp(-log_snr)


class Diffusion(Path):
    """Paths without a source: noise enters through c = sigma. Subclasses give alpha, sigma and derivatives."""

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError  # pragma: no cover - every registered family defines it

    def coefficients(self, t: float | Tensor) -> Coefficients:
        alpha, sigma, dalpha, dsigma = self._alpha_sigma(as_time(t))
        zero = torch.zeros_like(alpha)
        return Coefficients(alpha, zero, sigma, dalpha, zero, dsigma)


def _variance_preserving(log_alpha: Tensor, dlog_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha = exp(log_alpha), sigma = sqrt(1 - alpha^2), without cancellation near alpha = 1.

    At sigma = 0 the derivative of sigma is infinite (sigma ~ sqrt(t)) and is returned as +inf.
    """
    alpha = torch.exp(log_alpha)
    sigma = torch.sqrt(-torch.expm1(2.0 * log_alpha))
    dalpha = alpha * dlog_alpha
    return alpha, sigma, dalpha, -alpha * dalpha / sigma


@register_path
@dataclass(frozen=True)
class VPContinuous(Diffusion):
    """Score SDE's VP path, arXiv 2011.13456: `log alpha = -(beta_max-beta_min) t^2/4 - beta_min t/2`."""

    name: ClassVar[str] = "vp"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """ln(alpha) and its derivative."""
        slope = self.beta_max - self.beta_min
        return -0.25 * slope * t**2 - 0.5 * self.beta_min * t, -0.5 * slope * t - 0.5 * self.beta_min

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        """The t in [0, 1] with -ln(alpha) = decay."""
        slope = self.beta_max - self.beta_min
        # (sqrt(b^2 + 4 s g) - b)/s written without cancellation for small g.
        root = torch.sqrt(self.beta_min**2 + 4.0 * slope * decay)
        return torch.clamp(4.0 * decay / (root + self.beta_min), 0.0, 1.0)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _variance_preserving(*self._log_alpha(t))

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        # -ln(alpha) = ln(1 + n^2)/2
        return self._time_of_decay(
            0.5 * torch.logaddexp(-2.0 * as_time(log_snr), torch.zeros((), dtype=torch.float64))
        )


@register_path
@dataclass(frozen=True)
class SubVP(VPContinuous):
    """Score SDE's sub-VP path, arXiv 2011.13456: VP's alpha with the smaller `sigma = 1 - alpha^2`."""

    name: ClassVar[str] = "sub-vp"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_alpha, dlog_alpha = self._log_alpha(t)
        alpha = torch.exp(log_alpha)
        dalpha = alpha * dlog_alpha
        return alpha, -torch.expm1(2.0 * log_alpha), dalpha, -2.0 * alpha * dalpha

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        # n = (1 - alpha^2)/alpha = 2 sinh(-ln alpha); beyond 1e12 times more noise than signal asinh only adds ln 2.
        return self._time_of_decay(torch.asinh(0.5 * torch.exp(-as_time(log_snr).clamp(min=-600.0))))


@register_path
@dataclass(frozen=True)
class Cosine(Diffusion):
    """Improved DDPM's cosine path, arXiv 2102.09672: `alpha^2 = f(t)/f(0)`, `f = cos^2(pi/2 (t+s)/(1+s))`."""

    name: ClassVar[str] = "cosine"
    s: float = 0.008
    """The paper's small offset, which keeps the first steps from being too small."""

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rate = 0.5 * math.pi / (1.0 + self.s)
        angle, start = rate * (t + self.s), rate * self.s
        # cos(angle) through sin(pi/2 - angle), so that alpha(1) is exactly 0 and log-SNR there is -inf, not -37.
        alpha = torch.sin(rate * (1.0 - t)) / math.cos(start)
        dalpha = -rate * torch.sin(angle) / math.cos(start)
        # 1 - alpha^2 = sin(angle-start) sin(angle+start) / cos^2(start): no cancellation near t = 0.
        sigma = torch.sqrt(torch.sin(angle - start) * torch.sin(angle + start)) / math.cos(start)
        return alpha, sigma, dalpha, -alpha * dalpha / sigma

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        rate = 0.5 * math.pi / (1.0 + self.s)
        alpha = torch.sqrt(torch.sigmoid(2.0 * as_time(log_snr)))
        return torch.clamp(torch.acos(alpha * math.cos(rate * self.s)) / rate - self.s, 0.0, 1.0)


@register_path
@dataclass(frozen=True)
class GVP(Diffusion):
    """SiT's generalised variance-preserving path, arXiv 2401.08740: `alpha = cos(pi t/2)`, `sigma = sin(pi t/2)`."""

    name: ClassVar[str] = "gvp"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = 0.5 * math.pi
        # cos(pi/2 t) through sin((1-t) pi/2), so that alpha(1) is exactly 0.
        alpha, sigma = torch.sin(half * (1.0 - t)), torch.sin(half * t)
        return alpha, sigma, -half * sigma, half * alpha

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        return torch.atan(torch.exp(-as_time(log_snr))) / (0.5 * math.pi)


def interpolated_table(table: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The table's value at t (its entries lie at t = 0, 1/T, ..., 1, linear between) and the derivative there."""
    table, steps = table.to(t.device), len(table) - 1
    place = t.clamp(0.0, 1.0) * steps
    # Times that mean an entry must hit it exactly: (k+1)/T*T may be off by an ulp.
    nearest = torch.round(place)
    place = torch.where((place - nearest).abs() < 1e-9 * steps, nearest, place)
    left = place.floor().clamp(max=steps - 1).long()
    slope = table[left + 1] - table[left]
    return table[left] + (place - left) * slope, slope * steps


def table_position(table: Tensor, value: Tensor) -> Tensor:
    """Inverse of `interpolated_table` for an increasing table; values beyond its ends give the ends."""
    table, steps = table.to(value.device), len(table) - 1
    right = torch.searchsorted(table, value.clamp(max=float(table[-1])).contiguous()).clamp(1, steps)
    low, high = table[right - 1], table[right]
    return torch.clamp((right - 1 + (value - low) / (high - low)) / steps, 0.0, 1.0)


@lru_cache(maxsize=16)
def _log_alpha_table(betas: str, num_timesteps: int) -> Tensor:
    """ln sqrt(abar) at t = 0, 1/T, ..., 1: entry 0 is clean data (0.0), entry k+1 is the table's timestep k."""
    # DDPM's range is for 1000 steps; other lengths keep the same total noise (official DiT, guided diffusion).
    if betas == "linear":
        scale = 1000.0 / num_timesteps
        table = torch.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=torch.float64)
    elif betas == "scaled-linear":  # Stable Diffusion: linear in sqrt(beta)
        table = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64) ** 2
    else:
        raise ConfigError(
            f"unknown beta schedule {betas!r}: use 'linear' (DDPM, DiT) or 'scaled-linear' (Stable Diffusion)"
        )
    if not bool((table < 1.0).all()):
        raise ConfigError(f"{num_timesteps} timesteps are too few for the {betas!r} betas: some beta reaches 1")
    return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.cumsum(torch.log1p(-table), 0)])


@register_path
@dataclass(frozen=True)
class VPDiscrete(Diffusion):
    """A table of `num_timesteps` noise levels (DDPM, arXiv 2006.11239). Timestep k lies at `t = (k+1)/num_timesteps`.

    Between the entries ln(alpha) is linear in t (DPM-Solver's convention); t = 0 is clean data, one step below
    timestep 0. `betas`: "linear" (DDPM, DiT: 1e-4..2e-2) or "scaled-linear" (Stable Diffusion).
    """

    name: ClassVar[str] = "vp-discrete"
    betas: str = "linear"
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        _log_alpha_table(self.betas, self.num_timesteps)  # refuse a bad table when it is named, not when it is used

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar of timesteps 0..T-1, float64."""
        return torch.exp(2.0 * _log_alpha_table(self.betas, self.num_timesteps)[1:])

    @property
    def trained_times(self) -> tuple[float, float]:
        return 1.0 / self.num_timesteps, 1.0

    def time_of_timestep(self, timestep: float | Tensor) -> Tensor:
        """House time of a (possibly fractional) table timestep."""
        return (as_time(timestep) + 1.0) / self.num_timesteps

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _variance_preserving(*interpolated_table(_log_alpha_table(self.betas, self.num_timesteps), t))

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        # ln alpha = -1/2 ln(1 + exp(-2 lambda)); the table decreases, so search its negative.
        target = 0.5 * torch.logaddexp(-2.0 * as_time(log_snr), torch.zeros((), dtype=torch.float64))
        return table_position(-_log_alpha_table(self.betas, self.num_timesteps), target)
