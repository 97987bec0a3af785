"""Which low band of the state a call's network is shown: a smaller grid, without training (sheet H, section 0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from pliant.compute.bands import Band, Size, check_band, coarse_size, power_in_band
from pliant.compute.numbers import is_number
from pliant.compute.spectra import Spectrum, spectrum_from_config
from pliant.errors import ConfigError, suggest

Missing: TypeAlias = Literal["hold", "wiener"]
Positions: TypeAlias = Literal["center", "corner", "own"]


@dataclass(frozen=True)
class LowBand:
    """Which low band a network is shown and what is believed about the rest. Frozen, hashable, JSON-ready."""

    ratio: tuple[float, float] = (2, 2)
    """Full pixels per coarse one, (height, width); "haar" needs whole numbers."""
    band: Band = "haar"
    missing: Missing = "hold"
    spectrum: Spectrum | None = None
    """The data's power, which "wiener" needs."""
    positions: Positions = "own"
    """Where the network believes its coarse tokens are. "own": on a small grid of their own, 0, 1, 2, ...; "center":
    spread over the same field of view; "corner": at the corners of what they cover. Which is closer depends on what the
    network saw: measure (docs/scale.md)."""

    def __post_init__(self) -> None:
        check_band(self.band)
        if self.missing not in get_args(Missing):
            known = suggest(str(self.missing), get_args(Missing))
            raise ConfigError(f"unknown rule for the missing band {self.missing!r}: {known}")
        if self.missing == "wiener" and self.spectrum is None:
            raise ConfigError(
                "the missing band's 'wiener' guess needs the data's spectrum: measure one with "
                "pliant.evaluation.spectrum.measure(images), or use missing='hold'"
            )
        if not all(is_number(r) and r >= 1 for r in self.ratio):
            raise ConfigError(f"a scale ratio is at least 1 (2 halves the side), got {self.ratio}")
        if self.positions not in get_args(Positions):
            known = suggest(str(self.positions), get_args(Positions))
            raise ConfigError(f"unknown rule for coarse positions {self.positions!r}: {known}")

    @staticmethod
    def of(ratio: float | Sequence[float] = 2, **options: Any) -> LowBand:
        """The same, taking one number for both axes."""
        pair = (ratio, ratio) if isinstance(ratio, int | float) else tuple(ratio)
        if len(pair) != 2:
            raise ConfigError(f"a scale ratio is one number or (height, width), got {ratio!r}")
        return LowBand((pair[0], pair[1]), **options)

    @property
    def trivial(self) -> bool:
        """Whether the low band is everything: calls are the plain network's."""
        return self.ratio == (1, 1)

    def coarse_size(self, size: Size) -> Size:
        """The smaller grid of a full one. Raises ConfigError where it has no whole pixels."""
        return coarse_size(size, self.ratio, self.band)

    def missing_power(self, size: Size) -> float | Tensor:
        """w: 0 for "hold", else (H, W) float64 by coefficient of the band."""
        if self.missing == "hold" or self.spectrum is None:
            return 0.0
        return power_in_band(self.spectrum.power(size), self.coarse_size(size), self.band)

    def to_config(self) -> dict[str, Any]:
        return {
            "ratio": list(self.ratio),
            "band": self.band,
            "missing": self.missing,
            "spectrum": None if self.spectrum is None else self.spectrum.to_config(),
            "positions": self.positions,
        }

    def describe(self) -> str:
        """e.g. `1/2 haar hold`."""
        sides = self.ratio if self.ratio[0] != self.ratio[1] else self.ratio[:1]
        return f"1/{'x'.join(f'{r:g}' for r in sides)} {self.band} {self.missing}"

    @staticmethod
    def from_config(config: dict[str, Any]) -> LowBand:
        """Inverse of `to_config`. Raises ConfigError for an unknown field."""
        if not isinstance(config, dict):
            raise ConfigError(f"scale is {config!r}; expected an object like {{\"ratio\": 2}}")
        fields = dict(config)
        for name in fields:
            if name not in LowBand.__dataclass_fields__:
                raise ConfigError(f"a scale has no option {name!r}: {suggest(str(name), LowBand.__dataclass_fields__)}")
        spectrum = fields.pop("spectrum", None)
        try:
            return LowBand.of(**fields, spectrum=None if spectrum is None else spectrum_from_config(spectrum))
        except TypeError:
            raise ConfigError(f"cannot read the scale {config!r}; expected an object like {{\"ratio\": 2}}") from None
