"""Seconds of a plan before it runs: a throughput table's pieces added up as the executor will run them.

A call is its network's ends (patches in, head out, alignment), its attention and MLP sites, and what it reads, keeps
and decides; each piece is a measured curve over rows, so nothing here knows a rate. Around the calls: solver updates,
guidance, noise, modulation tables, and the first calls of every network, which find the caches cold. Sheet E, 10.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pliant.adapters.width import DynamicDiT
from pliant.compute import Compute, Merge, Subset, TransformerShape
from pliant.compute.lowering import (
    AddBranch,
    AddSpan,
    Mark,
    Operation,
    PoolTokens,
    Run,
    RunStore,
    Save,
    SiteProgram,
    SpreadTokens,
    lower,
)
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.models.patches import patch_name
from pliant.plans.calls import Call, calls_of, gate_memory
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.table import Throughput, network_kind
from pliant.solvers import Eval, Lin, Program

if TYPE_CHECKING:
    from pliant.plans.plan import Plan, Step

REFERENCE_TIME = 0.5
"""House time at which networks are measured whose width depends on the time."""


@dataclass(frozen=True)
class PlanSeconds:
    """Predicted seconds of one batch, from labels and seeds to the final state, with a prepared sampler."""

    seconds: float
    """At most, where gates decide."""
    least: float
    """If every gate that may reuse does."""
    steps: tuple[float, ...]
    begin: float
    """Before the first step: noise, alignment, and modulation tables of all steps."""
    preparation: float
    """Once per process: adapters merged, weights converted."""


class Prices:
    """What the calls of one model take on one machine, in batches of one size. Remembers what it was asked."""

    def __init__(self, table: Throughput, model: Denoiser, batch: int = 1) -> None:
        """batch: images at once. Raises PlanError unless it is at least 1."""
        if not isinstance(batch, int) or batch < 1:
            raise PlanError(f"seconds are predicted for batches of at least 1 image, got {batch!r}")
        self.table, self.model, self.batch = table, model, batch
        self._calls: dict[tuple[Call, bool], float] = {}

    def plan(self, plan: Plan) -> PlanSeconds:
        """Raises PlanError where the table lacks a measurement, saying how to get it."""
        program = plan.program(self.model)
        steps = [0.0] * len(plan.steps)
        saved, seen = 0.0, set[Hashable]()
        networks = _Networks(self)
        for evaluation in program.evaluations:
            step, t = plan.steps[evaluation.step], evaluation.node.t
            here = sum(self.call(call, t=t) for call in calls_of(step))
            steps[evaluation.step] += here + self._around(step) + sum(networks.cold(call) for call in calls_of(step))
            for call in calls_of(step):
                gate, memory = call.compute.gate, gate_memory(call, self.model)
                # The first call of all that share a memory has nothing to compare with.
                if gate is not None and memory in seen and not gate.never_hits:
                    saved += self.call(call, t=t) - self.call(call, hit=True, t=t)
                seen.add(memory)
        for index, seconds in enumerate(self._updates(program)):
            steps[index] += seconds
        begin = self.outside("begin") + self._tables(plan, program)
        total = begin + sum(steps)
        return PlanSeconds(total, total - saved, tuple(steps), begin, self._preparation(plan))

    def call(self, call: Call, hit: bool = False, t: float | None = None) -> float:
        """Seconds of one network call for the batch. hit: if its gate reuses; t: house time, where width follows it."""
        if (call, hit) not in self._calls:
            self._calls[call, hit] = _CallPrice(self, call).seconds(hit)
        seconds = self._calls[call, hit]
        own = call.model(self.model)
        if t is not None and isinstance(own.network, DynamicDiT):
            seconds *= own.flops(call.compute, t=t) / own.flops(call.compute, t=REFERENCE_TIME)
        return seconds

    def outside(self, unit: str) -> float:
        """Seconds for the batch of something that happens outside the network."""
        return _lookup(self.table, self.table.outside, unit).at(self.batch)

    def _around(self, step: Step) -> float:
        """What an evaluation takes besides its calls and the update."""
        return self.outside("step") + (self.outside("guided") if step.guidance is not None else 0.0)

    def _updates(self, program: Program) -> list[float]:
        """Per step: the solver's sums, and noise where it is drawn."""
        found, drawn = [], set[int]()
        for step in program.steps:
            seconds = 0.0
            for op in step:
                if isinstance(op, Eval):
                    continue
                terms = len(op.x) + len(op.m) + len(op.z) + (op.mu != 0.0)
                seconds += self.outside("update") + (terms - 2) * self.outside("term")
                fresh = _noises(op) - drawn
                drawn |= fresh
                seconds += len(fresh) * self.outside("noise")
            found.append(seconds)
        return found

    def _tables(self, plan: Plan, program: Program) -> float:
        """Modulations of all times and labels; images are taken to differ in class as far as there are classes."""
        rows: dict[str, float] = {}
        for evaluation in program.evaluations:
            for call in calls_of(plan.steps[evaluation.step]):
                kind = kind_of(call, self.model)
                labels = min(self.batch, self.model.num_classes) * any(s != "null" for s in call.streams)
                rows[kind] = rows.get(kind, 0.0) + labels + ("null" in call.streams)
        tables = ((self.table.networks.get(kind, {}).get("table"), count) for kind, count in rows.items())
        return sum(curve.at(count) for curve, count in tables if curve is not None)

    def _preparation(self, plan: Plan) -> float:
        kinds = {kind_of(call, self.model) for step in plan.steps for call in calls_of(step)}
        curves = (self.table.networks.get(kind, {}).get("prepare") for kind in sorted(kinds))
        return sum(curve.at(1) for curve in curves if curve is not None)


def kind_of(call: Call, model: Denoiser) -> str:
    """The kind of network (`network_kind`) that a call of a plan on `model` runs."""
    return network_kind(call.model(model), call.compute, call.streams == ("guide",))


class _Networks:
    """What a run's calls take longer because the processor's caches are full of something else: the first one of each
    network, and the first one after another network's."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.seen: set[str] = set()
        self.last = ""

    def cold(self, call: Call) -> float:
        """Seconds of the run's next call beyond those of one that comes after the same network's."""
        kind = kind_of(call, self.prices.model)
        unit = "start" if kind not in self.seen else "switch"
        again, self.last = kind == self.last, kind
        self.seen.add(kind)
        curve = self.prices.table.networks.get(kind, {}).get(unit)
        return 0.0 if again or curve is None else curve.at(self.prices.batch * len(call.streams))


class _CallPrice:
    """One call's pieces, looked up and added."""

    def __init__(self, prices: Prices, call: Call) -> None:
        self.table = prices.table
        self.model = call.model(prices.model)
        self.compute = call.compute
        self.kind = kind_of(call, prices.model)
        self.guide = call.streams == ("guide",)
        self.rows = prices.batch * len(call.streams)
        self.shape: TransformerShape = self.model.shape(call.compute)

    def seconds(self, hit: bool) -> float:
        depth, full = self.shape.depth, self.model.config.depth
        if self.compute.plain and (depth == full or "ends" not in self.table.networks.get(self.kind, {})):
            whole = self.unit("call")
            return whole if depth == full else whole * self.model.flops(self.compute) / self.model.flops()
        if self.compute.plain:
            return self.unit("ends") + depth * self.block()
        tokens = self.compute.tokens
        if isinstance(tokens, Subset):
            share = tokens.count(self.shape.tokens) / self.shape.tokens
            sites = depth * (self.attention(share) + self.mlp(share))
            return self.unit("ends") + sites + self.unit("routed" if tokens.rule == "router" else "subset")
        return max(self.program(lower(self.compute, 2 * depth), hit), 0.0)

    def program(self, program: SiteProgram, hit: bool) -> float:
        """A lowered compute: what runs before its gate, the gate, then one of the two sides."""
        gate, reuse = program.compute.gate, program.compute.reuse
        order = 0 if reuse is None else reuse.order
        if gate is None and program.miss_whole in ("out", "drift"):
            return self.kept_output(order)
        total = self.operations(program.probe, order)
        if gate is not None:
            total += self.unit(f"gate {gate.signal}")
        whole = program.hit_whole if hit else program.miss_whole
        if whole in ("out", "drift"):
            return total + self.kept_output(order)
        if whole == "state":
            return total + self.unit("ends") + self.unit("span") + self.mixed(order)
        total += self.unit("ends") + self.operations(program.hit if hit else program.miss, order)
        keeps = "drift" in program.write_whole and not hit
        return total + (self.unit("keep span") * self.output_share if keeps else 0.0)

    @property
    def output_share(self) -> float:
        """Numbers of the output per number of the network's inner state."""
        return self.shape.out_channels * self.shape.patch_volume / self.shape.width

    def kept_output(self, order: int) -> float:
        """A whole output from memory: reading it is part of every step; a forecast is not."""
        return self.mixed(order) * self.output_share

    def operations(self, operations: Sequence[Operation], order: int) -> float:
        """Operations one after the other; between a pool and its spread fewer tokens are there."""
        total, share = 0.0, 1.0
        for op in operations:
            if isinstance(op, Run):
                total += self.run(op.first, op.last, share)
            elif isinstance(op, RunStore):
                kept = "keep branch" if op.increment is None else "keep increment"
                total += self.site(op.site, share) + self.unit(kept)
            elif isinstance(op, AddBranch):
                total += self.unit("branch" if op.rank is None else "corrected") + self.mixed(order)
            elif isinstance(op, AddSpan):
                total += self.unit("span") + self.mixed(order)
            elif isinstance(op, Save):
                total += self.unit("keep span")
            elif isinstance(op, PoolTokens):
                share = 1.0 / (op.window[0] * op.window[1])
                total += self.unit("pool")
            elif isinstance(op, SpreadTokens):
                share = 1.0
            else:
                assert isinstance(op, Mark)  # remembers a tensor that is there anyway
        return total

    def run(self, first: int, last: int, share: float) -> float:
        """Sites first..last-1; whole blocks at once where nothing looks between their sites."""
        total, s = 0.0, first
        single = isinstance(self.compute.tokens, Merge) or "kv" in self.compute.write
        while s < last:
            if not single and s % 2 == 0 and s + 1 < last:
                total, s = total + (self.block() if share == 1.0 else self.attention(share) + self.mlp(share)), s + 2
            else:
                total, s = total + self.site(s, share), s + 1
        return total

    def site(self, s: int, share: float) -> float:
        if s % 2:
            return self.mlp(share)
        total = 0.0
        tokens = self.compute.tokens
        if isinstance(tokens, Merge):
            left = tokens.count(self.shape.tokens) / self.shape.tokens
            total = self.attention(left, left) + self.unit("merge")
        else:
            total = self.attention(share, share)
        return total + (self.unit("keep keys") if "kv" in self.compute.write else 0.0)

    def block(self) -> float:
        """A block without anything between its sites (in one piece where it is compiled)."""
        return (self.unit("call") - self.unit("ends")) / self.model.config.depth

    def attention(self, queries: float = 1.0, keys: float = 1.0) -> float:
        """An attention site with these shares of the tokens. Fewer keys save of the products with keys and values."""
        width, tokens = self.shape.width, self.shape.tokens
        return self.unit("attention", queries) * (4 * width + 2 * tokens * keys) / (4 * width + 2 * tokens)

    def mlp(self, share: float = 1.0) -> float:
        return self.unit("mlp", share)

    def mixed(self, order: int) -> float:
        """What a forecast of this order takes beyond reading the newest value."""
        return 0.0 if order == 0 else self.unit("forecast") + (order - 1) * self.unit("forecast more")

    def unit(self, name: str, share: float = 1.0) -> float:
        """Seconds of a piece at this call's rows, of which only a share of the tokens takes part.

        What networks have in common is measured at the model's own patch size only: it depends on the numbers in a
        state, whichever tokens they belong to.
        """
        curves = self.table.networks.get(self.kind, {})
        if name in curves:
            return curves[name].at(self.rows * share)
        precision = self.kind.rsplit(" ", 1)[-1]
        own = patch_name(self.model.config.patch_size)
        kind = f"guide {own} {precision}" if self.guide else f"{own} {precision}"
        tokens = self.model.shape(Compute()).tokens
        curve = _lookup(self.table, self.table.networks.get(kind, {}), name, self.kind)
        return curve.at(self.rows * share * self.shape.tokens / tokens)


def _noises(op: Lin) -> set[int]:
    return {slot for slot, _ in op.z} | ({op.learned.slot} if op.learned is not None else set())


def _lookup(table: Throughput, curves: object, unit: str, kind: str = "") -> Curve:
    """A curve of a table. Raises PlanError, naming what to measure, if it is not there."""
    assert isinstance(curves, dict)
    if unit in curves:
        found: Curve = curves[unit]
        return found
    precision = kind.rsplit(" ", 1)[-1]
    option = f" --precision {precision}" if precision and precision != "unmerged" else ""
    what = f"{unit!r} of calls of the kind {kind!r}" if kind else repr(unit)
    raise PlanError(
        f"the throughput table of {table.name or 'this model'} does not say how long {what} takes; measure it with "
        f"'pliant bench {table.name or 'MODEL'}{option}'"
    )
