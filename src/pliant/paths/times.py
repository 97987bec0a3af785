"""The basic time grids and time densities for training. Grids are float64 and decreasing; more are in `grids.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from pliant.errors import ConfigError, PlanError, suggest
from pliant.paths.families import VPDiscrete
from pliant.paths.path import Path
from pliant.paths.table import VPTable


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise PlanError(f"a time grid needs at least 1 step, got {steps}")


def uniform_times(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """`steps`+1 equally spaced times from start (noise) to end (data)."""
    _check_steps(steps)
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def needs_log_snr(path: Path, grid: str) -> None:
    """Raise PlanError for a path without a log-SNR, which a grid of this name spaces."""
    if not path.gaussian_source:
        raise PlanError(
            f"a {grid!r} grid spaces noise ratios, but path {path.name!r} has none: its source is not Gaussian. "
            f"Use 'uniform', 'quadratic', 'sigmoid' or 'shifted'"
        )


def log_snr_times(path: Path, steps: int, start: float = 1.0, end: float = 0.0, last: float = 1e-3) -> Tensor:
    """Times uniform in log-SNR from `start` to `last`, then `end`: DPM-Solver's grid for small images.

    log-SNR is infinite at the ends of most paths, so the uniform part runs between finite values: `last` > end, and
    a start with alpha = 0 is moved to 1 - 1e-3 for the spacing only (the grid still begins at `start`).
    """
    _check_steps(steps)
    needs_log_snr(path, "log-snr")
    if steps == 1:
        return torch.tensor([start, end], dtype=torch.float64)
    first = start if bool(torch.isfinite(path.log_snr(start))) else start - 1e-3
    grid = torch.linspace(float(path.log_snr(first)), float(path.log_snr(last)), steps, dtype=torch.float64)
    times = path.time_of_log_snr(grid)
    times[0] = start
    return torch.cat([times, torch.tensor([end], dtype=torch.float64)])


def _spaced_timesteps(total: int, spec: str) -> list[int]:
    """Official DiT's respacing (ascending table timesteps): "250", "ddim50" or sections "10,20,30"."""
    if spec.startswith("ddim"):
        count = _integer(spec[4:], spec)
        for stride in range(1, total + 1):  # the official rule: the integer stride that gives exactly `count`
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise PlanError(f"no integer stride gives {count} of {total} timesteps; use {spec[4:]!r} for a rounded spacing")
    sections = [_integer(part, spec) for part in spec.split(",")]
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        size = total // len(sections) + (1 if i < total % len(sections) else 0)
        if not 1 <= count <= size:
            raise PlanError(f"respacing {spec!r} asks for {count} of {size} timesteps; use 1 to {size}")
        gap = 1.0 if count <= 1 else (size - 1) / (count - 1)
        chosen += [start + round(k * gap) for k in range(count)]  # Python rounding, half to even, as official
        start += size
    return chosen


def _integer(text: str, spec: str) -> int:
    if not text.strip().isdigit():
        raise PlanError(f"respacing {spec!r} is not a number of steps; write e.g. '250', 'ddim50' or '10,20,30'")
    return int(text)


def respaced_times(path: VPDiscrete | VPTable, spec: str | int) -> Tensor:
    """Times of a respaced discrete process, noisiest first, then t = 0 (official DiT's `space_timesteps`)."""
    if not isinstance(path, VPDiscrete | VPTable):
        raise PlanError(f"respacing chooses entries of a table, but path {path.name!r} has none; use uniform_times")
    steps = _spaced_timesteps(path.num_timesteps, str(spec))
    times = path.time_of_timestep(torch.tensor(sorted(set(steps)), dtype=torch.float64))
    return torch.cat([times.flip(0), torch.zeros(1, dtype=torch.float64)])


class TimeDensity(Protocol):
    """How training times are drawn."""

    def sample(self, n: int, generator: Generator) -> Tensor:
        """(n,) float64 times in (0, 1)."""
        ...

    def to_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class UniformDensity:
    """t ~ U(low, high)."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, n: int, generator: Generator) -> Tensor:
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        return self.low + (self.high - self.low) * u

    def density(self, t: Tensor) -> Tensor:
        """Of times t (any shape), float64."""
        t = t.double()
        return ((t >= self.low) & (t <= self.high)).double() / (self.high - self.low)

    def to_config(self) -> dict[str, Any]:
        return {"name": "uniform", "low": self.low, "high": self.high}


@dataclass(frozen=True)
class LogitNormalDensity:
    """logit(t) ~ N(mean, std^2), SD3 (arXiv 2403.03206, section 3.1). mean > 0 trains more near noise."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, n: int, generator: Generator) -> Tensor:
        z = torch.randn(n, generator=generator, dtype=torch.float64, device=generator.device)
        return torch.sigmoid(self.mean + self.std * z)

    def density(self, t: Tensor) -> Tensor:
        """Of times t (any shape), float64."""
        t = t.double()
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2.0 * math.pi) * t * (1.0 - t))

    def to_config(self) -> dict[str, Any]:
        return {"name": "logit-normal", "mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class ModeDensity:
    """SD3's mode sampling: `t = 1 - u - s (cos^2(pi u/2) - 1 + u)`, u ~ U(0, 1); s in [-1, 2/(pi-2)]."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1.0 <= self.scale <= 2.0 / (math.pi - 2.0):
            raise ConfigError(f"mode density needs a scale in [-1, {2.0 / (math.pi - 2.0):.4f}], got {self.scale}")

    def sample(self, n: int, generator: Generator) -> Tensor:
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        return self._time(u)

    def _time(self, u: Tensor) -> Tensor:
        return 1.0 - u - self.scale * (torch.cos(0.5 * math.pi * u) ** 2 - 1.0 + u)

    def density(self, t: Tensor) -> Tensor:
        """Of times t (any shape), float64: `1/(1 + s - s pi/2 sin(pi u))` at the u that t comes from."""
        t = t.double()
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):  # t falls with u, in no closed form
            u = 0.5 * (low + high)
            above = self._time(u) > t
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1.0 / (1.0 + self.scale - self.scale * 0.5 * math.pi * torch.sin(0.5 * math.pi * (low + high)))

    def to_config(self) -> dict[str, Any]:
        return {"name": "mode", "scale": self.scale}


@dataclass(frozen=True)
class CosMapDensity:
    """SD3's CosMap: `t = 1 - 1/(tan(pi u/2) + 1)`, the cosine schedule's density on the linear path."""

    def sample(self, n: int, generator: Generator) -> Tensor:
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        return 1.0 - 1.0 / (torch.tan(0.5 * math.pi * u) + 1.0)

    def density(self, t: Tensor) -> Tensor:
        """Of times t (any shape), float64."""
        t = t.double()
        return 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t.square()))

    def to_config(self) -> dict[str, Any]:
        return {"name": "cosmap"}


@dataclass(frozen=True)
class UShapedDensity:
    """rfpp's density `a cosh(a (t - 1/2)) / (2 sinh(a/2))` (arXiv 2405.20320, centred as in its code): both ends most.

    Times are drawn by the closed inverse CDF and moved to eps..1, because losses divide by t.
    """

    a: float = 4.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.a <= 0.0 or not 0.0 <= self.eps < 0.5:
            raise ConfigError(f"a u-shaped density needs a > 0 and eps in [0, 0.5), got {self.a} and {self.eps}")

    def sample(self, n: int, generator: Generator) -> Tensor:
        q = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        t = 0.5 + torch.asinh((2.0 * q - 1.0) * math.sinh(0.5 * self.a)) / self.a
        return self.eps + (1.0 - 2.0 * self.eps) * t

    def to_config(self) -> dict[str, Any]:
        return {"name": "u-shaped", "a": self.a, "eps": self.eps}


@dataclass(frozen=True)
class DiscreteDensity:
    """One of these times, each equally often: those at which a few-step sampler calls the network."""

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        if not self.times or not all(0.0 <= t <= 1.0 for t in self.times):
            raise ConfigError(f"a discrete density needs times in [0, 1], got {list(self.times)}")

    def sample(self, n: int, generator: Generator) -> Tensor:
        k = torch.randint(len(self.times), (n,), generator=generator, device=generator.device)
        return torch.tensor(self.times, dtype=torch.float64, device=generator.device)[k]

    def to_config(self) -> dict[str, Any]:
        return {"name": "discrete", "times": list(self.times)}


_DENSITIES: dict[str, type] = {
    "uniform": UniformDensity,
    "logit-normal": LogitNormalDensity,
    "mode": ModeDensity,
    "cosmap": CosMapDensity,
    "u-shaped": UShapedDensity,
    "discrete": DiscreteDensity,
}


def get_time_density(name: str, **options: Any) -> TimeDensity:
    """A time density by name. Raises ConfigError for an unknown name or option."""
    if name not in _DENSITIES:
        raise ConfigError(f"unknown time density {name!r}: {suggest(name, _DENSITIES)}")
    try:
        density: TimeDensity = _DENSITIES[name](**options)
    except TypeError as error:
        raise ConfigError(f"time density {name!r} does not take these options: {error}") from None
    return density
