"""What is timed of a network, and how pieces follow from it: calls that differ in one thing, and their differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.compute import Compute, Gate, Merge, Pool, Reuse, Subset, TransformerShape
from pliant.compute.cache import Cache, Moment
from pliant.compute.tokens import Pooled
from pliant.denoiser import Denoiser
from pliant.plans.engine import Lowered, Networks
from pliant.plans.timing.curve import Curve

RANK = 8
"""Of the timed corrections of kept branches."""
HALF = 0.5
"""Share of the tokens in the timed calls with fewer."""

CHEAP = (
    "branch", "span", "forecast", "forecast more", "keep span", "out", "gate residual", "gate input", "gate output",
)  # fmt: skip

Run: TypeAlias = Callable[[], object]


@dataclass(frozen=True)
class Probe:
    """One timed call: its compute's fields, and those of the calls before it that fill the cache."""

    name: str
    fields: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    fills: int = 1
    """How many calls fill the cache."""
    everywhere: bool = False
    """Timed at every patch size and number of rows; the others once per precision, at few."""

    @property
    def cheap(self) -> bool:
        """Whether the call is a small part of a full one, so that what a full one leaves in the caches matters."""
        return self.name in CHEAP

    def ready(
        self,
        model: Denoiser,
        base: Compute,
        x: Tensor,
        labels: Tensor,
        times: Sequence[float],
        networks: Networks,
    ) -> Run:
        """The call on states x (B, C, H, W), its cache filled. Raises PliantError where the network cannot run it."""
        cache = Cache(self.fills)
        streams = ("cond",)
        if self.before is not None:
            before = Lowered(model, replace(base, **self.before), networks).bind(times, labels, cache, streams)
            for k in range(self.fills):
                before.call(k, x, Moment(k, times[k], float(k)))
        compute = replace(base, **self.fields)
        if isinstance(compute.tokens, Subset) and compute.tokens.rule != "router":
            tokens = model.shape(base).tokens
            every = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
            active = every[: compute.tokens.count(tokens)].sort().values
            cache.regions.active = active.expand(len(x), -1).to(x.device)
        bound = Lowered(model, compute, networks).bind(times, labels, cache, streams)
        k = self.fills
        moment = Moment(k, times[k], float(k))
        return lambda: bound.call(k, x, moment)


CALL = Probe("call", {}, everywhere=True)


def probes(shape: TransformerShape, grid: tuple[int, ...], routed: bool = False) -> list[Probe]:
    """All calls that are timed on a network of this shape and token grid."""
    depth, sites = shape.depth, 2 * shape.depth
    run, skip, reuse = f"R{sites}", f"K{sites}", f"C{sites}"
    alone = {"attention": "R1K1" * depth, "mlp": "K1R1" * depth}
    span = f"span(0,{sites})"
    found = [
        CALL,
        Probe("ends", {"sites": skip}, everywhere=True),
        Probe("attention", {"sites": alone["attention"]}, everywhere=True),
        Probe("mlp", {"sites": alone["mlp"]}, everywhere=True),
        Probe("branch", {"sites": reuse, "reuse": Reuse("branch")}, {"write": ("branch",)}),
        Probe("span", {"sites": reuse, "reuse": Reuse("span")}, {"sites": skip, "write": (span,)}),
        Probe("forecast", {"sites": reuse, "reuse": Reuse("span", 1)}, {"sites": skip, "write": (span,)}, 2),
        Probe("forecast more", {"sites": reuse, "reuse": Reuse("span", 2)}, {"sites": skip, "write": (span,)}, 3),
        Probe("keep branch", {"sites": run, "write": ("branch",)}),
        Probe("keep span", {"sites": skip, "write": (span,)}),
        Probe("out", {"sites": reuse, "reuse": Reuse("out")}, {"sites": skip, "write": ("out",)}),
        Probe("gate residual", {"sites": f"R2K{sites - 2}", "gate": Gate(0.0, f"R2K{sites - 2}", 2)} if depth > 1 else
              {"sites": "R1K1", "gate": Gate(0.0, "R1K1", 1)}),
        Probe("gate input", {"sites": skip, "gate": Gate(0.0, skip, signal="input")}),
        Probe("gate output", {"sites": skip, "gate": Gate(0.0, skip, signal="output", reference="last_step")}),
        Probe("keep keys", {"sites": run, "write": ("kv",)}),
        Probe("subset", {"tokens": Subset(HALF, "update_norm")}, {"write": ("kv",)}),
        Probe("keep increment", {"sites": run, "write": ("increment",)}),
        Probe("corrected", {"sites": reuse, "reuse": Reuse("increment", rank=RANK)}, {"write": ("increment",)}),
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
        "forecast": (lambda rows: raw["span"].at(rows), 1),
        "forecast more": (lambda rows: raw["forecast"].at(rows), 1),
        "keep branch": (with_sites, sites),
        "keep span": (ends.at, 1),
        "out": (lambda rows: 0.0, 1),
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
