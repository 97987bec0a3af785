"""Caching presets: published rules of reuse as functions from a plan to a plan. Sheets E 9 and H 7.

A preset fills the `Compute` of every step; nothing else knows its name. A new one is a rule and a line in `CACHING`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pliant.compute.numbers import is_whole
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, suggest
from pliant.plans.caching import forecasts, gates, increments, intervals, tokens
from pliant.plans.caching.freeze import freeze
from pliant.plans.caching.learned import calibrate_learning_to_cache, learning_to_cache
from pliant.plans.caching.magcache import calibrate_magcache, magcache
from pliant.plans.caching.measure import Calibration
from pliant.plans.caching.rows import Row, Rule, Target, apply_rows, target_of
from pliant.plans.caching.tea_fit import calibrate_teacache
from pliant.plans.plan import Plan


@dataclass(frozen=True)
class Preset:
    """A rule, and how to measure on a model what it needs to know of it (None: nothing)."""

    rule: Rule
    calibrate: Callable[..., Calibration] | None = None


CACHING: dict[str, Preset] = {
    "fora": Preset(intervals.fora),
    "deepcache": Preset(intervals.deepcache),
    "delta-dit": Preset(intervals.delta_dit),
    "pab": Preset(intervals.pab),
    "fastercache": Preset(intervals.fastercache),
    "taylorseer": Preset(forecasts.taylorseer),
    "taylorseer-diffusers": Preset(forecasts.taylorseer_diffusers),
    "spectrum": Preset(forecasts.spectrum),
    "teacache": Preset(gates.teacache, calibrate_teacache),
    "fbc": Preset(gates.first_block),
    "dbcache": Preset(gates.dbcache),
    "easycache": Preset(gates.easycache),
    "magcache": Preset(magcache, calibrate_magcache),
    "l2c": Preset(learning_to_cache, calibrate_learning_to_cache),
    "icc": Preset(increments.icc),
    "ras": Preset(tokens.ras),
    "tome": Preset(tokens.tome),
}


def with_caching(plan: Plan, model: Denoiser, name: str, calibrate: int | None = None, **options: Any) -> Plan:
    """The plan with a caching preset's rule in every step: `with_caching(plan, model, "fora", interval=3)`.

    calibrate: first measure what the rule needs on so many samples of the model (classes in turn, seeds 0, 1, ...);
    options of the measurement may be given too. Reference calls of guidance with a compute of their own run in full.
    Raises ConfigError for an unknown name or option or one out of range, PlanError for a plan that the rule does not
    fit.
    """
    if name not in CACHING:
        raise ConfigError(f"there is no caching preset {name!r}; {suggest(str(name), CACHING)}")
    preset = CACHING[name]
    target = target_of(plan, model)
    known = _options(preset.rule)
    facts: dict[str, Any] = {}
    measuring = _options(preset.calibrate) if preset.calibrate is not None else []
    _check(name, options, [*known, *(measuring if calibrate else [])], preset)
    if calibrate is not None:
        if preset.calibrate is None:
            raise ConfigError(f"caching preset {name!r} has nothing to calibrate; leave calibrate out")
        if not is_whole(calibrate) or calibrate < 1:
            raise ConfigError(f"calibrate is {calibrate!r}; expected a number of samples, at least 1")
        own = {k: options.pop(k) for k in measuring if k in options and k not in known}
        cond = [i % model.num_classes for i in range(calibrate)]
        found = preset.calibrate(plan, model, cond, list(range(calibrate)), **own)
        options = {**found.options, **options}
        facts = {"measured": {"samples": calibrate, **own, **found.facts}}
    missing = [k for k in _required(preset.rule) if k not in options]
    if missing:
        raise ConfigError(f"caching preset {name!r} needs the option {missing[0]!r}, e.g. {name}:{missing[0]}=0.1")
    rows = preset.rule(target, **options)
    cached = apply_rows(plan, model, rows)
    provenance = {**plan.provenance, "caching": {"name": name, **options, **facts}}
    cached = replace(cached, provenance=provenance)
    cached.check(model)
    return cached


def _options(rule: Callable[..., Any]) -> list[str]:
    """Names of a rule's options; of a calibration, those after plan, model, cond and seeds."""
    names = list(inspect.signature(rule).parameters)
    return names[4:] if names[:1] == ["plan"] else names[1:]


def _required(rule: Callable[..., Any]) -> Sequence[str]:
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]


def _check(name: str, options: dict[str, Any], known: Sequence[str], preset: Preset) -> None:
    for key in options:
        if key not in known:
            also = ["calibrate"] if preset.calibrate is not None else []
            raise ConfigError(f"caching preset {name!r} has no option {key!r}; {suggest(key, [*known, *also])}")


__all__ = ["CACHING", "Preset", "Row", "Target", "freeze", "with_caching"]
