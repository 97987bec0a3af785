"""Measuring a throughput table: the engine's own calls timed, whole and in parts, and a sampler's work around them.

Parts come from differences between calls that differ in one thing: sites left out, a branch kept, a span read. Nothing
is timed that the sampler would not run. docs/cost.md says how well sums of parts predict whole plans.
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
from pliant.plans.engine import Lowered, ModulationTable, Networks
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.machine import this_machine
from pliant.plans.timing.outside import measure_outside, step_in_situ
from pliant.plans.timing.probes import CALL, Probe, Run, differences, probes
from pliant.plans.timing.table import Throughput, model_key, network_kind, plain_core, runs_unmerged

ROWS = (1, 2, 4, 8, 16)
"""Of a call; a guided image has two."""
TIMES = tuple(0.9 - 0.05 * k for k in range(16))
"""House times of the timed calls."""
LONG = 2.0
"""Seconds: calls of more rows than one that takes this long are not measured but extrapolated."""
TABLE_ROWS = (2, 32)
"""Times with labels of one modulation table."""

Clock: TypeAlias = Callable[[], float]
Advance: TypeAlias = Callable[[int, int], None]


class Stopwatch:
    """Median seconds of a call, after a first one that is not counted."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device, self.clock = device, clock

    def after(self, before: Callable[[], object], run: Callable[[], object]) -> float:
        """The same of a call that each time comes after another one, whose time is not counted: caches hold what that
        one left, as they do while sampling."""
        found = []
        for _ in range(8):
            before()
            found.append(self._once(run, 1))
        return statistics.median(found[1:])

    def __call__(self, run: Callable[[], object]) -> float:
        self._once(run, 1)  # kernels are chosen and memory is found
        first = self._once(run, 1)
        inner = max(1, round(0.003 / max(first, 1e-7)))
        repeats = 12 if first * inner < 0.02 else 6 if first < 0.1 else 4
        return statistics.median([first, *(self._once(run, inner) for _ in range(repeats))])

    def _once(self, run: Callable[[], object], inner: int) -> float:
        self._wait()
        start = self.clock()
        for _ in range(inner):
            run()
        self._wait()
        return (self.clock() - start) / inner

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


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
    counts = [_count(own, base, rows) for own, base in wanted.values()]
    total, done = sum(counts) + 1, 0

    def step() -> None:
        nonlocal done
        done = min(done + 1, total)
        if advance is not None:
            advance(done, total)

    networks = {
        kind: measure_kind(own, base, rows, watch, step) for kind, (own, base) in wanted.items()
    }
    outside = measure_outside(plain_twin(model), [b for b in (1, 4, 16) if b <= max(*rows, 4)], watch)
    mine = {kind: compute for kind, (who, compute) in wanted.items() if who is model}
    if mine:
        cheapest = min(mine, key=lambda kind: networks[kind]["call"].at(1))
        more = step_in_situ(model, mine[cheapest], networks[cheapest]["call"], outside, watch)
        outside["step"] = outside["step"].plus(more)
    step()
    facts = {"date": date.today().isoformat(), "seconds": round(time.monotonic() - begun, 2)}
    name = str(model.metadata.get("name") or "")
    return Throughput(this_machine(model.device), model_key(model), name, networks, outside, facts)


def plain_twin(model: Denoiser) -> Denoiser:
    """A denoiser of the same states on the bare network, which every compute works on."""
    return replace(model, network=plain_core(model), forward=None, guide=None)


def measure_kind(
    model: Denoiser, base: Compute, rows: Sequence[int], watch: Stopwatch, step: Callable[[], None] = lambda: None
) -> dict[str, Curve]:
    """Curves of everything that calls of one kind consist of."""
    networks: Networks = {}
    begun = watch.clock()
    lowered = Lowered(model, base, networks)
    prepared = watch.clock() - begun
    raw: dict[str, list[tuple[float, float]]] = {}
    for probe in _probes(model, base):
        for count in sorted({1, *rows}) if probe.everywhere else (1, 4):
            step()
            known = raw.get("call", [])
            if count > 1 and known and max(s for _, s in known if _ <= count) > LONG:
                continue
            try:
                run = _ready(model, base, probe, count, networks)
                full = _ready(model, base, CALL, count, networks) if probe.cheap else None
                seconds = watch(run) if full is None else watch.after(full, run)
            except PliantError:  # this network cannot do it, so no plan asks for it
                break
            raw.setdefault(probe.name, []).append((count, seconds))
    curves = differences({name: Curve.of(points) for name, points in raw.items()}, model.shape(base))
    curves["prepare"] = Curve((1.0,), (prepared,))
    if lowered.plain is not None:
        network = lowered.plain
        curves["table"] = Curve.of([(m, watch(_table(network, m))) for m in TABLE_ROWS])
    return curves


def _table(network: Backbone, rows: int) -> Run:
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


def _count(model: Denoiser, base: Compute, rows: Sequence[int]) -> int:
    return sum(len({1, *rows}) if p.everywhere else 2 for p in _probes(model, base))


def _ready(model: Denoiser, base: Compute, probe: Probe, rows: int, networks: Networks) -> Run:
    """The timed call on seeded states, with all that it reads in its cache."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *model.sample_shape, generator=generator).to(model.device)
    labels = (torch.arange(rows) % model.num_classes).to(model.device)
    return probe.ready(model, base, x, labels, TIMES, networks)


