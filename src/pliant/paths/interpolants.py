"""Stochastic interpolants, arXiv 2303.08797: bridges between two sets of data with a latent noise term.

    x_t = a(t)*x0 + b(t)*x1 + c(t)*z        x0 data (t = 0), x1 source (t = 1), z ~ N(0, I)

The paper's time s runs the other way, s = 1 - t, and calls our x1, x0 its x0, x1 and our c its gamma. Velocities change
their sign with the direction of time, scores and expectations do not. The functions below are the paper's relations in
house time; they take any path, and times as numbers or (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pliant.errors import ConfigError, suggest
from pliant.paths.path import Coefficients, Path, as_time, like, register_path
from pliant.paths.predictions import AlphaSigma

Curve = tuple[Tensor, Tensor]
"""A function of time and its derivative."""


def _bump(s: Tensor) -> Curve:
    """The paper's sigmoid bump, f = 10: zero at both ends."""
    up, down = torch.sigmoid(10.0 * (s - 0.5) + 1.0), torch.sigmoid(10.0 * (s - 0.5) - 1.0)
    start = torch.tensor(-4.0, dtype=torch.float64), torch.tensor(-6.0, dtype=torch.float64)
    ends = (torch.sigmoid(start[0]) - torch.sigmoid(start[1])).to(s.device)
    return up - down - ends, 10.0 * (up * (1.0 - up) - down * (1.0 - down))


# gamma^2 and its derivative: what the algebra needs, finite where gamma' is not. Brownian is scaled by `strength`.
_SQUARES: dict[str, Callable[[Tensor], Curve]] = {
    "zero": lambda s: (torch.zeros_like(s), torch.zeros_like(s)),
    "brownian": lambda s: (s * (1.0 - s), 1.0 - 2.0 * s),
    "quadratic": lambda s: ((s * (1.0 - s)) ** 2, 2.0 * s * (1.0 - s) * (1.0 - 2.0 * s)),
    "sine-squared": lambda s: (
        torch.sin(math.pi * s) ** 4,
        2.0 * math.pi * torch.sin(math.pi * s) ** 2 * torch.sin(2.0 * math.pi * s),
    ),
    "bump": lambda s: (_bump(s)[0] ** 2, 2.0 * _bump(s)[0] * _bump(s)[1]),
}
GAMMAS = tuple(_SQUARES)
KINDS = ("linear", "trig", "encoding-decoding", "mirror")


@register_path
@dataclass(frozen=True)
class Interpolant(Path):
    """Two-sided interpolant between two sets of data.

    kind: "linear" (1-t, t), "trig" (quarter circle, shrunk by sqrt(1 - gamma^2)), "encoding-decoding" (all data is
    gone at t = 1/2; needs a gamma) or "mirror" (x0 + gamma z, no source). gamma: "brownian" sqrt(s(1-s)), "quadratic"
    s(1-s), "sine-squared", "bump" or "zero"; gamma^2 is multiplied by `strength` (the paper's example: Brownian, 2).
    """

    name: ClassVar[str] = "interpolant"
    gaussian_source: ClassVar[bool] = False
    kind: str = "linear"
    gamma: str = "brownian"
    strength: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown interpolant {self.kind!r}: {suggest(self.kind, KINDS)}")
        if self.gamma not in _SQUARES:
            raise ConfigError(f"unknown gamma {self.gamma!r} of an interpolant: {suggest(self.gamma, _SQUARES)}")
        if self.strength <= 0.0:
            raise ConfigError(f"the strength of gamma must be positive, got {self.strength}; use gamma 'zero' for none")
        peak = float(_SQUARES[self.gamma](torch.tensor(0.5, dtype=torch.float64))[0]) * self.strength
        if self.kind == "trig" and peak > 1.0:
            raise ConfigError(f"a trig interpolant needs gamma <= 1 everywhere, got {peak**0.5:.3g} at the middle")

    def gamma_square(self, t: float | Tensor) -> Curve:
        """c^2 and d(c^2)/dt = 2 c c', both finite everywhere."""
        t = as_time(t)
        late = t > 0.5  # all are symmetric: computed from the nearer end, so that both ends are exactly 0
        value, slope = _SQUARES[self.gamma](torch.where(late, 1.0 - t, t))
        return self.strength * value, self.strength * torch.where(late, -slope, slope)

    def gamma_product(self, t: float | Tensor) -> Tensor:
        """c c', finite also where c' is not: all that velocities and drifts need of c'."""
        return 0.5 * self.gamma_square(t)[1]

    def coefficients(self, t: float | Tensor) -> Coefficients:
        t = as_time(t)
        square, slope = self.gamma_square(t)
        c = torch.sqrt(square)
        # c' = (c^2)'/(2c); where c vanishes it is infinite (Brownian) or the slope of a smooth curve's root.
        dc = torch.where(c > 0, 0.5 * slope / torch.where(c > 0, c, 1.0), self._end_slope(t))
        a, b, da, db = self._mix(t, square, slope)
        return Coefficients(a, b, c, da, db, dc)

    def _end_slope(self, t: Tensor) -> Tensor:
        """c' where c = 0: the ends of the path."""
        sign = torch.where(t < 0.5, 1.0, -1.0).to(t)
        if self.gamma == "brownian":
            return sign * math.inf
        if self.gamma == "quadratic":
            return sign * self.strength**0.5
        if self.gamma == "bump":
            return sign * self.strength**0.5 * _bump(torch.zeros_like(t))[1]
        return torch.zeros_like(t)

    def _mix(self, t: Tensor, square: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b and their derivatives."""
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if self.kind == "linear":
            return 1.0 - t, t, -one, one
        if self.kind == "mirror":
            return one, zero, zero, zero
        if self.kind == "trig":
            half = 0.5 * math.pi
            cos, sin = torch.sin(half * (1.0 - t)), torch.sin(half * t)  # so that a(1) is exactly 0
            radius = torch.sqrt(1.0 - square)
            dradius = -0.5 * slope / radius
            return radius * cos, radius * sin, dradius * cos - half * radius * sin, dradius * sin + half * radius * cos
        wave, dwave = torch.cos(math.pi * t) ** 2, -math.pi * torch.sin(2.0 * math.pi * t)
        early = t < 0.5
        return (
            torch.where(early, wave, zero), torch.where(early, zero, wave),
            torch.where(early, dwave, zero), torch.where(early, zero, dwave),
        )  # fmt: skip

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        raise ConfigError(f"path {self.name!r} has a source that is not Gaussian, so it has no log-SNR")


@register_path
@dataclass(frozen=True)
class GaussianInterpolant(Interpolant):
    """One-sided interpolant: the source x1 is N(0, I) too, so x1 and z merge into one noise (gamma "zero" by default).

    Has everything diffusion paths have: log-SNR, all prediction kinds, all solvers and grids. With gamma "zero",
    "linear" is rectified flow and "trig" is GVP.
    """

    name: ClassVar[str] = "one-sided-interpolant"
    gaussian_source: ClassVar[bool] = True
    gamma: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("linear", "trig"):
            raise ConfigError(f"a one-sided interpolant is 'linear' or 'trig', not {self.kind!r}: its source is noise")

    def alpha_sigma(self, t: float | Tensor) -> AlphaSigma:
        t = as_time(t)
        square, slope = self.gamma_square(t)
        a, b, da, db = self._mix(t, square, slope)
        sigma = torch.sqrt(b**2 + square)
        inside = sigma > 0
        start = torch.hypot(db, self._end_slope(t))  # where b = c = 0
        dsigma = torch.where(inside, (b * db + 0.5 * slope) / torch.where(inside, sigma, 1.0), start)
        return AlphaSigma(a, sigma, da, dsigma)

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """By bisection, to the last bit: log-SNR falls with t."""
        target = as_time(log_snr)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(80):  # near t = 0 what matters is the relative error, so more than 53 halvings
            middle = 0.5 * (low + high)
            early = self.log_snr(middle) > target
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return torch.where(target == -math.inf, 1.0, 0.5 * (low + high))


class Estimates(NamedTuple):
    """E[x0 | x_t], E[x1 | x_t] and E[z | x_t]; they satisfy `a*x0 + b*x1 + c*z = x_t`."""

    x0: Tensor
    x1: Tensor
    z: Tensor


def complete(path: Path, x: Tensor, t: float | Tensor, known: dict[str, Tensor]) -> Estimates:
    """The third estimate from two (keys among "x0", "x1", "z"). Infinite where the missing one's coefficient is 0."""
    s = path.coefficients(t)
    weights = {"x0": like(s.a, x), "x1": like(s.b, x), "z": like(s.c, x)}
    missing = [k for k in weights if k not in known]
    if len(known) != 2 or len(missing) != 1:
        raise ConfigError(f"give two of 'x0', 'x1' and 'z' to find the third, got {sorted(known)}")
    rest = x
    for k, value in known.items():
        rest = rest - weights[k] * value
    return Estimates(**{**known, missing[0]: rest / weights[missing[0]]})


def velocity_of_estimates(path: Path, e: Estimates, t: float | Tensor) -> Tensor:
    """dx/dt = a' x0 + b' x1 + c' z. Not for the ends of a Brownian gamma, where c' is infinite."""
    s = path.coefficients(t)
    return like(s.da, e.x0) * e.x0 + like(s.db, e.x0) * e.x1 + like(s.dc, e.x0) * e.z


def score_of_noise(path: Path, z: Tensor, t: float | Tensor) -> Tensor:
    """grad log p_t = -E[z|x]/c: away from the ends only, which is why networks learn z. (interflow's learn -E[z|x].)"""
    return -z / like(path.coefficients(t).c, z)


def noise_of_score(path: Path, score: Tensor, t: float | Tensor) -> Tensor:
    """E[z|x] = -c * score."""
    return -like(path.coefficients(t).c, score) * score


def velocity_of_parts(path: Interpolant, transport: Tensor, score: Tensor, t: float | Tensor) -> Tensor:
    """dx/dt from the transport part `E[a' x0 + b' x1 | x]` and the score: `transport - c c' score`."""
    return transport - like(path.gamma_product(t), score) * score


def sde_drift(velocity: Tensor, score: Tensor, strength: float | Tensor, towards: str = "data") -> Tensor:
    """Drift, per unit of house time, of the SDE with noise `sqrt(2 strength |dt|)` that has the ODE's marginals.

    House time falls on the way to data: `v - e*score` there, `v + e*score` on the way to the source. strength: e >= 0,
    a number or (B,); let it vanish with c at the ends (for instance e0*c^2), where the score is not determined.
    """
    if towards not in ("data", "source"):
        raise ConfigError(f"an SDE runs towards 'data' or 'source', not {towards!r}")
    e = like(as_time(strength), score)
    return velocity - e * score if towards == "data" else velocity + e * score


def sde_noise(strength: float | Tensor, h: float | Tensor) -> Tensor:
    """Standard deviation of the noise of a step of size |h|: sqrt(2 e |h|). Float64."""
    return torch.sqrt(2.0 * as_time(strength) * as_time(h).abs())


def antithetic_pair(path: Path, x0: Tensor, x1: Tensor, z: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """The states with +z and -z: averaging a loss over both cancels its 1/c (or c') terms near the ends."""
    return path.interpolate(x0, x1, z, t), path.interpolate(x0, x1, -z, t)


def quadratic_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """`|P|^2/2 - target.P` per sample, (B,): |P - target|^2/2 without the constant, which diverges at the ends."""
    return (0.5 * prediction.square() - target * prediction).flatten(1).sum(1)
