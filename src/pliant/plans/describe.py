"""A plan as a table people read."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.models.patches import patch_name
from pliant.plans.budget import images_text, seconds_text
from pliant.plans.calls import calls_in

if TYPE_CHECKING:
    from pliant.plans.plan import Plan
    from pliant.plans.routed import AnyPlan
    from pliant.plans.timing import Throughput


def _guidance_text(guidance: Guidance | None, model: Denoiser) -> str:
    if guidance is None:
        return "-"
    if guidance.against == "weak" and guidance.compute is not None:
        weak, patch = guidance.compute, patch_name(model.patch_of(guidance.compute))
        if weak == Compute(patch=weak.patch, merged=weak.merged, precision=weak.precision):
            return guidance.describe().replace(weak.describe(), patch)
    return guidance.describe()


HEADINGS = ("steps", "t", "solver", "patch", "precision", "runs", "cache", "guidance")
OPTIONAL = ("runs", "cache")
"""Columns that are left out where they say nothing."""


def runs_text(compute: Compute) -> str:
    """What of the network runs: "all", an exit, sites by letter, a share of the tokens."""
    words = [] if compute.exit is None else [f"exit {compute.exit}"]
    if compute.scale is not None:
        words.append(f"scale {compute.scale.describe()}")
    if compute.sites is not None:
        words.append(compute.sites)
    if compute.tokens is not None:
        words.append(compute.tokens.describe())
    if compute.gate is not None:
        words.append(f"or {compute.gate.on_hit}")
    return " ".join(words) or "all"


def reuse_text(compute: Compute) -> str:
    """What the call reads, keeps and decides."""
    words = [] if compute.reuse is None else [f"reuses {compute.reuse.describe()}"]
    if compute.write:
        words.append(f"keeps {' '.join(compute.write)}")
    if compute.gate is not None:
        words.append(f"if change < {compute.gate.threshold:g}")
    return "; ".join(words) or "-"


def describe(plan: Plan, model: Denoiser, batch: int = 1, throughput: Throughput | None = None) -> str:
    """Steps (equal neighbours joined): times, solver, patch, guidance, GFLOP per image and share of full compute.

    A last line predicts seconds of `batch` images, from the given table or one that is kept of this machine, if it
    knows the plan's calls.
    """
    cost = plan.cost(model)
    times = plan.times
    rows: list[tuple[str, ...]] = [(*HEADINGS, "GFLOP", "share")]

    def key(i: int) -> tuple[str, ...]:
        s = plan.steps[i]
        patch = patch_name(model.patch_of(s.compute))
        words = s.solver.name, patch, s.compute.precision or "auto", runs_text(s.compute), reuse_text(s.compute)
        return *words, _guidance_text(s.guidance, model)

    for text, group in groupby(range(len(plan.steps)), key):
        members = list(group)
        first, last = members[0], members[-1]
        flops = sum(cost.step_flops[first : last + 1])
        span = f"{first}" if first == last else f"{first}-{last}"
        times_text = f"{times[first]:.3f} -> {times[last + 1]:.3f}"
        rows.append((span, times_text, *text, _number(flops), f"{flops / cost.full_flops:.1%}"))
    rows.append(("total", *[""] * (len(HEADINGS) - 1), _number(cost.flops), f"{cost.share:.1%}"))
    silent = ("", "all", "-")
    used = [
        c for c in range(len(rows[0])) if rows[0][c] not in OPTIONAL or any(r[c] not in silent for r in rows[1:])
    ]
    rows = [tuple(row[c] for c in used) for row in rows]
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines.append(
        f"{cost.evaluations} evaluations, {cost.calls} network calls; "
        f"full compute would be {_number(cost.full_flops)} GFLOP per image"
    )
    if (baseline := baseline_share(plan, cost.flops)) is not None:
        lines.append("that is " + baseline)
    if cost.least_flops != cost.flops:
        least = f"{_number(cost.least_flops)} GFLOP ({cost.least_flops / cost.full_flops:.1%})"
        who = "gates" if any(call.compute.gate for call in calls_in(plan)) else "token routers"
        lines.append(f"{who} decide while sampling: the table is the most it can cost, the least is {least}")
    if (predicted := seconds_line(plan, model, batch, throughput)) is not None:
        lines.append(predicted)
    return "\n".join(lines)


def baseline_share(plan: AnyPlan, flops: int) -> str | None:
    """`4.9% of 50 full steps`: of what the plan's budget was a share of, where that is not its own number of steps."""
    baseline = plan.provenance.get("baseline")
    from pliant.plans.plan import Plan

    if not baseline or (isinstance(plan, Plan) and baseline["steps"] == len(plan.steps)):
        return None
    return f"{flops / baseline['flops']:.1%} of {baseline['steps']} full steps"


def seconds_line(plan: Plan, model: Denoiser, batch: int, throughput: Throughput | None = None) -> str | None:
    """`predicted 0.81 s for 1 image on ...`, or None without measurements of what the plan runs."""
    from pliant.plans.timing import Prices, cached_table

    table = throughput or cached_table(model)
    if table is None:
        return None
    try:
        time = Prices(table, model, batch).plan(plan)
    except PlanError:
        return None
    least = "" if time.least == time.seconds else f" at most, {seconds_text(time.least)} at least"
    return f"predicted {seconds_text(time.seconds)}{least} for {images_text(batch)} on {table.machine.describe()}"


def _number(flops: int) -> str:
    gflop = flops / 1e9
    return f"{gflop:,.1f}" if gflop >= 100 else f"{gflop:.4g}"
