"""What is timed of a network, and how pieces follow from it: calls that differ in one thing, and their differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pliant.compute import Compute, Gate, Merge, Pool, Reuse, Subset, TransformerShape
from pliant.compute.reuse import branch_slot
from pliant.compute.tokens import Pooled
from pliant.plans.timing.curve import Curve

RANK = 8
INCREMENT = (branch_slot(RANK),)
"""Of the timed corrections of kept branches."""
HALF = 0.5
"""Share of the tokens in the timed calls with fewer."""


@dataclass(frozen=True)
class Probe:
    """One timed call: its compute's fields, and those of the full calls before it that fill the cache."""

    name: str
    fields: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    fills: int = 1
    """How many full calls come before it."""
    everywhere: bool = False
    """Timed at every patch size and number of rows; the others once per precision, at few."""

    def cycle(self, base: Compute) -> list[Compute]:
        """Computes of the steps of a timed run, in turn, the probe's last. Cheap calls come after full ones, as they do
        in plans, with the caches full of what those left."""
        own = replace(base, **self.fields)
        return [own] if own == base else [replace(base, **(self.before or {}))] * self.fills + [own]


CALL = Probe("call", {}, everywhere=True)


def probes(shape: TransformerShape, grid: tuple[int, ...], routed: bool = False) -> list[Probe]:
    """All calls that are timed on a network of this shape and token grid."""
    depth, sites = shape.depth, 2 * shape.depth
    run, skip, reuse = f"R{sites}", f"K{sites}", f"C{sites}"
    alone = {"attention": "R1K1" * depth, "mlp": "K1R1" * depth}
    span = {"write": (f"span(0,{sites})",)}
    found = [
        CALL,
        Probe("ends", {"sites": skip}, everywhere=True),
        Probe("attention", {"sites": alone["attention"]}, everywhere=True),
        Probe("mlp", {"sites": alone["mlp"]}, everywhere=True),
        Probe("branch", {"sites": reuse, "reuse": Reuse("branch")}, {"write": ("branch",)}),
        Probe("span", {"sites": reuse, "reuse": Reuse("span")}, span),
        Probe("forecast", {"sites": reuse, "reuse": Reuse("branch", 1)}, {"write": ("branch",)}, 2),
        Probe("forecast more", {"sites": reuse, "reuse": Reuse("branch", 2)}, {"write": ("branch",)}, 3),
        Probe("keep branch", {"sites": run, "write": ("branch",)}),
        Probe("keep span", {"sites": skip, **span}),
        Probe("gate residual", {"sites": f"R2K{sites - 2}", "gate": Gate(0.0, f"R2K{sites - 2}", 2)} if depth > 1 else
              {"sites": "R1K1", "gate": Gate(0.0, "R1K1", 1)}),
        Probe("gate input", {"sites": skip, "gate": Gate(0.0, skip, signal="input")}),
        Probe("gate output", {"sites": skip, "gate": Gate(0.0, skip, signal="output", reference="last_step")}),
        Probe("keep keys", {"sites": run, "write": ("kv",)}),
        Probe("subset", {"tokens": Subset(HALF, "update_norm")}, {"write": ("kv",)}),
        Probe("keep increment", {"sites": run, "write": INCREMENT}),
        Probe("corrected", {"sites": reuse, "reuse": Reuse("increment", rank=RANK)}, {"write": INCREMENT}),
    ]  # fmt: skip
    if min(grid) >= 2:
        found.append(Probe("merge", {"tokens": Merge(HALF)}))
    if len(grid) == 2 and not any(side % 2 for side in grid):
        found.append(Probe("pool", {"sites": run, "tokens": Pool((Pooled(0, sites),))}))
    if routed:
        found.append(Probe("routed", {"tokens": Subset(HALF, "router")}))
    return found


def differences(raw: Mapping[str, Curve], shape: TransformerShape) -> dict[str, Curve]:
    """Curves of pieces from those of timed calls: what `Prices` adds up to get the timed calls back."""
    if "ends" not in raw:
        return dict(raw)
    depth, sites, full = shape.depth, 2 * shape.depth, 4 * shape.width + 2 * shape.tokens
    ends = raw["ends"]
    pieces = {"call": raw["call"], "ends": ends}
    alone = {name: _less(raw[name], ends.at).scaled(1 / depth) for name in ("attention", "mlp")}
    # A kind of site alone may find its weights in a cache that those of whole blocks do not fit in.
    for name, curve in alone.items():
        pieces[name] = Curve(curve.rows, tuple(s * _crowding(raw, alone, depth, r) for r, s in curve.points))
    attention, mlp = pieces["attention"], pieces["mlp"]

    def with_sites(rows: float, share: float = 1.0, keys: float = 1.0) -> float:
        fewer = (4 * shape.width + 2 * shape.tokens * keys) / full
        return ends.at(rows) + depth * (attention.at(rows * share) * fewer + mlp.at(rows * share))

    one_block = min(sites, 2)
    half = (4 * shape.width + 2 * shape.tokens * HALF) / full
    base: dict[str, tuple[Callable[[float], float], float]] = {
        "branch": (ends.at, sites),
        "span": (ends.at, 1),
        "forecast": (lambda rows: raw["branch"].at(rows), sites),
        "forecast more": (lambda rows: raw["forecast"].at(rows), sites),
        "keep branch": (with_sites, sites),
        "keep span": (ends.at, 1),
        "gate residual": (
            lambda rows: ends.at(rows) + (attention.at(rows) + mlp.at(rows)) * one_block / 2, 1),
        "gate input": (ends.at, 1),
        "gate output": (ends.at, 1),
        "keep keys": (with_sites, depth),
        "subset": (lambda rows: with_sites(rows, HALF), 1),
        "keep increment": (with_sites, sites),
        "corrected": (ends.at, sites),
        "merge": (
            lambda rows: with_sites(rows) + depth * (half * attention.at(rows * HALF) - attention.at(rows)),
            depth,
        ),
        "pool": (lambda rows: with_sites(rows, 0.25, 0.25), 1),
        "routed": (lambda rows: with_sites(rows, HALF), 1),
    }  # fmt: skip
    for name, (without, count) in base.items():
        if name in raw:
            pieces[name] = _less(raw[name], without).scaled(1 / count)
    return pieces


def _crowding(raw: Mapping[str, Curve], alone: Mapping[str, Curve], depth: int, rows: float) -> float:
    """How much longer sites take in whole calls than alone; 1 where they do not, as with compiled blocks."""
    apart = depth * sum(curve.at(rows) for curve in alone.values())
    return max(1.0, (raw["call"].at(rows) - raw["ends"].at(rows)) / apart) if apart > 0 else 1.0


def _less(curve: Curve, without: Callable[[float], float]) -> Curve:
    return Curve(curve.rows, tuple(s - without(r) for r, s in curve.points))
