"""The mean-reverting path of image restoration: data turns into noise around a known degraded image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from pliant.errors import ConfigError, suggest
from pliant.paths.families import Diffusion, interpolated_table, table_position
from pliant.paths.path import as_time, register_path

THETAS = ("cosine", "constant", "linear")


@lru_cache(maxsize=16)
def _decay_table(theta: str, num_timesteps: int, last_alpha: float) -> Tensor:
    """-ln(alpha) at t = 0, 1/T, ..., 1, from 0 to -ln(last_alpha)."""
    if theta == "cosine":
        j = torch.arange(num_timesteps + 3, dtype=torch.float64)  # n = T + 2 intervals, as IR-SDE's code
        f = torch.cos(0.5 * math.pi * (j / (num_timesteps + 2) + 0.008) / 1.008) ** 2
        rates = 1.0 - f[1:-1] / f[0]
    elif theta == "linear":
        scale = 1000.0 / (num_timesteps + 1)
        rates = torch.linspace(scale * 1e-4, scale * 2e-2, num_timesteps + 1, dtype=torch.float64)
    else:
        rates = torch.ones(num_timesteps + 1, dtype=torch.float64)
    total = torch.cumsum(rates, 0) - rates[0]
    return -math.log(last_alpha) * total / total[-1]


@register_path
@dataclass(frozen=True)
class MeanReverting(Diffusion):
    """IR-SDE, arXiv 2301.11699: `x_t = alpha*x0 + (1-alpha)*mu + sigma*eps`, `sigma = sigma_inf sqrt(1 - alpha^2)`.

    mu is the degraded image; it is passed to whoever needs it and `offset(t) = 1 - alpha` is its coefficient. Since
    `z = x - mu` follows the plain path alpha, sigma, all conversions and solvers are about z (sheet D, section 10).
    theta: the speed of reversion ("cosine", "constant", "linear"); a table of `num_timesteps` steps, ln(alpha) linear
    between them, from alpha = 1 to alpha = `last_alpha`. (MR-Sampler's code shifts alpha, but not sigma, by
    theta_0; here both come from one table.)
    """

    name: ClassVar[str] = "mean-reverting"
    theta: str = "cosine"
    sigma_inf: float = 50.0 / 255.0
    num_timesteps: int = 100
    last_alpha: float = 0.005

    def __post_init__(self) -> None:
        if self.theta not in THETAS:
            raise ConfigError(f"unknown reversion speed {self.theta!r}: {suggest(self.theta, THETAS)}")
        if self.sigma_inf <= 0.0 or self.num_timesteps < 1 or not 0.0 < self.last_alpha < 1.0:
            raise ConfigError(
                f"path 'mean-reverting' needs sigma_inf > 0, num_timesteps > 0 and 0 < last_alpha < 1, got "
                f"{self.sigma_inf}, {self.num_timesteps}, {self.last_alpha}"
            )

    @property
    def trained_times(self) -> tuple[float, float]:
        return 1.0 / self.num_timesteps, 1.0

    def time_of_timestep(self, timestep: float | Tensor) -> Tensor:
        """House time of IR-SDE's step i = 0..T; step 0 is clean data."""
        return as_time(timestep) / self.num_timesteps

    def offset(self, t: float | Tensor) -> Tensor:
        decay, _ = self._decay(as_time(t))
        return -torch.expm1(-decay)

    def _decay(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return interpolated_table(_decay_table(self.theta, self.num_timesteps, self.last_alpha), t)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decay, slope = self._decay(t)
        alpha = torch.exp(-decay)
        dalpha = -alpha * slope
        spread = torch.sqrt(-torch.expm1(-2.0 * decay))
        return alpha, self.sigma_inf * spread, dalpha, -self.sigma_inf * alpha * dalpha / spread

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        # n = sigma_inf sqrt(e^(2g) - 1) for decay g
        growth = -2.0 * as_time(log_snr) - 2.0 * math.log(self.sigma_inf)
        decay = 0.5 * torch.logaddexp(growth, torch.zeros((), dtype=torch.float64))
        return table_position(_decay_table(self.theta, self.num_timesteps, self.last_alpha), decay)

    def pair_of_velocity(self, v: Tensor, x: Tensor, mu: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """(x0, eps) from MR-Sampler's `v = alpha*eps*sigma_inf - (sigma/sigma_inf)*(x0 - mu)` (arXiv 2502.07856)."""
        s = self.alpha_sigma(t)
        alpha, spread = float(s.alpha), float(s.sigma) / self.sigma_inf
        return alpha * x - spread * v + (1.0 - alpha) * mu, (alpha * v + spread * (x - mu)) / self.sigma_inf
