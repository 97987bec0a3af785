"""Variance-exploding paths: EDM's, and PFGM++ that changes only the law of the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from pliant.errors import ConfigError
from pliant.paths.families import Diffusion
from pliant.paths.path import as_time, register_path


@register_path
@dataclass(frozen=True)
class EDM(Diffusion):
    """EDM's path, arXiv 2206.00364: `x_t = x0 + sigma*eps` with `sigma = sigma_max * t`.

    House time is sigma in units of sigma_max, so Euler, Heun and midpoint steps in t *are* EDM's steps in sigma, and
    t = 0 is clean data. Networks are trained on sigma_min..sigma_max (score SDE's VE: 0.02..100). A grid uniform in t
    would waste its steps: the default grid of this path is Karras's, with exponent `rho`. Noise beyond sigma_max
    (churn) lies at t > 1: `alpha_sigma` continues there, the inverse does not.
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max:
            found = f"{self.sigma_min} and {self.sigma_max}"
            raise ConfigError(f"path {self.name!r} needs 0 < sigma_min < sigma_max, got {found}")
        if self.rho <= 0.0:
            raise ConfigError(f"path {self.name!r} needs a positive rho, got {self.rho}")

    @property
    def trained_times(self) -> tuple[float, float]:
        return self.sigma_min / self.sigma_max, 1.0

    def time_of_sigma(self, sigma: float | Tensor) -> Tensor:
        """House time of a noise level; above 1 beyond sigma_max."""
        return as_time(sigma) / self.sigma_max

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return one, self.sigma_max * t, torch.zeros_like(t), self.sigma_max * one

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        return torch.clamp(torch.exp(-as_time(log_snr)) / self.sigma_max, 0.0, 1.0)


@register_path
@dataclass(frozen=True)
class PFGMpp(EDM):
    """PFGM++, arXiv 2302.04265: EDM with heavy-tailed noise, eps ~ Student-t(D); the paper's r is sigma sqrt(D).

    One chi-square per *sample*: the radius is shared by all its elements, which are dependent. D -> infinity is EDM.
    Solvers, grids and preconditioning are EDM's; only start states and training noise change (`sample_noise`). What is
    called score here is -eps/sigma, not the gradient of a log-density.
    """

    name: ClassVar[str] = "pfgmpp"
    dimensions: int = 2048
    """D, the number of augmented dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimensions < 1:
            raise ConfigError(f"PFGM++ needs at least 1 augmented dimension, got {self.dimensions}; EDM is its limit")

    def sample_noise(self, shape: Sequence[int], generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise (B, ...): each row `g * sqrt(D/chi2_D)`, g standard normal."""
        normal = super().sample_noise(shape, generator, torch.float64)
        half = torch.full((normal.shape[0],), 0.5 * self.dimensions, dtype=torch.float64, device=normal.device)
        # The seedable sampler behind torch.distributions.Gamma, which takes no generator; chi2_D = 2 Gamma(D/2).
        chi2 = 2.0 * torch._standard_gamma(half, generator=generator)
        return (normal * torch.sqrt(self.dimensions / chi2).reshape(-1, *[1] * (normal.ndim - 1))).to(dtype)

    def radius(self, t: float | Tensor) -> Tensor:
        """The paper's r = sigma sqrt(D) at house time t."""
        return self.sigma_max * self.dimensions**0.5 * as_time(t)

    def time_of_radius(self, r: float | Tensor) -> Tensor:
        """Inverse of `radius`."""
        return self.time_of_sigma(as_time(r) / self.dimensions**0.5)

    def log_kernel(self, squared_distance: Tensor, elements: int, t: float | Tensor) -> Tensor:
        """ln p_r(x | y) up to a constant in y, from |x - y|^2, for samples of `elements` numbers.

        Its softmax over a data set weighs that set's points in the exact denoiser (and in stable targets).
        """
        power = -0.5 * (elements + self.dimensions)
        return power * torch.log(squared_distance + self.radius(t).to(squared_distance.device) ** 2)
