"""Lowering: from a denoiser and the distinct computes of a plan to plain networks ready to run.

Everything that can be known before the loop is done here: adapters merged, patch weights projected, weights
converted, alignment coefficients of every evaluation, and modulation tables for the known times and labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.adapters.alignment import coarse
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.low_band import ScaleAlignment, read_back
from pliant.adapters.packing import Call, choose_packing, packed_forward
from pliant.adapters.routed_sites import RoutedSites
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.adapters.width import DynamicDiT
from pliant.adapters.width_slicing import width_variants
from pliant.allocator import keep_freed_memory
from pliant.compute import Compute, Subset
from pliant.compute.bands import down, up
from pliant.compute.cache import Cache, Moment, Streams
from pliant.compute.executor import Call as SiteCall
from pliant.compute.lowering import SiteProgram, lower
from pliant.compute.sites import SiteModel
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.models.dit import DiT
from pliant.models.network import Backbone
from pliant.models.patches import patch_pair
from pliant.models.precision import resolve_precision, variant

TABLE_BYTES = 32 * 2**20
"""Largest modulation table held at once; longer runs compute it in pieces."""

RawCall = Callable[[Tensor, int], Tensor]
"""(state, position in the list of times) -> raw network output."""

NetworkKey: TypeAlias = tuple[Any, ...]
"""Patch size, exit, scale, merged, precision: computes that agree in these run the same plain network."""
Networks: TypeAlias = dict[NetworkKey, Backbone | None]
"""Plain networks made so far; None where this one cannot be made plain."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The plain networks of one model, its guide and its refiner: what several samplers of that model may share."""

    own: Networks = field(default_factory=dict)
    guide: Networks = field(default_factory=dict)
    refiner: Networks = field(default_factory=dict)

    def of(self, compute: Compute, streams: Streams) -> Networks:
        """The networks among which a call's is."""
        return self.refiner if compute.refine else self.guide if streams == ("guide",) else self.own


class Lowered:
    """One compute of one denoiser, ready to run: a plain network, what its sites do, and how states and outputs are
    aligned.

    networks: shared by the computes of one plan, so that caching, skipping and plain steps use the same weights.
    """

    def __init__(self, denoiser: Denoiser, compute: Compute, networks: Networks | None = None) -> None:
        if denoiser.device.type == "cpu":
            keep_freed_memory()
        self.denoiser = denoiser
        self.compute = compute
        networks = {} if networks is None else networks
        self.grid = (denoiser.patch_of(compute), denoiser.exit_of(compute), compute.scale, denoiser.sample_size)
        self.low = None if compute.scale is None else denoiser.low_band(compute)
        key = (*self.grid[:3], compute.merged, compute.precision, denoiser.extrapolation)
        if key not in networks:
            networks[key] = self._plain_network()
        self.plain = networks[key]
        self.sign = -1.0 if denoiser.native.prediction == "velocity" and denoiser.network_time.sign < 0 else 1.0
        """Of the network's raw output, in house conventions."""
        self.sites: SiteModel | None = None
        self.program: SiteProgram | None = None
        if not compute.plain:
            if self.plain is None:
                raise PlanError("sites, caches and token subsets need merged adapters and a network without LayerNorms")
            if isinstance(denoiser.network, DynamicDiT):
                raise PlanError("sites, caches and token subsets do not work on a network with routed width")
            tokens = compute.tokens is not None or "kv" in compute.write
            if isinstance(compute.tokens, Subset) and compute.tokens.rule == "router":
                assert isinstance(denoiser.network, TokenRoutedDiT)  # the plan was checked
                assert isinstance(self.plain, DiT)
                self.sites = RoutedSites(self.plain, denoiser.network.routers)
            else:
                self.sites = self.plain.site_model(denoiser.sample_size, tokens)
            self.program = lower(compute, len(self.sites.sites))

    def _plain_network(self) -> Backbone | None:
        compute, denoiser = self.compute, self.denoiser
        whole = denoiser.network_for(compute)
        network = whole.plain(denoiser.patch_of(compute), compute.merged, denoiser.extrapolation)
        return None if network is None else variant(network, resolve_precision(compute.precision, network))

    def bind(
        self,
        times: Sequence[float],
        labels: Tensor,
        cache: Cache | None = None,
        streams: Streams = ("cond",),
        lands: Sequence[float] | None = None,
    ) -> BoundCalls:
        """Calls at these house times with these labels (B,): conditioning is computed ahead where possible.

        cache: the request's, which all its computes share; streams: what the rows are, in equal shares; lands: where
        the step from each time goes to, for flow maps.
        """
        return BoundCalls(self, times, labels, Cache() if cache is None else cache, streams, lands)


@dataclass(frozen=True)
class _Aligned:
    input_scale: float
    on_state: float
    on_coarse: float
    on_output: float


Answer: TypeAlias = tuple[Tensor, Tensor | None]
"""(value in house sign, variance code or None) of one call."""


class BoundCalls:
    """The calls of one `Lowered` in one sampling run; `call(k, x)` answers at the k-th time. Holds explicit state."""

    def __init__(
        self,
        lowered: Lowered,
        times: Sequence[float],
        labels: Tensor,
        cache: Cache,
        streams: Streams,
        lands: Sequence[float] | None = None,
    ) -> None:
        self.lowered = lowered
        self.cache = cache
        self.streams = streams
        denoiser = lowered.denoiser
        house = torch.tensor(list(times), dtype=torch.float64)
        ends = house if lands is None else torch.tensor(list(lands), dtype=torch.float64)
        self.aligned: list[_Aligned] = []
        self.low: list[ScaleAlignment] = []
        a = None
        if lowered.low is not None:
            denoiser.refuse_jump("a scale")
            low = lowered.low.alignment(house)
            house = low.time
            self.low = [low.at(k) for k in range(len(house))]
        else:
            a = denoiser.align(lowered.compute, house)
        if a is not None:
            columns = (a.input_scale, a.on_state, a.on_coarse, a.on_output)
            self.aligned = [_Aligned(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        if self.low:
            told = denoiser.encode(house)
        else:  # only flow maps are told where steps land
            told = denoiser.told(house, a, lowered.compute, ends if denoiser.config.flow_map else None)
        self.network_times = told.float().to(denoiser.device)
        self.labels = labels
        self.table: ModulationTable | SharedRows | None = None
        if lowered.plain is not None:
            self.table = ModulationTable(lowered.plain, self.network_times, labels)
        self.cut: list[DiT] = []
        """The network of every time, where its width depends on the time."""
        if isinstance(denoiser.network, DynamicDiT) and lowered.plain is not None:
            key = resolve_precision(lowered.compute.precision, denoiser.network.base)
            made: dict[int, DiT] = {}
            for network in width_variants(denoiser.network, self.network_times):
                if id(network) not in made:
                    made[id(network)] = variant(network, key)
                self.cut.append(made[id(network)])

    def call(self, k: int, x: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor | None]:
        """(value in house sign and the denoiser's kind, variance code or None) for states x (B, C, H, W).

        moment: when in the request this happens; needed by computes that keep or reuse something.
        """
        lowered, scaled = self.lowered, self.scaled(k, x)
        if lowered.plain is None or self.table is None:
            raw = lowered.denoiser.run(scaled, self.network_times[k], self.labels, lowered.compute)
        elif lowered.program is None or lowered.sites is None:
            network = self.cut[k] if self.cut else lowered.plain
            raw = network.forward_modulated(scaled, self.table.rows(k))
        else:
            if moment is None:
                raise PlanError("a call that keeps or reuses values needs to know when it happens; pass its moment")
            run = SiteCall(lowered.program, lowered.sites, self.cache, lowered.grid, self.streams, moment, lowered.sign)
            raw = run() if run.from_memory else run(scaled, self.table.rows(k))
        return self.finish(k, x, raw)

    def scaled(self, k: int, x: Tensor) -> Tensor:
        """The network's input for states x."""
        if self.lowered.low is not None:
            size = self.lowered.low.coarse.dit_config.input_size
            return down(x, size, self.lowered.low.low.band) * float(self.low[k].input_scale)
        return x * self.aligned[k].input_scale if self.aligned else x

    def finish(self, k: int, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's raw output for states x as (value, variance code)."""
        lowered, denoiser = self.lowered, self.lowered.denoiser
        value, variance = denoiser.split(raw)
        if lowered.low is not None:
            band, size = lowered.low.low.band, denoiser.dit_config.input_size
            low = down(x, (value.shape[-2], value.shape[-1]), band)
            variance = None if variance is None else up(variance, size, band)
            return read_back(x, low, value, self.low[k], band), variance
        if self.aligned:
            a = self.aligned[k]
            read = x * a.on_state
            if math.prod(ratio := denoiser.coarse_ratio(lowered.compute)) != 1:
                read.add_(coarse(x, patch_pair(ratio)), alpha=a.on_coarse)
            value = read.add_(value.to(x.dtype), alpha=a.on_output)
        return value, variance


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call that a request wants answered."""

    bound: BoundCalls
    k: int
    """Which of the bound calls' times."""
    x: Tensor
    """States (rows, C, H, W), those of every stream one after the other."""
    moment: Moment

    def answer(self) -> Answer:
        return self.bound.call(self.k, self.x, self.moment)


def packed_pair(
    first: BoundCalls, second: BoundCalls, k_first: int, k_second: int, x: Tensor
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Both calls on the states x in one network pass, or None where two passes are better or the only way.

    Two patch sizes share a pass only while they share weights, that is unmerged; and a pass is shared only on devices
    where that is faster (`choose_packing`).
    """
    network = first.lowered.denoiser.core
    if not isinstance(network, FlexiDiT) or first.lowered.plain is not None or second.lowered.plain is not None:
        return None
    tokens = [b.lowered.denoiser.shape(b.lowered.compute).tokens for b in (first, second)]
    approach = choose_packing(len(x), max(tokens), min(tokens), x.device)
    if approach == "separate":
        return None
    pairs = ((first, k_first), (second, k_second))
    calls = [
        Call(
            b.scaled(k, x),
            b.network_times[k].expand(len(x), *b.lowered.denoiser.pair),
            b.labels,
            patch_pair(b.lowered.denoiser.patch_of(b.lowered.compute)),
        )
        for b, k in pairs
    ]
    raw = packed_forward(network, calls, approach)
    return [b.finish(k, x, out) for (b, k), out in zip(pairs, raw, strict=True)]


class ModulationTable:
    """adaLN modulations for known times and labels, many steps at a time: one large product, not many small ones."""

    def __init__(self, network: Backbone, network_times: Tensor, labels: Tensor) -> None:
        self.network = network
        self.times = network_times
        self.unique, self.inverse = torch.unique(labels, return_inverse=True)
        self.identical = len(self.unique) == 1
        row_bytes = network.modulation_values * network.dtype.itemsize
        self.chunk = max(1, TABLE_BYTES // (row_bytes * len(self.unique)))
        self.first = -1
        self.cached = torch.empty(0)

    def rows(self, k: int) -> Tensor:
        """(B, 6*depth + 2, D) at the k-th time; (1, ...) broadcast over the batch when all labels are equal."""
        here = self.at(k)
        return here if self.identical else here[self.inverse]

    def at(self, k: int) -> Tensor:
        """(distinct labels, 6*depth + 2, D) at the k-th time."""
        first = k - k % self.chunk
        if first != self.first:
            self.first = first
            steps = self.times[first : first + self.chunk]
            t = steps.repeat_interleave(len(self.unique), dim=0)
            self.cached = self.network.modulations(t, self.unique.repeat(len(steps)))
        return self.cached[(k - first) * len(self.unique) : (k - first + 1) * len(self.unique)]


class SharedRows:
    """One call's share of a table that several calls use: rows come out the same whichever call asks."""

    def __init__(self, table: ModulationTable, places: Sequence[int], labels: Tensor) -> None:
        """places: of the call's times in the table's; labels (B,): among the table's."""
        self.table, self.places = table, places
        self.columns = torch.searchsorted(table.unique, labels)
        self.identical = len(torch.unique(labels)) == 1

    def rows(self, k: int) -> Tensor:
        """As `ModulationTable.rows`."""
        here = self.table.at(self.places[k])
        return here[self.columns[:1]] if self.identical else here[self.columns]


def share_tables(bound: Sequence[tuple[BoundCalls, Sequence[int]]]) -> None:
    """Give calls that run the same network, and keep or reuse parts of it, one table. With each call: the numbers of
    its evaluations.

    A product's last bits depend on how many rows it has, so a step would otherwise depend on which other steps spend
    the same: a gated plan and its frozen form would differ.
    """
    groups: dict[int, list[tuple[BoundCalls, Sequence[int]]]] = {}
    for call, evaluations in bound:
        if isinstance(call.table, ModulationTable):
            groups.setdefault(id(call.lowered.plain), []).append((call, evaluations))
    for calls in groups.values():
        if len(calls) == 1 or all(call.lowered.program is None for call, _ in calls):
            continue
        times = {e: call.network_times[k] for call, evaluations in calls for k, e in enumerate(evaluations)}
        order = {e: place for place, e in enumerate(sorted(times))}
        labels = torch.cat([call.labels for call, _ in calls])
        network = calls[0][0].lowered.plain
        assert network is not None
        table = ModulationTable(network, torch.stack([times[e] for e in sorted(times)]), labels)
        for call, evaluations in calls:
            call.table = SharedRows(table, [order[e] for e in evaluations], call.labels)
