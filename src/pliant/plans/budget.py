"""Budgets as people write them: a fraction of full compute, FLOPs per image, or seconds.

Every planner asks the same two questions of a budget: how much may be spent (`limit`), and what a plan spends
(`spent`), both in the budget's own unit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from pliant.denoiser import Denoiser
from pliant.errors import PlanError

if TYPE_CHECKING:
    from pliant.plans.plan import Plan
    from pliant.plans.routed import AnyPlan
    from pliant.plans.timing import Prices, Throughput

Unit: TypeAlias = Literal["share", "flops", "seconds"]

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_TIMES = {
    "ms": 1e-3, "millisecond": 1e-3, "milliseconds": 1e-3,
    "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0,
    "min": 60.0, "minute": 60.0, "minutes": 60.0,
}  # fmt: skip
EXAMPLES = "a share (0.6 or 60%), FLOPs per image (30 TFLOP), or a time (2.0 s, 350 ms, 1.5 min, 8 s for 4 images)"

SLACK = 5e-4
"""Budgets are met to half a tenth of a percent of full compute: a rounded "69.7 %" means what it was rounded from."""


@dataclass(frozen=True)
class Budget:
    """Exactly one of the first three is set."""

    share: float | None = None
    """Of full compute, in (0, 1]; counted in FLOPs."""
    flops: float | None = None
    """Per image, guidance included."""
    seconds: float | None = None
    """Of a whole batch, from labels to final states, with a prepared sampler on this machine."""
    batch: int = 1
    """Images that are computed at once in that time."""
    throughput: Throughput | None = None
    """Predicts seconds; None: the table kept for this model and machine, measured if there is none."""
    _prices: dict[int, Prices] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By id of the model, of which prices hold a reference."""

    def __post_init__(self) -> None:
        given = [v for v in (self.share, self.flops, self.seconds) if v is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise PlanError(f"a budget is one positive finite number: {EXAMPLES}")
        if self.share is not None and self.share > 1:
            raise PlanError(f"a budget of {100 * self.share:g}% is more than full compute; give at most 100%")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise PlanError(f"a time is for a number of images, at least 1; got {self.batch!r}")

    @property
    def unit(self) -> Unit:
        """What `spent` and `limit` count for this budget; a share is counted in FLOPs."""
        return "seconds" if self.seconds is not None else "flops" if self.flops is not None else "share"

    @property
    def amount(self) -> str:
        """The budget as text that `parse_budget` reads: `60%`, `30 GFLOP`, `2 s for 4 images`."""
        if self.seconds is not None:
            return seconds_text(self.seconds) + (f" for {images_text(self.batch)}" if self.batch > 1 else "")
        return f"{self.flops / 1e9:g} GFLOP" if self.flops is not None else f"{100 * (self.share or 1.0):g}%"

    def spent(self, plan: AnyPlan, model: Denoiser) -> float:
        """What a plan spends of this budget (at most, where gates decide): FLOPs per image, or seconds of the batch."""
        if self.seconds is None:
            return plan.cost(model).flops
        from pliant.plans.plan import Plan

        if not isinstance(plan, Plan):
            raise PlanError("routed plans have no seconds before a batch is named; give a budget of FLOPs")
        plan.check(model)
        return self.prices(plan, model).plan(plan).seconds

    def limit(self, full: Plan, model: Denoiser) -> float:
        """The most that may be spent, in the unit of `spent`; full: the plan that counts as full compute."""
        whole = self.spent(full, model)
        if self.seconds is not None:
            return self.seconds + SLACK * whole
        return (self.flops if self.flops is not None else (self.share or 1.0) * whole) + SLACK * whole

    def fits(self, plan: AnyPlan, full: Plan, model: Denoiser) -> bool:
        """Whether a plan keeps to this budget."""
        return self.spent(plan, model) <= self.limit(full, model)

    def describe(self, amount: float, full: Plan, model: Denoiser) -> str:
        """An amount spent, for messages: `61.0% of full compute (1.2 GFLOP per image)`, `0.81 s for 4 images (...)`."""
        share = f"{amount / self.spent(full, model):.1%} of full compute"
        if self.seconds is None:
            return f"{share} ({amount / 1e9:.3g} GFLOP per image)"
        return f"{seconds_text(amount)} for {images_text(self.batch)} ({share})"

    def prices(self, plan: Plan, model: Denoiser) -> Prices:
        """What predicts the seconds of a plan. Measures what the kept table lacks, unless a table was given."""
        from pliant.plans.calls import calls_in
        from pliant.plans.timing import Prices
        from pliant.plans.timing.ready import missing_kinds, ready_table

        own = [call.compute for call in calls_in(plan) if call.streams != ("guide",)]
        found = self._prices.get(id(model))
        if found is None or (self.throughput is None and missing_kinds(found.table, model, own)):
            table = self.throughput
            if table is None:
                table = ready_table(model, own)
            else:
                table.check(model)
            found = self._prices[id(model)] = Prices(table, model, self.batch)
        return found


def parse_budget(value: float | str | Budget) -> Budget:
    """0.6, "0.6", "60%" -> share; "30 TFLOP", "1.5e9 FLOPs" -> FLOPs per image; "2.0 s", "350 ms", "1.5 min", "8 s for
    4 images" -> seconds. Raises PlanError for anything else.
    """
    if isinstance(value, Budget):
        return value
    text = str(value).strip()
    match = re.fullmatch(
        r"([0-9.]+(?:e[+-]?\d+)?)\s*([^\W\d_]*|%)(?:\s+for\s+(\d+)\s+images?)?", text, flags=re.IGNORECASE
    )
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        match, number = None, 0.0
    if not match or not 0 < number < math.inf:
        raise PlanError(f"cannot read the budget {text!r}{_hint(text)}; write {EXAMPLES}")
    unit, images = match.group(2).lower(), match.group(3)
    if unit in _TIMES:
        if images is not None and int(images) < 1:
            raise PlanError(f"the budget {text!r} is for no image; write {EXAMPLES}")
        return Budget(seconds=number * _TIMES[unit], batch=int(images or 1))
    if images is not None:
        raise PlanError(f"only a time is for a number of images; FLOPs and shares, as in {text!r}, are of each image")
    if flops := re.fullmatch(r"([kmgtp]?)flops?", unit):
        return Budget(flops=number * _PREFIXES[flops.group(1)])
    if unit not in ("", "%"):
        raise PlanError(f"the unit of the budget {text!r} is unknown{_hint(text)}; write {EXAMPLES}")
    share = number / 100 if unit == "%" else number
    if share > 1:
        hint = f"; did you mean {number:g}% or {number:g} s?" if number <= 100 else ""
        raise PlanError(f"a budget of {text} is more than full compute{hint}")
    return Budget(share=share)


def _hint(text: str) -> str:
    """What was probably meant, in parentheses."""
    low = text.lower().replace(" ", "")
    number = (re.match(r"[0-9.]+", low) or [""])[0]
    if "mac" in low:
        return " (a multiply-add, MAC, counts as two FLOPs here)"
    if re.search(r"flops?/", low) or low.endswith("flopps"):
        return " (FLOPs per second are a speed, not a budget)"
    if re.search(r"/ima?ge?s?$|perimage$", low):
        return f" (a time is of a whole batch: '{number} s for 4 images')"
    if re.fullmatch(r"[0-9.]+m", low):
        return f" (did you mean {number} min, {number} ms or {number} MFLOP?)"
    if re.fullmatch(r"[0-9.]+[kgtp]", low):
        return f" (did you mean {number} {low[-1].upper()}FLOP?)"
    return ""


def seconds_text(seconds: float) -> str:
    """e.g. `35.2 ms`, `1.23 s`, `2.5 min`."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.3g} min"


def images_text(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
