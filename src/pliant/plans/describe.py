"""A plan as a table people read."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.models.patches import patch_name

if TYPE_CHECKING:
    from pliant.plans.plan import Plan


def _guidance_text(guidance: Guidance | None, model: Denoiser) -> str:
    if guidance is None:
        return "-"
    if guidance.against == "weak" and guidance.compute is not None:
        text = f"weak {patch_name(model.patch_of(guidance.compute))} {guidance.scale:g}"
    else:
        text = f"cfg {guidance.scale:g}"
    return text if guidance.channels is None else f"{text} ({guidance.channels} ch)"


def describe(plan: Plan, model: Denoiser) -> str:
    """Steps (equal neighbours joined): times, solver, patch, guidance, GFLOP per image and share of full compute."""
    cost = plan.cost(model)
    times = plan.times
    rows: list[tuple[str, ...]] = [("steps", "t", "solver", "patch", "precision", "guidance", "GFLOP", "share")]

    def key(i: int) -> tuple[str, ...]:
        s = plan.steps[i]
        patch = patch_name(model.patch_of(s.compute))
        return s.solver.name, patch, s.compute.precision or "auto", _guidance_text(s.guidance, model)

    for text, group in groupby(range(len(plan.steps)), key):
        members = list(group)
        first, last = members[0], members[-1]
        flops = sum(cost.step_flops[first : last + 1])
        span = f"{first}" if first == last else f"{first}-{last}"
        times_text = f"{times[first]:.3f} -> {times[last + 1]:.3f}"
        rows.append((span, times_text, *text, _number(flops), f"{flops / cost.full_flops:.1%}"))
    rows.append(("total", "", "", "", "", "", _number(cost.flops), f"{cost.share:.1%}"))
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines.append(
        f"{cost.evaluations} evaluations, {cost.calls} network calls; "
        f"full compute would be {_number(cost.full_flops)} GFLOP per image"
    )
    return "\n".join(lines)


def _number(flops: int) -> str:
    gflop = flops / 1e9
    return f"{gflop:,.1f}" if gflop >= 100 else f"{gflop:.4g}"
