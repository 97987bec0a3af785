"""Seconds as a function of how much is computed at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pliant.errors import ConfigError


@dataclass(frozen=True)
class Curve:
    """Seconds measured at some numbers of rows; straight lines between them and beyond.

    A kernel takes a constant (its launch) plus so much per row, with another slope once its operands have left a
    cache: piecewise lines fit that better than powers do.
    """

    rows: tuple[float, ...]
    """Ascending."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if not self.rows or len(self.rows) != len(self.seconds) or not ascending:
            raise ConfigError(f"a curve needs ascending rows with their seconds; got {self.rows} and {self.seconds}")

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """(rows, seconds), ascending."""
        return tuple(zip(self.rows, self.seconds, strict=True))

    def at(self, rows: float) -> float:
        """Seconds for so many rows (not necessarily whole). One point: in proportion. Never negative where the
        measured values are not."""
        xs, ys = self.rows, self.seconds
        if len(xs) == 1:
            return ys[0] * rows / xs[0]
        k = min(max(bisect_right(xs, rows), 1), len(xs) - 1)
        slope = (ys[k] - ys[k - 1]) / (xs[k] - xs[k - 1])
        value = ys[k - 1] + slope * (rows - xs[k - 1])
        if rows < xs[0]:  # the line may cross zero where noise made it too steep
            return max(value, min(ys[0], ys[0] * rows / xs[0]))
        # Beyond the last point noise must not turn more work into less time.
        return max(value, ys[-1]) if rows > xs[-1] else value

    def scaled(self, factor: float) -> Curve:
        """The same curve, every second times a factor."""
        return Curve(self.rows, tuple(s * factor for s in self.seconds))

    def plus(self, constant: float) -> Curve:
        """The same curve, so many seconds higher."""
        return Curve(self.rows, tuple(s + constant for s in self.seconds))

    def to_list(self) -> list[list[float]]:
        return [[r, s] for r, s in zip(self.rows, self.seconds, strict=True)]

    @staticmethod
    def from_list(points: Any) -> Curve:
        """Inverse of `to_list`. Raises ConfigError."""
        try:
            rows, seconds = zip(*((float(r), float(s)) for r, s in points), strict=True)
        except (TypeError, ValueError):
            raise ConfigError(f"a curve is a list of [rows, seconds], got {points!r}") from None
        return Curve(tuple(rows), tuple(seconds))

    @staticmethod
    def of(points: Sequence[tuple[float, float]]) -> Curve:
        """From (rows, seconds) in any order."""
        ordered = sorted(points)
        return Curve(tuple(r for r, _ in ordered), tuple(s for _, s in ordered))
