"""Preconditioned networks: `D = c_skip*y + c_out*F(c_in*y, c_noise)` estimates clean data, F is the bare network.

y = x0 + sigma*eps is the state on EDM's path (arXiv 2206.00364, table 1); on any other path it is x/alpha, and sigma is
the noise ratio sigma/alpha. So the same network works on every path.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from pliant.errors import ConfigError, suggest
from pliant.paths.path import as_time

PreconditioningKind: TypeAlias = Literal["edm", "vp", "ve", "iddpm"]
KINDS: tuple[PreconditioningKind, ...] = get_args(PreconditioningKind)

_BETA_MIN, _BETA_SLOPE, _STEPS = 0.1, 19.9, 1000  # score SDE's VP, and the networks' number of training steps


class Preconditioned(NamedTuple):
    """The four numbers of one call, `x0 = skip*x + out*F(inp*x, noise)`, float64, of sigma's shape."""

    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Preconditioning:
    """One row of EDM's table 1.

    "edm": for data of standard deviation `sigma_data`, input and target of F have unit variance at every sigma (0.5 for
    pixels in [-1, 1], about 1 for latents; k-diffusion's default is 1). "vp" (score SDE's VP networks), "iddpm"
    (Improved DDPM's table): F estimates the noise. "ve" (score SDE's VE networks): F estimates minus the noise.
    """

    kind: PreconditioningKind = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown preconditioning {self.kind!r}: {suggest(str(self.kind), KINDS)}")
        if self.sigma_data <= 0.0:
            raise ConfigError(f"sigma_data must be positive, got {self.sigma_data}")

    def coefficients(self, sigma: float | Tensor, alpha: float | Tensor = 1.0) -> Preconditioned:
        """(c_skip, c_out, c_in, c_noise) at these noise levels; for states alpha*x0 + sigma*eps if alpha is given."""
        noise, signal = torch.broadcast_tensors(as_time(sigma), as_time(alpha))
        n = noise / signal
        if self.kind == "edm":
            # c(n)/alpha, multiplied out: finite where alpha = 0, that is for pure noise.
            total = torch.hypot(noise, signal * self.sigma_data)
            skip, out = signal * (self.sigma_data / total) ** 2, self.sigma_data * noise / total
            return Preconditioned(skip, out, 1.0 / total, 0.25 * torch.log(n))
        if self.kind == "ve":
            return Preconditioned(1.0 / signal, n, 1.0 / signal, torch.log(0.5 * n))
        step = (_STEPS - 1.0) * vp_time(n) if self.kind == "vp" else _STEPS - 1.0 - _nearest(n)
        return Preconditioned(1.0 / signal, -n, 1.0 / torch.hypot(noise, signal), step)

    def c_skip(self, sigma: float | Tensor) -> Tensor:
        return self.coefficients(sigma).skip

    def c_out(self, sigma: float | Tensor) -> Tensor:
        return self.coefficients(sigma).out

    def c_in(self, sigma: float | Tensor) -> Tensor:
        return self.coefficients(sigma).inp

    def c_noise(self, sigma: float | Tensor) -> Tensor:
        return self.coefficients(sigma).noise

    def loss_weight(self, sigma: float | Tensor) -> Tensor:
        """The weight of |D - x0|^2 that makes training a plain squared error in F: 1/c_out^2."""
        return self.coefficients(sigma).out ** -2.0

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """The nearest level the network knows: an entry of "iddpm"'s table, sigma itself for the others."""
        sigma = as_time(sigma)
        return iddpm_sigmas().to(sigma.device)[_nearest(sigma)] if self.kind == "iddpm" else sigma

    def to_config(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_config(config: dict[str, Any]) -> Preconditioning:
        try:
            return Preconditioning(**config)
        except TypeError as error:
            raise ConfigError(f"preconditioning takes kind and sigma_data: {error}") from None


def vp_sigma(t: float | Tensor) -> Tensor:
    """sigma of score SDE's VP path at its time t: `sqrt(exp(19.9 t^2/2 + 0.1 t) - 1)`."""
    t = as_time(t)
    return torch.sqrt(torch.expm1(0.5 * _BETA_SLOPE * t**2 + _BETA_MIN * t))


def vp_time(sigma: float | Tensor) -> Tensor:
    """Inverse of `vp_sigma`."""
    growth = torch.log1p(as_time(sigma) ** 2)
    return 2.0 * growth / (torch.sqrt(_BETA_MIN**2 + 2.0 * _BETA_SLOPE * growth) + _BETA_MIN)


@lru_cache(maxsize=1)
def iddpm_sigmas() -> Tensor:
    """Improved DDPM's noise levels u_0 > ... > u_999 (cosine schedule, C1 = 0.001, C2 = 0.008), float64."""
    angle = 0.5 * math.pi * torch.arange(_STEPS + 1, dtype=torch.float64) / (_STEPS * 1.008)
    ratio = (torch.sin(angle[:-1]) / torch.sin(angle[1:])).square().clamp(min=0.001).tolist()
    levels, u = [], 0.0
    for r in reversed(ratio):
        u = math.sqrt((u * u + 1.0) / r - 1.0)
        levels.append(u)
    return torch.tensor(levels[::-1], dtype=torch.float64)


def _nearest(sigma: Tensor) -> Tensor:
    """Index of the nearest table entry."""
    return (sigma.unsqueeze(-1) - iddpm_sigmas().to(sigma.device)).abs().argmin(-1)
