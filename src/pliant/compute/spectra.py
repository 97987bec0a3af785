"""The power spectrum of a data set: the mean square of every orthonormal cosine coefficient, as the network sees it.

Frequencies are in cycles per image (of the shorter side): cosine coefficient (k, l) of an H x W image has
`omega = min(H, W)/2 * sqrt((k/H)^2 + (l/W)^2)`, |k|/2 for squares, and the Nyquist frequency is min(H, W)/2. White
noise of unit variance has power 1 everywhere. A spectrum belongs to one grid: the same content on r times finer pixels
has r^2 times the power at equal cycles per image (sheet H, 1, pitfall j).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.errors import ConfigError, ShapeError, suggest


def frequencies(size: tuple[int, int]) -> Tensor:
    """(H, W) float64: omega of every cosine coefficient, in cycles per image."""
    h, w = size
    k, l = (torch.arange(n, dtype=torch.float64) / n for n in size)  # noqa: E741 (k, l: as in the formula)
    return torch.hypot(k[:, None], l[None]) * (min(h, w) / 2)


@dataclass(frozen=True)
class Spectrum(ABC):
    """Power of the data by frequency. Frozen, hashable and JSON-ready: `to_config()` / `spectrum_from_config()`."""

    kind: ClassVar[str]

    @abstractmethod
    def power(self, size: tuple[int, int]) -> Tensor:
        """(H, W) float64: the power of every orthonormal cosine coefficient of an image of this size."""

    @abstractmethod
    def at(self, omega: float) -> float:
        """The power at a frequency in cycles per image."""

    def to_config(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class PowerLaw(Spectrum):
    """`amplitude * omega^(-exponent)`, and below half a cycle what it is there. Exponent 0 is white."""

    kind: ClassVar[str] = "power-law"
    amplitude: float
    exponent: float

    def __post_init__(self) -> None:
        if not (0.0 <= self.amplitude < math.inf and math.isfinite(self.exponent)):
            raise ConfigError(f"a power law needs a finite amplitude >= 0 and exponent, got {self}")

    def power(self, size: tuple[int, int]) -> Tensor:
        return self.amplitude * frequencies(size).clamp(min=0.5) ** -self.exponent

    def at(self, omega: float) -> float:
        return self.amplitude * max(omega, 0.5) ** -self.exponent


@dataclass(frozen=True)
class RadialSpectrum(Spectrum):
    """Measured power at 0, 1, 2, ... cycles per image; log-log between them, constant beyond both ends."""

    kind: ClassVar[str] = "radial"
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if len(self.values) < 2 or not all(0.0 <= v < math.inf for v in self.values):
            raise ConfigError("a radial spectrum needs at least two finite values >= 0")

    def power(self, size: tuple[int, int]) -> Tensor:
        return self._at(frequencies(size))

    def at(self, omega: float) -> float:
        return float(self._at(torch.tensor(float(omega), dtype=torch.float64)))

    def _at(self, omega: Tensor) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        omega = omega.clamp(0, len(values) - 1)
        below = omega.floor().long().clamp(max=len(values) - 2)
        a, b = values[below], values[below + 1]
        # Frequencies below 1 have no logarithm to 0: linear there, and wherever a value is 0.
        share = omega - below
        logarithmic = torch.log(omega.clamp(min=1) / below.clamp(min=1)) / torch.log1p(1.0 / below.clamp(min=1))
        plain = a + share * (b - a)
        straight = torch.exp(torch.log(a) + logarithmic * (torch.log(b) - torch.log(a)))
        return torch.where((below >= 1) & (a > 0) & (b > 0), straight, plain)


@dataclass(frozen=True)
class CoefficientSpectrum(Spectrum):
    """Measured power of every cosine coefficient of one image size: what isotropy would average away."""

    kind: ClassVar[str] = "coefficients"
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(tuple(float(v) for v in row) for row in self.values))
        flat = [v for row in self.values for v in row]
        if not flat or any(len(row) != len(self.values[0]) for row in self.values):
            raise ConfigError("a coefficient spectrum needs a rectangular table (H, W)")
        if not all(0.0 <= v < math.inf for v in flat):
            raise ConfigError("a coefficient spectrum needs finite values >= 0")

    @staticmethod
    def of(power: Tensor) -> CoefficientSpectrum:
        """power: (H, W)."""
        return CoefficientSpectrum(tuple(tuple(row) for row in power.to(torch.float64).tolist()))

    def power(self, size: tuple[int, int]) -> Tensor:
        table = torch.tensor(self.values, dtype=torch.float64)
        if tuple(table.shape) != tuple(size):
            raise ShapeError(f"this spectrum was measured at {tuple(table.shape)} pixels, not {tuple(size)}")
        return table

    def at(self, omega: float) -> float:
        """The mean over the coefficients within half a cycle of the frequency; the nearest one where there is none."""
        table = torch.tensor(self.values, dtype=torch.float64)
        distance = (frequencies((table.shape[0], table.shape[1])) - omega).abs()
        return float(table[distance <= max(0.5, float(distance.min()))].mean())


_KINDS: dict[str, type[Spectrum]] = {c.kind: c for c in (PowerLaw, RadialSpectrum, CoefficientSpectrum)}


def spectrum_from_config(config: dict[str, Any]) -> Spectrum:
    """Inverse of `Spectrum.to_config`. Raises ConfigError for an unknown kind or field."""
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ConfigError(f"unknown spectrum {kind!r}: {suggest(str(kind), _KINDS)}")
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ConfigError(f"spectrum {kind!r} does not take these fields: {error}") from None
