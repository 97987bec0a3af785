"""Network calls of several requests answered together: those that run the same network, in one batch.

Rows keep their own times and labels (as modulations), states and caches; only the products are shared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pliant.adapters.exit_dit import ExitDiT
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.packing import Approach, choose_packing, packed_forward
from pliant.adapters.packing import Call as PackedCall
from pliant.compute.executor import Call as SiteCall
from pliant.compute.joint import JointCache, Share, can_join
from pliant.models.patches import patch_pair
from pliant.plans.engine import Answer, NetworkCall

ROWWISE = (None, "own", "fp32", "bf16", "bf16-mixed")
"""Precisions whose rows do not influence each other and whose kernels know every batch size. Calls in others ("int8d"
rounds a batch by its largest number, "bf16-compiled" compiles every size, registered ones may do either) run alone."""

Group: TypeAlias = list[int]
"""Places in the list of calls."""


def answer_together(calls: Sequence[NetworkCall], max_rows: int) -> list[Answer]:
    """The answers of all calls, in their order, from as few network passes as their differences allow.

    A call that has the network to itself runs exactly as it would alone. max_rows: of one pass; a call with more runs
    alone.
    """
    answers: list[Answer | None] = [None] * len(calls)
    for group in _groups(calls, max_rows):
        members = [calls[i] for i in group]
        found = [members[0].answer()] if len(members) == 1 else _answer_group(members)
        for i, answer in zip(group, found, strict=True):
            answers[i] = answer
    return [answer for answer in answers if answer is not None]


def network_key(call: NetworkCall) -> Hashable | None:
    """Calls with equal keys can share a pass; None: this one cannot. First: by what their rows are computed."""
    bound, lowered = call.bound, call.bound.lowered
    if lowered.plain is None or bound.table is None:
        network = lowered.denoiser.network
        if type(network) in (FlexiDiT, ExitDiT):
            return "unmerged", id(lowered.denoiser), lowered.grid
        return None
    if lowered.compute.precision not in ROWWISE:
        return None
    if lowered.program is None or lowered.sites is None:
        return "plain", id(bound.cut[call.k] if bound.cut else lowered.plain), call.x.shape[1:]
    if can_join(lowered.program):
        return "sites", id(lowered.plain), type(lowered.sites), lowered.program, lowered.grid, lowered.sign
    return None


def _groups(calls: Sequence[NetworkCall], max_rows: int) -> list[Group]:
    """Calls that run together. Every call is in one group."""
    by_key: dict[Hashable, list[Group]] = {}
    alone: list[Group] = []
    for i, call in enumerate(calls):
        key = network_key(call)
        if key is None:
            alone.append([i])
            continue
        groups = by_key.setdefault(key, [])
        if groups and sum(len(calls[j].x) for j in groups[-1]) + len(call.x) <= max_rows:
            groups[-1].append(i)
        else:
            groups.append([i])
    return alone + _packed(calls, by_key, max_rows)


def _packed(calls: Sequence[NetworkCall], by_key: dict[Hashable, list[Group]], max_rows: int) -> list[Group]:
    """The groups, those on different token grids of the same unmerged weights joined where one pass is faster."""
    out: list[Group] = []
    shared: dict[int, list[Group]] = {}
    for groups in by_key.values():
        for group in groups:
            lowered = calls[group[0]].bound.lowered
            if lowered.plain is None and isinstance(lowered.denoiser.network, FlexiDiT):
                shared.setdefault(id(lowered.denoiser), []).append(group)
            else:
                out.append(group)
    for groups in shared.values():
        joined = [i for group in groups for i in group]
        rows = sum(len(calls[i].x) for i in joined)
        if len(groups) > 1 and rows <= max_rows and _approach([calls[i] for i in joined]) != "separate":
            out.append(joined)
        else:
            out += groups
    return out


def _approach(calls: Sequence[NetworkCall]) -> Approach:
    """How to run calls on one set of unmerged weights."""
    rows: dict[int, int] = {}
    for call in calls:
        lowered = call.bound.lowered
        tokens = lowered.denoiser.shape(lowered.compute).tokens
        rows[tokens] = rows.get(tokens, 0) + len(call.x)
    approach = choose_packing(max(rows.values()), max(rows), min(rows), calls[0].x.device)
    # "joined" pairs sequences, so it needs as many of each length; "rows" takes any numbers.
    return "rows" if approach == "joined" and len(set(rows.values())) > 1 else approach


def _answer_group(calls: Sequence[NetworkCall]) -> list[Answer]:
    """The answers of two or more calls that can share a pass."""
    first = calls[0].bound
    lowered = first.lowered
    if lowered.plain is None:
        return [c.bound.finish(c.k, c.x, raw) for c, raw in zip(calls, _unmerged(calls), strict=True)]
    scaled = torch.cat([c.bound.scaled(c.k, c.x) for c in calls])
    modulations = torch.cat([_modulations(c) for c in calls])
    if lowered.program is None or lowered.sites is None:
        network = first.cut[calls[0].k] if first.cut else lowered.plain
        raw = network.forward_modulated(scaled, modulations)
    else:
        joint = JointCache([Share(c.bound.cache, c.bound.streams, c.moment, len(c.x)) for c in calls])
        run = SiteCall(
            lowered.program, lowered.sites, joint, lowered.grid, first.streams, calls[0].moment, lowered.sign
        )
        raw = run(scaled, modulations)
    parts = raw.split([len(c.x) for c in calls])
    return [c.bound.finish(c.k, c.x, part) for c, part in zip(calls, parts, strict=True)]


def _modulations(call: NetworkCall) -> Tensor:
    """(rows, 6*depth + 2, D)."""
    assert call.bound.table is not None
    return call.bound.table.rows(call.k).expand(len(call.x), -1, -1)


def _unmerged(calls: Sequence[NetworkCall]) -> list[Tensor]:
    """Raw outputs of calls on the weights as they are stored, on one token grid or several."""
    denoiser = calls[0].bound.lowered.denoiser
    by_grid: dict[Hashable, Group] = {}
    for i, call in enumerate(calls):
        by_grid.setdefault(call.bound.lowered.grid, []).append(i)
    batches = []
    for group in by_grid.values():
        members = [calls[i] for i in group]
        batches.append(
            PackedCall(
                torch.cat([c.bound.scaled(c.k, c.x) for c in members]),
                torch.cat([c.bound.network_times[c.k].expand(len(c.x), *denoiser.pair) for c in members]),
                torch.cat([c.bound.labels for c in members]),
                patch_pair(denoiser.patch_of(members[0].bound.lowered.compute)),
            )
        )
    if len(batches) == 1:
        (one,) = batches
        raws = [denoiser.run(one.x, one.t, one.y, calls[0].bound.lowered.compute)]
    else:
        assert isinstance(denoiser.network, FlexiDiT)
        raws = packed_forward(denoiser.network, batches, _approach(calls))
    out: dict[int, Tensor] = {}
    for group, raw in zip(by_grid.values(), raws, strict=True):
        out.update(zip(group, raw.split([len(calls[i].x) for i in group]), strict=True))
    return [out[i] for i in range(len(calls))]
