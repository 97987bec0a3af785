"""One row of a frontier: a plan, what it costs and how good it is; rows as CSV and as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.evaluation import Interval
    from pliant.planning.entries import Entry
    from pliant.planning.measuring import Quality
    from pliant.plans import PlanCost


@dataclass(frozen=True)
class Row:
    """A measured entry."""

    entry: Entry
    cost: PlanCost
    quality: Quality
    interval: Interval | None
    seconds: float | None
    """Per image on this machine; None if not measured."""
    file: str
    """The plan, relative to the results' folder."""

    @property
    def solvers(self) -> str:
        return ", ".join(sorted({s.solver.name for s in self.entry.plan.steps}))

    def to_dict(self) -> dict[str, Any]:
        interval = self.interval
        return {
            "family": self.entry.family,
            "kind": self.entry.kind,
            "budget": self.entry.budget,
            "solver": self.solvers,
            "steps": len(self.entry.plan.steps),
            "NFE": self.cost.evaluations,
            "network_calls": self.cost.calls,
            "flops_per_image": self.cost.flops,
            "share_of_full": None,
            "seconds_per_image": self.seconds,
            "distance": self.quality.value,
            "standard_error": None if interval is None else interval.standard_error,
            "low": None if interval is None else max(0.0, interval.low),
            "high": None if interval is None else interval.high,
            "values": list(self.quality.values),
            "plan": self.entry.plan.digest(),
            "plan_file": self.file,
        }


def as_dicts(rows: Sequence[Row], full_flops: int) -> list[dict[str, Any]]:
    """Rows with their share of the full plan's FLOPs and whether no other is cheaper and at least as good."""
    best = undominated(rows)
    return [
        {**row.to_dict(), "share_of_full": row.cost.flops / full_flops, "on_frontier": k in best}
        for k, row in enumerate(rows)
    ]


def undominated(rows: Sequence[Row]) -> set[int]:
    """Places of the rows that no other beats in FLOPs and distance at once."""
    kept, best = set(), float("inf")
    for k in sorted(range(len(rows)), key=lambda k: (rows[k].cost.flops, rows[k].quality.value)):
        if rows[k].quality.value < best:
            kept.add(k)
            best = rows[k].quality.value
    return kept


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A header and a line per row; lists are joined by spaces, missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(repr, v)) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue()
