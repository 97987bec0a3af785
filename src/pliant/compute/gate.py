"""Gates: reuse decided while sampling, from how much a cheap probe has changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from pliant.compute.sites import parse_sites
from pliant.errors import ConfigError, suggest

Signal = Literal["residual", "input"]
Reference = Literal["last_step", "last_full"]


@dataclass(frozen=True)
class Gate:
    """Run the sites of `on_hit` instead of the call's own when the probe has hardly changed.

    Sites 0..probe-1 always run. Their signal is compared with the one remembered from the reference call, per sample:
    `d = mean|now - then| / mean|then|`, optionally through a polynomial, optionally summed over calls since the last
    full one. Hit if `d < threshold`; the first call, and one after `max_run` hits in a row, is always a miss.
    """

    threshold: float
    on_hit: str
    """Sites of a hit, e.g. "R2C22"; as many as the model's, and R over the probe."""
    probe: int = 0
    signal: Signal = "residual"
    """residual: what the probe sites added to the state. input: the normalised, modulated input of site `probe`."""
    reference: Reference = "last_full"
    polynomial: tuple[float, ...] = ()
    """Highest power first, applied to d; TeaCache's rescaling."""
    accumulate: bool = False
    max_run: int | None = None

    def __post_init__(self) -> None:
        choices = {"signal": get_args(Signal), "reference": get_args(Reference)}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"gate has {name} {value!r}; {suggest(str(value), known)}")
        letters = parse_sites(self.on_hit)
        if "C" not in letters and "K" not in letters:
            raise ConfigError(f"a gate's on_hit {self.on_hit!r} saves nothing: it needs sites that are C or K")
        if not 0 <= self.probe <= len(letters) or set(letters[: self.probe]) - {"R"}:
            raise ConfigError(f"a gate with a probe of {self.probe} sites needs on_hit to begin with R{self.probe}")
        if self.signal == "residual" and self.probe == 0:
            raise ConfigError("a gate on the probe's residual needs probe >= 1 sites")
        if not (isinstance(self.threshold, (int, float)) and self.threshold >= 0):
            raise ConfigError(f"gate has threshold {self.threshold!r}; expected a number >= 0")
        if math.isinf(self.threshold) and self.max_run is None:
            raise ConfigError("a gate with an infinite threshold never recomputes; give it max_run, or a number")
        if self.max_run is not None and (not isinstance(self.max_run, int) or self.max_run < 1):
            raise ConfigError(f"gate has max_run {self.max_run!r}; expected a whole number >= 1, or none")
        object.__setattr__(self, "polynomial", tuple(float(c) for c in self.polynomial))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "polynomial": list(self.polynomial)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Gate:
        """Inverse of `to_dict`. Raises ConfigError for unknown or missing fields."""
        try:
            return Gate(**values)
        except TypeError as error:
            raise ConfigError(f"this is not a gate: {error}") from None

    def change(self, now: Tensor, then: Tensor) -> Tensor:
        """(B,) float32: the probe's relative change, rescaled. now, then (B, N, D)."""
        now, then = now.float(), then.float()
        axes = tuple(range(1, now.ndim))
        d = (now - then).abs().mean(axes) / then.abs().mean(axes).clamp_min(1e-30)
        if not self.polynomial:
            return d
        value = d.new_zeros(d.shape)
        for c in self.polynomial:
            value = value * d + c
        return value

    def describe(self) -> str:
        """e.g. `gate < 0.08 -> R2C22`."""
        return f"gate < {self.threshold:g} -> {self.on_hit}"
