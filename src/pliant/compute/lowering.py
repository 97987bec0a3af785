"""From what a call may spend to a straight list of operations: once per distinct compute, never in the loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

from pliant.compute.compute import Compute
from pliant.compute.pooling import pool_of_hit
from pliant.compute.reuse import WHOLE, Reuse, ReuseKind, branch_slot
from pliant.compute.sites import parse_sites, runs
from pliant.compute.tokens import Merge, Pool
from pliant.errors import PlanError

Slot: TypeAlias = tuple[str, int, int]
"""("branch", s, s+1), ("increment(8)", s, s+1), ("span", a, b), ("out", 0, M), ...: a place in the cache."""


@dataclass(frozen=True)
class Run:
    """Run sites first..last-1 and keep nothing."""

    first: int
    last: int


@dataclass(frozen=True)
class RunStore:
    """Run one site and keep its branch."""

    site: int
    increment: int | None = None
    """Keep what a correction of this rank needs of its linear layers, too."""


@dataclass(frozen=True)
class AddBranch:
    """Add the forecast of one site's branch through the gate of now."""

    site: int
    rank: int | None = None
    """Of the correction by the change of what the site sees."""


@dataclass(frozen=True)
class AddSpan:
    """Add the forecast change of the state over sites first..last-1."""

    first: int
    last: int


@dataclass(frozen=True)
class Mark:
    """Remember the state here: a span that is written begins."""

    site: int


@dataclass(frozen=True)
class Save:
    """Write the change of the state since the mark."""

    first: int
    last: int


@dataclass(frozen=True)
class PoolTokens:
    """Remember the state and go on with the means of its windows: sites first..last-1 run on fewer tokens."""

    first: int
    last: int
    window: tuple[int, int]


@dataclass(frozen=True)
class SpreadTokens:
    """Back to the remembered state, plus what the means have changed by, copied to every token of a window."""

    first: int
    last: int
    window: tuple[int, int]


Operation: TypeAlias = Run | RunStore | AddBranch | AddSpan | Mark | Save | PoolTokens | SpreadTokens


@dataclass(frozen=True)
class SiteProgram:
    """One compute on a network of `sites` sites.

    probe: operations before the gate decides (empty without one); miss: those after it, or all of them; hit: those of
    a hit. `*_whole`: the kind of reuse where that side is the whole network from the cache.
    """

    compute: Compute
    sites: int
    probe: tuple[Operation, ...]
    miss: tuple[Operation, ...]
    hit: tuple[Operation, ...]
    miss_whole: ReuseKind | None
    hit_whole: ReuseKind | None
    hit_slots: tuple[Slot, ...]
    """What a hit reads: without `reuse.order + 1` values of each there is no hit."""
    write_whole: tuple[str, ...]
    """Which of "out", "drift" and "state" a full call keeps."""


@lru_cache(maxsize=1024)
def lower(compute: Compute, sites: int) -> SiteProgram:
    """The operations of a compute on a network with so many sites. Raises PlanError for another number of them.

    Remembered: checking a plan and every request on it ask for the same few.
    """
    for what, text in (("sites", compute.sites), ("gate.on_hit", compute.gate.on_hit if compute.gate else None)):
        if text is not None and len(parse_sites(text)) != sites:
            raise PlanError(f"{what} {text!r} is for {len(parse_sites(text))} sites, this model has {sites}")
    for first, last in compute.spans:
        if last > sites:
            raise PlanError(f"span({first},{last}) is written, but this model has only {sites} sites")
    pool = compute.tokens if isinstance(compute.tokens, Pool) else None
    for span in pool.spans if pool else ():
        if span.last > sites:
            raise PlanError(f"{span.name} run on averaged tokens, but this model has only {sites} sites")
    letters = parse_sites(compute.sites) if compute.sites else "R" * sites
    miss = _operations(compute, letters)
    probe: tuple[Operation, ...] = ()
    hit: tuple[Operation, ...] = ()
    slots: tuple[Slot, ...] = ()
    hit_whole: ReuseKind | None = None
    if compute.gate is not None:
        at = compute.gate.probe
        cut = _split(miss, at)
        probe, miss = miss[:cut], miss[cut:]
        hit_letters = parse_sites(compute.gate.on_hit)
        # The probe has run and kept its share by then; a hit keeps nothing.
        fewer = pool_of_hit(pool, hit_letters) if pool else None
        rest = _operations(Compute(sites=compute.gate.on_hit, reuse=compute.reuse, tokens=fewer), hit_letters)
        hit = _after(rest, at)
        slots = read_slots(compute.reuse, hit_letters)
        hit_whole = _whole(compute.reuse, hit_letters)
    return SiteProgram(
        compute,
        sites,
        probe,
        miss,
        hit,
        _whole(compute.reuse, letters),
        hit_whole,
        slots,
        tuple(kind for kind in WHOLE if kind in compute.write),
    )


def read_slots(reuse: Reuse | None, letters: str) -> tuple[Slot, ...]:
    """The cache places that these sites read."""
    if reuse is None:
        return ()
    if (kind := _whole(reuse, letters)) is not None:
        return ((kind, 0, len(letters)),)
    spans = [(a, b) for letter, a, b in runs(letters) if letter == "C"]
    if reuse.kind == "span":
        return tuple(("span", a, b) for a, b in spans)
    return tuple((branch_slot(reuse.rank), s, s + 1) for a, b in spans for s in range(a, b))


def write_slots(compute: Compute, sites: int) -> tuple[Slot, ...]:
    """The cache places that a full (missed) call writes."""
    letters = parse_sites(compute.sites) if compute.sites else "R" * sites
    slots: list[Slot] = [("span", a, b) for a, b in compute.spans]
    if compute.keeps_branches:
        kept = [s for s, letter in enumerate(letters) if letter == "R" and not _pooled(compute, s)]
        slots += [(branch_slot(compute.increment), s, s + 1) for s in kept]
    slots += [(kind, 0, sites) for kind in (*WHOLE, "kv") if kind in compute.write]
    return tuple(slots)


def _whole(reuse: Reuse | None, letters: str) -> ReuseKind | None:
    """The kind of reuse if these sites are the whole network from the cache."""
    return reuse.kind if reuse is not None and reuse.kind in WHOLE and set(letters) == {"C"} else None


def _operations(compute: Compute, letters: str) -> tuple[Operation, ...]:
    """Site by site, then equal neighbours joined."""
    if _whole(compute.reuse, letters) is not None:
        return ()
    begins = {a for a, _ in compute.spans}
    ends: dict[int, list[int]] = {}
    for a, b in compute.spans:
        ends.setdefault(b, []).append(a)
    pools = {span.first: span for span in compute.tokens.spans} if isinstance(compute.tokens, Pool) else {}
    spread = {span.last: span for span in pools.values()}
    probe = (compute.gate.probe,) if compute.gate else ()
    cuts = sorted({0, len(letters), *begins, *ends, *pools, *spread, *probe})
    rank = None if compute.reuse is None else compute.reuse.rank
    spans = compute.reuse is not None and compute.reuse.kind == "span"
    out: list[Operation] = []
    for letter, first, last in runs(letters):
        pieces = [first, *(c for c in cuts if first < c < last), last]
        if letter == "C" and spans:
            if any(first < c < last for c in (*begins, *ends)):
                raise PlanError(f"a written span begins or ends inside the reused span({first},{last})")
            pieces = [first, last]
        for a, b in pairwise(pieces):
            if a in begins:
                out.append(Mark(a))
            if a in pools:
                out.append(PoolTokens(a, pools[a].last, pools[a].ratio))
            if letter == "R" and compute.keeps_branches and not _pooled(compute, a):
                out += [RunStore(s, compute.increment) for s in range(a, b)]
            elif letter == "R":
                out.append(Run(a, b))
            elif letter == "C" and spans:
                out.append(AddSpan(a, b))
            elif letter == "C":
                out += [AddBranch(s, rank) for s in range(a, b)]
            if b in spread:
                out.append(SpreadTokens(spread[b].first, b, spread[b].ratio))
            out += [Save(start, b) for start in ends.get(b, ())]
    return tuple(out)


def _pooled(compute: Compute, site: int) -> bool:
    """Whether a site runs on averaged tokens."""
    return isinstance(compute.tokens, Pool) and any(span.first <= site < span.last for span in compute.tokens.spans)


def _first(operation: Operation) -> int:
    return operation.site if isinstance(operation, (RunStore, AddBranch, Mark)) else operation.first


def _split(operations: tuple[Operation, ...], at: int) -> int:
    """How many operations belong to the sites before `at`."""
    for k, operation in enumerate(operations):
        closing = isinstance(operation, (Save, SpreadTokens))
        begins = operation.last if isinstance(operation, (Save, SpreadTokens)) else _first(operation)
        if begins > at or (begins == at and not closing):
            return k
    return len(operations)


def _after(operations: tuple[Operation, ...], at: int) -> tuple[Operation, ...]:
    """The operations on sites from `at` on; a run across it is cut."""
    rest: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Run) and operation.first < at < operation.last:
            rest.append(Run(at, operation.last))
        elif _first(operation) >= at:
            rest.append(operation)
    return tuple(rest)


def merges(compute: Compute) -> bool:
    """Whether attention sees merged tokens."""
    return isinstance(compute.tokens, Merge)
