"""Fewer tokens per call: region-adaptive sampling and token merging. Sheet E, sections 1 and 9."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pliant.compute import Merge, Subset
from pliant.errors import ConfigError, PlanError
from pliant.plans.caching.options import number, whole
from pliant.plans.caching.rows import PLAIN, Row, Target

KEYS = Row(write=("kv",))
METRICS = {"std": "update_std", "norm": "update_norm"}


def ras(
    target: Target,
    *,
    ratio: float = 0.5,
    start: int = 4,
    resets: Sequence[int] | int | str | None = None,
    metric: str | None = None,
    sign: int = -1,
    starvation: float = 0.1,
    ramp: float = 0.0,
    every: int = 4,
) -> list[Row]:
    """RAS (arXiv 2502.10389): from step `start` on only `ratio` of the tokens, but all of them at the `resets`.

    resets: steps, "12 20" on the command line; by default 3/7 and 5/7 of the way, SD3's published 12 and 20 of 28.
    metric: "std" over channels or "norm"; by default std where there are channels. sign: -1 computes tokens of low
    metric (the published default), 1 those of high. ramp: every `every` steps so much less of the tokens, around
    `ratio` in the middle; negative: more.
    Starvation acts on dropped tokens in both directions; the published code does so for one of them only.
    """
    share = number("ratio", ratio)
    begin = whole("start", start, 0)
    if begin < 1:
        raise PlanError("ras starts at step 0, before any step has computed all tokens; start at 1 or later")
    if begin >= target.steps:
        raise PlanError(f"ras starts at step {begin}, and the plan has only {target.steps} steps; start earlier")
    known = {round(target.steps * k / 7) for k in (3, 5)} if resets is None else _steps(resets, target)
    if metric is not None and (not isinstance(metric, str) or metric not in METRICS):
        raise ConfigError(f"metric is {metric!r}; expected 'std' or 'norm'")
    rule = METRICS[metric or ("std" if target.channels > 1 else "norm")]
    middle = (target.steps + begin) // whole("every", every) // 2
    slope = number("ramp", ramp, -1, 1)
    rows = []
    for i in range(target.steps):
        if i < begin or i in known:
            rows.append(KEYS if i >= begin - 1 else PLAIN)
            continue
        here = share - slope * (i // every - middle)
        if not 0 < here <= 1:
            raise ConfigError(f"at step {i} the share of tokens would be {here:g}; it must stay in (0, 1]")
        rows.append(Row(tokens=Subset(here, rule, sign, starvation)))  # type: ignore[arg-type]
    return rows


def _steps(resets: Sequence[int] | int | str, target: Target) -> set[int]:
    """Numbers of steps. Raises ConfigError for what is none of this plan's."""
    given: Any = [resets] if isinstance(resets, int) else resets
    if isinstance(given, str):
        given = [int(word) if word.isdecimal() else word for word in given.split()]
    if not isinstance(given, (list, tuple, range)):
        raise ConfigError(f"resets are {resets!r}; expected numbers of steps")
    return {whole("a reset", step, 0, target.steps - 1) for step in given}


def tome(target: Target, *, ratio: float = 0.5, window: int = 2) -> list[Row]:
    """ToMe for SD (arXiv 2303.17604): attention on `1 - ratio` of the tokens, at every step."""
    return [Row(tokens=Merge(number("ratio", ratio), window))] * target.steps
