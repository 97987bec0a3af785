"""Variance-preserving paths given by any table of noise levels: what a foreign model was trained on, exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths.families import VPDiscrete
from pliant.paths.path import Coefficients, Path, as_time, register_path


@lru_cache(maxsize=16)
def _log_alphas(alphas_cumprod: tuple[float, ...]) -> Tensor:
    """ln sqrt(abar) at t = 0, 1/T, ..., 1; entry 0 is clean data, the last is -inf for a zero terminal SNR."""
    table = torch.tensor(alphas_cumprod, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log(table)])


@register_path
@dataclass(frozen=True)
class VPTable(Path):
    """A table of abar (alpha^2), noisier with every entry. Timestep k lies at `t = (k+1)/T`; t = 0 is clean data.

    Between entries ln(alpha) is linear in t, as in `vp-discrete`, except in the last interval of a table that ends at
    exactly 0 (zero terminal SNR, arXiv 2305.08891): there alpha itself is linear.
    """

    name: ClassVar[str] = "vp-table"
    alphas_cumprod: tuple[float, ...] = field(default_factory=lambda: tuple(VPDiscrete().alphas_cumprod.tolist()))
    """Default: DDPM's 1000 levels."""

    def __post_init__(self) -> None:
        table = tuple(float(v) for v in self.alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", table)
        falling = all(a > b for a, b in zip((1.0, *table), table, strict=False))
        if not table or not falling or table[-1] < 0.0:
            raise ConfigError("alphas_cumprod must fall strictly from below 1 to 0 or more, one value per timestep")

    @property
    def trained_times(self) -> tuple[float, float]:
        return 1.0 / self.num_timesteps, 1.0

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def time_of_timestep(self, timestep: float | Tensor) -> Tensor:
        """House time of a (possibly fractional) table timestep."""
        return (as_time(timestep) + 1.0) / self.num_timesteps

    def coefficients(self, t: float | Tensor) -> Coefficients:
        t = as_time(t)
        table, total = _log_alphas(self.alphas_cumprod).to(t.device), self.num_timesteps
        place = t.clamp(0.0, 1.0) * total
        nearest = torch.round(place)  # times that mean an entry must hit it exactly: (k+1)/T*T may be off by an ulp
        place = torch.where((place - nearest).abs() < 1e-9 * total, nearest, place)
        left = place.floor().clamp(max=total - 1).long()
        dark = torch.isinf(table[left + 1])  # the interval that ends without any signal
        slope = torch.where(dark, 0.0, table[left + 1] - table[left])
        log_alpha = table[left] + (place - left) * slope
        top = torch.exp(table[-2])
        alpha = torch.where(dark, top * (total - place), torch.exp(log_alpha))
        # 1 - alpha^2 without cancellation near alpha = 1, where the first branch never is.
        sigma = torch.sqrt(torch.where(dark, 1.0 - alpha**2, -torch.expm1(2.0 * log_alpha)))
        dalpha = torch.where(dark, -top * total, alpha * slope * total)
        zero = torch.zeros_like(alpha)
        return Coefficients(alpha, zero, sigma, dalpha, zero, -alpha * dalpha / sigma)

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        target = 0.5 * torch.logaddexp(-2.0 * as_time(log_snr), torch.zeros((), dtype=torch.float64))  # -ln alpha
        table, total = -_log_alphas(self.alphas_cumprod).to(target.device), self.num_timesteps
        right = torch.searchsorted(table, target).clamp(1, total)
        low, high = table[right - 1], table[right]
        inside = torch.where(torch.isinf(high), 1.0 - torch.exp(low - target), (target - low) / (high - low))
        return torch.clamp((right - 1 + inside) / total, 0.0, 1.0)
