"""Checks of presets' options: each error names the option, what was given and what is expected."""

from __future__ import annotations

from typing import Any

from pliant.errors import ConfigError, PlanError
from pliant.plans.caching.rows import Target


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upto = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {value!r}; expected a whole number {upto}")
    return value


def number(name: str, value: Any, least: float = 0.0, most: float = float("inf")) -> float:
    """A finite number from `least` to `most`. Raises ConfigError."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fine or not least <= value <= most or value == float("inf"):
        upto = f"of at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise ConfigError(f"{name} is {value!r}; expected a number {upto}")
    return float(value)


def change_threshold(value: Any, limited: bool) -> float:
    """A threshold of a relative change. At 1 (a change of 100 %) it would never recompute, unless runs are limited."""
    threshold = number("threshold", value)
    if threshold >= 1 and not limited:
        raise ConfigError(
            f"threshold is {value!r}: a change of 100 % would still count as none, so nothing would be recomputed; "
            f"take one below 1, or give max_run"
        )
    return threshold


def warm(name: str, value: Any, target: Target) -> int:
    """First steps that run in full. Raises PlanError if there are no steps after them."""
    steps = whole(name, value, 0)
    if steps >= target.steps:
        raise PlanError(f"the first {steps} steps ({name}) run in full, and the plan has only {target.steps}; lower it")
    return steps


def period(value: Any, target: Target) -> int:
    """Full every so many steps. Raises PlanError where only the first would be."""
    interval = whole("interval", value)
    if interval > target.steps:
        raise PlanError(f"interval is {interval}, and the plan has only {target.steps} steps: none would be recomputed")
    return interval
