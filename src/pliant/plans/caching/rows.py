"""What a caching rule says of every step, and how that becomes a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pliant.compute import Compute, Gate, Reuse, Subset
from pliant.compute.tokens import Tokens
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.plans.calls import calls_of, reuses
from pliant.plans.plan import Plan, Step


@dataclass(frozen=True)
class Row:
    """What one step runs, reads, keeps and decides: these fields of its `Compute`."""

    sites: str | None = None
    reuse: Reuse | None = None
    write: tuple[str, ...] = ()
    gate: Gate | None = None
    tokens: Tokens | None = None

    @property
    def may_reuse(self) -> bool:
        """Whether the step can read the cache."""
        return (self.gate is not None and not self.gate.never_hits) or self.must_reuse

    @property
    def must_reuse(self) -> bool:
        """Whether it does, whatever a gate decides."""
        return "C" in (self.sites or "") or (isinstance(self.tokens, Subset) and self.tokens.rule != "router")


PLAIN = Row()


@dataclass(frozen=True)
class Target:
    """What a rule has to know: how many steps and sites there are, and when the steps start."""

    times: tuple[float, ...]
    """House time of every step's start."""
    sites: int
    channels: int = 1
    """Of the states."""
    width: int = 1152
    """Features of a token; as a rule's paper has it where nobody says."""
    calls: int | None = None
    """Evaluations of all steps, on which forecasts' clock "step" runs; None: one per step."""

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def blocks(self) -> int:
        return self.sites // 2


Rule: TypeAlias = Callable[..., Sequence[Row]]
"""(target, **options) -> one row per step."""


def target_of(plan: Plan, model: Denoiser) -> Target:
    """Raises PlanError for a plan that reuses already, or whose steps leave at different depths."""
    plan.check(model)
    if reuses(plan):
        raise PlanError("this plan reuses, leaves out or keeps parts of its network already; start from one without")
    depths = {model.shape(step.compute).depth for step in plan.steps}
    if len(depths) > 1:
        raise PlanError("the steps of this plan leave the network at different depths; caches need one depth")
    times = tuple(step.t for step in plan.steps)
    calls = len(plan.program(model).evaluations)
    return Target(times, 2 * depths.pop(), model.config.in_channels, model.config.width, calls)


def apply_rows(plan: Plan, model: Denoiser, rows: Sequence[Row]) -> Plan:
    """The plan whose conditional calls do what the rows say, and its reference calls where they are the same calls.

    A row that would read what was never kept (after a switch of the patch size, or where guidance begins), or what is
    older than the rule means it to be (a stream that did not run at the last full step), becomes the full row before
    it; a forecast of higher order than there are values takes the order that there is. What is kept
    and never read is not kept.
    """
    rows = trimmed(repaired(plan, model, rows))
    return plan.with_steps(_with_row(step, row) for step, row in zip(plan.steps, rows, strict=True))


def repaired(plan: Plan, model: Denoiser, rows: Sequence[Row]) -> list[Row]:
    """The rows, each of which finds what it reads."""
    fixed: list[Row] = []
    kept: dict[str, int] = {}
    newest: dict[str, int] = {}  # stream -> its last full step
    grid: Any = None
    full = next((row for row in rows if row.write), PLAIN)
    for i, (step, row) in enumerate(zip(plan.steps, rows, strict=True)):
        here = model.patch_of(step.compute), model.exit_of(step.compute), step.compute.scale
        switched = grid is not None and here != grid
        grid = here
        if switched:
            kept, newest = {}, {}
        calls = calls_of(step)
        if not calls:  # a step that asks the network nothing
            fixed.append(PLAIN)
            continue
        if step.compute.scale is not None and (isinstance(row.tokens, Subset) or "kv" in row.write):
            row = PLAIN  # tokens are chosen on the state's own grid
        streams = calls[0].streams
        have = min(kept.get(stream, 0) for stream in streams)
        if row.write:
            full = row
        if switched and row.gate is not None:  # what its gate remembers is of another grid, or of long ago
            row = replace(row, gate=replace(row.gate, threshold=0.0))
        elif row.gate is None and row.must_reuse:
            if have == 0 or min(newest[stream] for stream in streams) < max(newest.values()):
                row = full
                if row.gate is not None:
                    row = replace(row, gate=replace(row.gate, threshold=0.0))
            elif row.reuse is not None and row.reuse.order >= have:
                row = replace(row, reuse=replace(row.reuse, order=have - 1))
        if row.write and (row.gate is None or row.gate.never_hits or have == 0):
            kept.update({stream: kept.get(stream, 0) + 1 for stream in streams})
            newest.update(dict.fromkeys(streams, i))
        fixed.append(row)
    return fixed


def trimmed(rows: Sequence[Row]) -> list[Row]:
    """Without keeping and remembering after the last step that reads."""
    last = max((i for i, row in enumerate(rows) if row.may_reuse), default=-1)
    return [row if i <= last else Row(tokens=row.tokens) for i, row in enumerate(rows)]


def _with_row(step: Step, row: Row) -> Step:
    compute: Compute = replace(
        step.compute, sites=row.sites, reuse=row.reuse, write=row.write, gate=row.gate, tokens=row.tokens
    )
    return replace(step, compute=compute)
