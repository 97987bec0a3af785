"""Measuring a throughput table: steps of real sampling runs timed, whole and with parts of their network left out.

Parts come from differences between steps that differ in one thing: sites left out, a branch kept, a span read. Nothing
is timed that the sampler would not run, nor anywhere but in a run (`stepping`). docs/cost.md says how well sums of
parts predict whole plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TypeAlias

import torch

from pliant.adapters.token_router import TokenRoutedDiT
from pliant.adapters.width import DynamicDiT
from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PliantError
from pliant.models.network import Backbone
from pliant.models.precision import resolve_precision
from pliant.plans.engine import Lowered, ModulationTable, Weights
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.machine import this_machine
from pliant.plans.timing.outside import measure_outside
from pliant.plans.timing.probes import CALL, Probe, differences, probes
from pliant.plans.timing.stepping import FEW, SLOW, STEPS, Clock, Stopwatch, cycled, in_turns, steady
from pliant.plans.timing.table import Throughput, model_key, network_kind, plain_core, runs_unmerged

ROWS = (1, 2, 4, 8, 16)
"""Of a call; a guided image has two."""
PART_ROWS = (1, 4)
"""Of calls whose parts hardly depend on rows, or in proportion."""
LONG = 1.0
"""Seconds: calls of more rows that would take longer are not measured but extrapolated."""
TABLE_ROWS = (2, 32)
"""Times with labels of one modulation table."""

Advance: TypeAlias = Callable[[int, int], None]
Points: TypeAlias = list[tuple[float, float]]


def default_computes(model: Denoiser, precisions: Sequence[str | None] = (None,)) -> list[Compute]:
    """Every patch size of a model in these precisions (None: what calls run in that leave it open)."""
    return [Compute(patch=patch, precision=key) for key in precisions for patch in model.patch_sizes]


@torch.no_grad()
def measure(
    model: Denoiser,
    computes: Iterable[Compute] | None = None,
    rows: Sequence[int] = ROWS,
    advance: Advance | None = None,
    clock: Clock = time.perf_counter,
) -> Throughput:
    """The table of these kinds of calls (default: every patch size, in the model's own precision here).

    computes: of each the patch, scale, precision and `merged` matter. rows: of the timed calls, besides 1. advance:
    told (done, total). Raises PliantError for a compute that the model does not have.
    """
    begun = time.monotonic()
    watch = Stopwatch(model.device, clock)
    wanted: dict[str, tuple[Denoiser, Compute]] = {}
    guides = [(model.guide, True)] if model.guide is not None else []
    for own, guide in ((model, False), *guides):
        for compute in default_computes(own) if computes is None or guide else computes:
            base = Compute(patch=compute.patch, merged=compute.merged, precision=compute.precision, scale=compute.scale)
            own.shape(base)
            wanted.setdefault(network_kind(own, base, guide), (own, base))
    total, done = 2 + len(wanted) * len({1, *rows}), 0

    def step() -> None:
        nonlocal done
        done += 1
        if advance is not None:
            advance(done, total)

    step()  # outside the network comes first: what it takes is left out of what steps take
    outside = measure_outside(plain_twin(model), [b for b in (1, 4, 16) if b <= max(*rows, 4)], LONG, watch)
    step()
    kinds = {kind: _Kind(own, base, outside, watch) for kind, (own, base) in wanted.items()}
    networks = {name: kind.curves(rows, step) for name, kind in kinds.items()}
    drift = max((kind.drift(networks[name]["call"].at(1)) for name, kind in kinds.items()), key=abs, default=0.0)
    facts = {"date": date.today().isoformat(), "seconds": round(time.monotonic() - begun, 2), "drift": round(drift, 3)}
    name = str(model.metadata.get("name") or "")
    return Throughput(this_machine(model.device), model_key(model), name, networks, outside, facts)


def plain_twin(model: Denoiser) -> Denoiser:
    """A denoiser of the same states on the bare network, which every compute works on."""
    return replace(model, network=plain_core(model), forward=None, guide=None)


@dataclass(frozen=True, eq=False)
class _Kind:
    """One kind of network, and what its steps take besides its calls."""

    model: Denoiser
    base: Compute
    outside: dict[str, Curve]
    watch: Stopwatch
    weights: Weights = field(default_factory=Weights)

    def curves(self, rows: Sequence[int], step: Callable[[], None]) -> dict[str, Curve]:
        """Curves of everything that calls of this kind consist of."""
        begun = self.watch.now()
        network = Lowered(self.model, self.base, self.weights.own).plain
        found = {"prepare": Curve((1.0,), (self.watch.now() - begun,))}
        if network is not None:
            found["table"] = Curve.of([(m, self.watch(_table(network, m))) for m in TABLE_ROWS])
        raw: dict[str, Points] = {}
        once: dict[str, Points] = {"start": [], "switch": []}
        for count in sorted({1, *rows}):
            step()
            if (known := raw.get("call")) and known[-1][1] * count / known[-1][0] > LONG:
                continue
            for name, seconds in self.at(count, found.get("table")).items():
                (once if name in once else raw).setdefault(name, []).append((float(count), seconds))
        found |= {name: Curve.of(points) for name, points in once.items() if points}
        return found | differences({n: Curve.of(p) for n, p in raw.items()}, self.model.shape(self.base))

    def at(self, rows: int, table: Curve | None) -> dict[str, float]:
        """Seconds of every timed call with so many rows, and of what the first one of a run takes more ("start") and
        the first one after another network's ("switch")."""
        first = self.watch.steps(cycled(self.model, [self.base], 2, self.weights), rows)
        slow = first[-1] > SLOW
        steps = FEW if slow else STEPS
        wanted = [probe for probe in _probes(self.model, self.base) if probe.everywhere or rows in PART_ROWS]
        cycles = {probe.name: probe.cycle(self.base) for probe in wanted}
        if (other := self.other()) is not None and rows in PART_ROWS:
            cycles["switch"] = [other, self.base]
        samplers = {}
        for name, cycle in cycles.items():
            try:
                sampler = cycled(self.model, cycle, steps, self.weights)
                self.watch.steps(sampler, rows)
            except PliantError:  # this network cannot do it, so no plan asks for it
                if name == CALL.name:
                    raise
                continue
            samplers[name] = sampler
        taken = in_turns(samplers, rows, self.watch, slow)
        around = self.outside["step"].at(rows) + self.outside["update"].at(rows)
        found = {name: max(steady(taken[name], len(cycles[name])) - around, 0.0) for name in taken}
        begin = self.outside["begin"].at(rows)
        if table is not None:
            begin += table.at(steps * min(rows, self.model.num_classes))
        found["start"] = max(taken["call"][0] - steady(taken["call"]) - begin, 0.0)
        if "switch" in found:
            found["switch"] = max(found["switch"] - found["call"], 0.0)
        return found

    def drift(self, before: float) -> float:
        """By what share a call of one row takes longer now than before: what a busy machine does to a table."""
        run = cycled(self.model, [self.base], STEPS if before < SLOW else FEW, self.weights)
        around = self.outside["step"].at(1) + self.outside["update"].at(1)
        again = steady(in_turns({"call": run}, 1, self.watch, before >= SLOW)["call"]) - around
        return again / before - 1.0 if before > 0.0 else 0.0

    def other(self) -> Compute | None:
        """A call of another network of the same model, if it has patch sizes to choose from."""
        own = self.model.patch_of(self.base)
        patches = [p for p in self.model.patch_sizes if self.model.patch_of(Compute(patch=p)) != own]
        return replace(self.base, patch=patches[0]) if patches and self.base.scale is None else None


def _table(network: Backbone, rows: int) -> Callable[[], object]:
    labels = torch.zeros(1, dtype=torch.int64, device=network.device)
    times = torch.linspace(0.1, 0.9, rows, device=labels.device)
    return lambda: ModulationTable(network, times, labels).at(0)


def _probes(model: Denoiser, base: Compute) -> list[Probe]:
    """What is timed of a kind: the call alone where sites mean nothing; shared pieces at the own patch size only."""
    whole = isinstance(model.network, DynamicDiT) or runs_unmerged(model, base)
    own = model.patch_of(base) == model.config.patch_size and base.scale is None
    precision = None if whole else resolve_precision(base.precision, plain_core(model))
    grid = tuple(side // p for side, p in zip(model.sample_shape[1:], model.patch_of(base), strict=True))
    found = probes(model.shape(base), grid, isinstance(model.network, TokenRoutedDiT))
    if precision == "int8d":
        found = [p for p in found if p.name not in ("keep increment", "corrected")]
    return [p for p in found if (not whole or p.name == "call") and (own or p.everywhere)]
