"""Measuring a throughput table: steps of real sampling runs timed, whole and with parts of their network left out.

Parts come from differences between steps that differ in one thing: sites left out, a branch kept, a span read. Nothing
is timed that the sampler would not run, nor anywhere but in a run (`stepping`). docs/cost.md says how well sums of
parts predict whole plans.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
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
from pliant.plans.sampling import Sampler
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.machine import this_machine
from pliant.plans.timing.outside import Outside
from pliant.plans.timing.probes import CALL, Probe, differences, probes
from pliant.plans.timing.stepping import FEW, PASSES, SLOW, STEPS, Clock, Stopwatch, Turns, cycled, steady
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
    outside = Outside(plain_twin(model), [b for b in (1, 4, 16) if b <= max(*rows, 4)], LONG, watch)
    kinds = {kind: _Kind(own, base, rows, watch) for kind, (own, base) in wanted.items()}
    total, done = PASSES * (1 + sum(len(kind.turns) for kind in kinds.values())), 0

    def step() -> None:
        nonlocal done
        done += 1
        if advance is not None:
            advance(done, total)

    for _ in range(PASSES):
        outside.go()
        step()
        for kind in kinds.values():
            kind.go(step)
    around = outside.curves()
    networks = {name: kind.curves(around) for name, kind in kinds.items()}
    spread = max((kind.turns[1].spread() for kind in kinds.values()), default=0.0)
    seconds = round(time.monotonic() - begun, 2)
    facts = {"date": date.today().isoformat(), "seconds": seconds, "spread": round(spread, 3)}
    name = str(model.metadata.get("name") or "")
    return Throughput(this_machine(model.device), model_key(model), name, networks, around, facts)


def plain_twin(model: Denoiser) -> Denoiser:
    """A denoiser of the same states on the bare network, which every compute works on."""
    return replace(model, network=plain_core(model), forward=None, guide=None)


class _Kind:
    """One kind of network, made ready and timed in passes."""

    def __init__(self, model: Denoiser, base: Compute, rows: Sequence[int], watch: Stopwatch) -> None:
        self.model, self.base, self.watch = model, base, watch
        self.weights = Weights()
        begun = watch.now()
        self.network = Lowered(model, base, self.weights.own).plain
        self.prepared = watch.now() - begun
        self.cycles: dict[str, list[Compute]] = {}
        self.turns: dict[int, Turns] = {}
        self.tables: list[list[float]] = []
        each = 0.0
        for count in sorted({1, *rows}):
            if self.turns and each * count > LONG:
                continue
            each = watch.steps(cycled(model, [base], 2, self.weights), count)[-1] / count
            self.turns[count] = Turns(self._samplers(count, FEW if each * count > SLOW else STEPS), count, watch)

    def _samplers(self, rows: int, steps: int) -> dict[str, Sampler]:
        """Of every call that is timed with so many rows, the whole one first."""
        wanted = [p for p in _probes(self.model, self.base) if p.everywhere or rows in PART_ROWS]
        cycles = {probe.name: probe.cycle(self.base) for probe in wanted}
        if (other := self.other()) is not None and rows in PART_ROWS:
            cycles["switch"] = [other, self.base]
        found = {}
        for name, cycle in cycles.items():
            try:
                sampler = cycled(self.model, cycle, steps, self.weights)
                self.watch.steps(sampler, rows)
            except PliantError:  # this network cannot do it, so no plan asks for it
                if name == CALL.name:
                    raise
                continue
            self.cycles[name], found[name] = cycle, sampler
        return found

    def go(self, step: Callable[[], None]) -> None:
        """A pass."""
        for turns in self.turns.values():
            turns.go()
            step()
        if self.network is not None:
            self.tables.append([self.watch(_table(self.network, m)) for m in TABLE_ROWS])

    def curves(self, around: dict[str, Curve]) -> dict[str, Curve]:
        """Curves of everything that calls of this kind consist of. around: what steps take besides."""
        found = {"prepare": Curve((1.0,), (self.prepared,))}
        if self.tables:
            each = map(statistics.median, zip(*self.tables, strict=True))
            found["table"] = Curve.of(list(zip(map(float, TABLE_ROWS), each, strict=True)))
        points: dict[str, Points] = {}
        for rows, turns in self.turns.items():
            for name, seconds in self._at(rows, turns.medians(), around, found.get("table")).items():
                points.setdefault(name, []).append((float(rows), seconds))
        raw = {name: Curve.of(p) for name, p in points.items()}
        found |= {name: raw.pop(name) for name in ("start", "switch") if name in raw}
        return found | differences(raw, self.model.shape(self.base))

    def _at(
        self, rows: int, taken: dict[str, list[float]], around: dict[str, Curve], table: Curve | None
    ) -> dict[str, float]:
        """Seconds of every timed call with so many rows, and of what the first one of a run takes more ("start") and
        the first one after another network's ("switch")."""
        beside = around["step"].at(rows) + around["update"].at(rows)
        found = {name: max(steady(steps, len(self.cycles[name])) - beside, 0.0) for name, steps in taken.items()}
        begin = around["begin"].at(rows)
        if table is not None:
            begin += table.at(len(taken["call"]) * min(rows, self.model.num_classes))
        found["start"] = max(taken["call"][0] - steady(taken["call"]) - begin, 0.0)
        if "switch" in found:
            found["switch"] = max(found["switch"] - found["call"], 0.0)
        return found

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
