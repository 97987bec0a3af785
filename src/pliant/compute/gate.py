"""Gates: reuse decided while sampling, from how much a cheap probe has changed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from pliant.compute.numbers import is_number, is_whole
from pliant.compute.sites import parse_sites
from pliant.errors import ConfigError, suggest

Signal = Literal["residual", "input", "output"]
Reference = Literal["last_step", "last_full"]
Comparison = Literal["<", "<="]
Deciders = Literal["own", "cond"]


@dataclass(frozen=True)
class Gate:
    """Run the sites of `on_hit` instead of the call's own when the probe has hardly changed.

    Sites 0..probe-1 always run. Their signal is compared with the one remembered from the reference call, per sample:
    `d = mean|now - then| / mean|then|`, optionally through a polynomial, optionally summed over calls since the last
    full one. Hit if `d < threshold`; the first call, and one after `max_run` hits in a row, is always a miss. A gate
    with threshold 0 never hits: it only remembers, as gates that look at the same signal share what they remember.
    That is how a warm-up is written.
    """

    threshold: float
    on_hit: str
    """Sites of a hit, e.g. "R2C22"; as many as the model's, and R over the probe."""
    probe: int = 0
    signal: Signal = "residual"
    """residual: what the probe sites added to the state. input: the normalised, modulated input of site `probe`.
    output: how much the output should have changed, from the change of the network's input and the gain
    `mean|change of output| / mean|change of input|` of the last two full calls (EasyCache, arXiv 2507.02860)."""
    reference: Reference = "last_full"
    polynomial: tuple[float, ...] = ()
    """Highest power first, applied to d; TeaCache's rescaling."""
    accumulate: bool = False
    max_run: int | None = None
    """Hits in a row."""
    max_hits: int | None = None
    """Hits in a request."""
    max_seen: float | None = None
    """No more hits once the changes that were looked at sum to this."""
    comparison: Comparison = "<"
    deciders: Deciders = "own"
    """Whose rows decide: every stream its own, or the conditional ones for all streams."""

    def __post_init__(self) -> None:
        choices = {
            "signal": get_args(Signal),
            "reference": get_args(Reference),
            "comparison": get_args(Comparison),
            "deciders": get_args(Deciders),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"gate has {name} {value!r}; {suggest(str(value), known)}")
        if not isinstance(self.accumulate, bool):
            raise ConfigError(f"gate has accumulate {self.accumulate!r}; expected true or false")
        if not is_whole(self.probe):
            raise ConfigError(f"gate has a probe of {self.probe!r}; expected a number of sites")
        letters = parse_sites(self.on_hit)
        if "C" not in letters and "K" not in letters:
            raise ConfigError(f"a gate's on_hit {self.on_hit!r} saves nothing: it needs sites that are C or K")
        if not 0 <= self.probe <= len(letters) or set(letters[: self.probe]) - {"R"}:
            raise ConfigError(f"a gate with a probe of {self.probe} sites needs on_hit to begin with R{self.probe}")
        if self.signal == "residual" and self.probe == 0:
            raise ConfigError("a gate on the probe's residual needs probe >= 1 sites")
        if not (is_number(self.threshold) or self.threshold == math.inf) or self.threshold < 0:
            raise ConfigError(f"gate has threshold {self.threshold!r}; expected a number >= 0")
        # A sum grows past any number and a polynomial may be of any size; a plain change is a share of what was there.
        if math.isinf(self.threshold) and self.max_run is None:
            raise ConfigError("a gate with an infinite threshold never recomputes; give it max_run, or a number")
        if self.threshold >= 1 and self.unlimited and not self.polynomial and not self.accumulate:
            raise ConfigError(
                f"a gate with threshold {self.threshold:g} never recomputes: a change of 100 % would still count as "
                f"none; take one below 1, or give max_run"
            )
        for name in ("max_run", "max_hits"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise ConfigError(f"gate has {name} {value!r}; expected a whole number >= 1, or none")
        if self.max_seen is not None and (not is_number(self.max_seen) or self.max_seen <= 0):
            raise ConfigError(f"gate has max_seen {self.max_seen!r}; expected a number > 0, or none")
        if self.signal == "output" and (self.reference != "last_step" or self.probe):
            raise ConfigError("a gate on the output has no probe and compares with the last step")
        if not isinstance(self.polynomial, (tuple, list)) or not all(is_number(c) for c in self.polynomial):
            raise ConfigError(f"gate has polynomial {self.polynomial!r}; expected numbers, highest power first")
        object.__setattr__(self, "polynomial", tuple(float(c) for c in self.polynomial))

    @property
    def unlimited(self) -> bool:
        """Whether nothing but the change stops hits."""
        return self.max_run is None and self.max_hits is None and self.max_seen is None

    @property
    def never_hits(self) -> bool:
        """Whether it only remembers."""
        return self.threshold == 0

    @property
    def memory(self) -> Hashable:
        """What it remembers: gates that agree in this continue each other's."""
        return self.probe, self.signal, self.reference, self.polynomial, self.accumulate

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "polynomial": list(self.polynomial)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Gate:
        """Inverse of `to_dict`. Raises ConfigError for unknown or missing fields."""
        try:
            return Gate(**values)
        except TypeError as error:
            raise ConfigError(f"this is not a gate: {error}") from None

    def rescaled(self, change: float) -> float:
        """A relative change through the polynomial, if there is one."""
        if not self.polynomial:
            return change
        value = 0.0
        for c in self.polynomial:
            value = value * change + c
        return value

    def allows(self, run: int, hits: int, seen: float) -> bool:
        """Whether the limits leave room for a hit, after so many in a row, so many in all, and changes of that sum."""
        return (
            (self.max_run is None or run < self.max_run)
            and (self.max_hits is None or hits < self.max_hits)
            and (self.max_seen is None or seen < self.max_seen)
        )

    def passes(self, change: float) -> bool:
        """Whether a (summed) change is small enough to hit."""
        if self.never_hits:
            return False
        return change < self.threshold if self.comparison == "<" else change <= self.threshold

    def describe(self) -> str:
        """e.g. `gate < 0.08 -> R2C22`."""
        return f"gate {self.comparison} {self.threshold:g} -> {self.on_hit}"


def mean_change(now: Tensor, then: Tensor) -> Tensor:
    """(B,) float32: `mean|now - then|` per sample."""
    return (now.float() - then.float()).abs().mean(tuple(range(1, now.ndim)))


def mean_size(x: Tensor) -> Tensor:
    """(B,) float32: `mean|x|` per sample, never zero."""
    return x.float().abs().mean(tuple(range(1, x.ndim))).clamp_min(1e-30)
