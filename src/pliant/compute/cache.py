"""What the calls of one request leave for later ones. An explicit object: pass it in, a new one is a reset.

Values are kept per *stream* ("cond", "null"), because a guided call runs several streams as one batch and the next
call may run only one of them. A batch that is read as it was written is returned whole, without copying.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.compute.deciding import GateMemory
from pliant.compute.lowering import Slot
from pliant.compute.reuse import Clock, Reuse, forecast_weights
from pliant.compute.sites import Branch
from pliant.compute.subset import Regions
from pliant.errors import PlanError

Key: TypeAlias = tuple[Any, Slot]
"""(which network: patch size, ..., slot): values of different token grids never meet."""
Streams: TypeAlias = tuple[str, ...]
When: TypeAlias = int | Tensor
"""Number of the call that wrote a value, or (rows,) int64 where rows were written by different calls."""


@dataclass(frozen=True)
class Moment:
    """When a call happens: its number in the request, house time, half log-SNR (may be infinite)."""

    step: int
    time: float
    logsnr: float

    def on(self, clock: Clock) -> float:
        """This moment on a clock."""
        return float(getattr(self, clock))


@dataclass(frozen=True)
class _Entry:
    """One stream's share of a batch that was written together."""

    whole: Branch
    streams: Streams
    when: When

    def rows(self, stream: str) -> slice:
        """Which rows of the batch are this stream's."""
        total = next(v.shape[0] for v in self.whole if v is not None)
        size = total // len(self.streams)
        place = self.streams.index(stream)
        return slice(place * size, (place + 1) * size)


@dataclass(frozen=True)
class Decision:
    """What a gate decided in one call: `hit` (rows,) bool, rows in the order of the batch."""

    step: int
    streams: Streams
    hit: tuple[bool, ...]


@dataclass
class Cache:
    """One request's memory. `depth`: values kept per slot, the plan's highest forecast order plus one."""

    depth: int = 1
    _rings: dict[tuple[Key, str], list[_Entry]] = field(default_factory=dict)
    _moments: dict[int, Moment] = field(default_factory=dict)
    gates: dict[tuple[Any, Hashable, Streams], GateMemory] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    regions: Regions = field(default_factory=Regions)

    def write(self, key: Key, streams: Streams, value: Branch, moment: Moment) -> None:
        """Keep a batch whose rows are those of `streams`, one after the other, in equal shares."""
        self._moments[moment.step] = moment
        entry = _Entry(value, streams, moment.step)
        for stream in streams:
            ring = self._rings.setdefault((key, stream), [])
            ring.insert(0, entry)
            del ring[self.depth :]

    def write_rows(self, key: Key, streams: Streams, value: Branch, rows: Tensor, total: int, moment: Moment) -> None:
        """Keep a batch of which only these rows (of `total`) were computed; the others keep their history.

        value: (len(rows), N, D) per token stream. Rows that never had a value must be among `rows`.
        """
        self._moments[moment.step] = moment
        have = min(len(self._rings.get((key, s), [])) for s in streams)
        if len(rows) == total and have == 0:
            self.write(key, streams, value, moment)
            return
        old = [self._batch(key, streams, j) for j in range(have)]
        fresh: list[_Entry] = []
        for j in range(min(have + 1, self.depth)):
            # Written rows move down by one; the others stay, and where the ring grows repeat their oldest value, which
            # no forecast of theirs reads at two places: their clocks say the same.
            base, when = old[min(j, have - 1)]
            source: Branch = value if j == 0 else tuple(None if v is None else v[rows] for v in old[j - 1][0])
            whole = tuple(
                None if v is None or s is None else v.index_copy(0, rows, s.to(v.dtype))
                for v, s in zip(base, source, strict=True)
            )
            times = _per_row(when, total)
            times[rows] = moment.step if j == 0 else _per_row(old[j - 1][1], total)[rows]
            fresh.append(_Entry(whole, streams, times))
        for stream in streams:
            self._rings[key, stream] = list(fresh)

    def count(self, key: Key, streams: Streams) -> int:
        """How many values every one of these streams has in a slot."""
        return min(len(self._rings.get((key, s), ())) for s in streams)

    def counts(self, key: Key, streams: Streams, rows: int) -> list[int]:
        """How many distinct values each row has in a slot."""
        have = self.count(key, streams)
        if have == 0:
            return [0] * rows
        whens = [self._batch(key, streams, j)[1] for j in range(have)]
        together = {w for w in whens if isinstance(w, int)}
        if len(together) == have or have == 1:  # no two calls write the same entry
            return [have] * rows
        times = torch.stack([_per_row(w, rows) for w in whens])
        distinct: list[int] = (1 + (times[1:] != times[:-1]).to(torch.int64).sum(0)).tolist()
        return distinct

    def read(
        self,
        key: Key,
        streams: Streams,
        reuse: Reuse,
        moment: Moment,
        dtype: torch.dtype | None = None,
        rows: Tensor | None = None,
    ) -> Branch:
        """The forecast of a slot at this moment, for all rows of the streams or for some; dtype None: as it was kept.

        Raises PlanError if fewer than `order + 1` values are there (a plan that was checked never asks for them).
        """
        have, need = self.count(key, streams), reuse.order + 1
        if have < need:
            raise PlanError(
                f"call {moment.step} reuses {_name(key[1])}, which has {have} of the {need} values it needs"
            )
        values, whens = zip(*(self._batch(key, streams, j) for j in range(need)), strict=True)
        if rows is not None:
            values = tuple(tuple(None if v is None else v[rows] for v in batch) for batch in values)
            whens = tuple(w if isinstance(w, int) else w[rows.cpu()] for w in whens)
        if need == 1:
            return tuple(None if v is None else v.to(dtype or v.dtype) for v in values[0])
        weights = self._weights(reuse, moment, whens)
        return tuple(
            None if parts[0] is None else _mix(parts, weights, dtype or parts[0].dtype)
            for parts in zip(*values, strict=True)
        )

    def bytes(self) -> int:
        """Memory that the kept values hold; a tensor shared by several streams counts once."""
        tensors = {id(v): v for ring in self._rings.values() for e in ring for v in e.whole if v is not None}
        return sum(v.numel() * v.element_size() for v in tensors.values())

    def _batch(self, key: Key, streams: Streams, j: int) -> tuple[Branch, When]:
        """The j-th newest batch of these streams: whole if it was written as one."""
        entries = [self._rings[key, s][j] for s in streams]
        first = entries[0]
        if first.streams == streams and all(e is first for e in entries):
            return first.whole, first.when
        parts = [(e, e.rows(s)) for e, s in zip(entries, streams, strict=True)]
        whole = tuple(
            None if first.whole[i] is None else torch.cat([e.whole[i][r] for e, r in parts])  # type: ignore[index]
            for i in range(len(first.whole))
        )
        if isinstance(first.when, int) and all(isinstance(e.when, int) and e.when == first.when for e in entries):
            return whole, first.when
        size = parts[0][1].stop - parts[0][1].start
        whens = [_per_row(e.when, size * len(e.streams))[r] for e, r in parts]
        return whole, torch.cat(whens)

    def _weights(self, reuse: Reuse, moment: Moment, whens: Sequence[When]) -> list[float | Tensor]:
        """One weight per value: numbers, or (rows,) where rows were written at different calls."""
        at = moment.on(reuse.on)
        if all(isinstance(w, int) for w in whens):
            nodes = [self._moments[w].on(reuse.on) for w in whens if isinstance(w, int)]
            return list(forecast_weights(at, nodes, reuse.basis, reuse.fit))
        rows = max(len(w) for w in whens if isinstance(w, Tensor))
        table = torch.stack([_per_row(w, rows) for w in whens], dim=1).tolist()
        known: Mapping[tuple[int, ...], tuple[float, ...]] = {
            row: forecast_weights(at, [self._moments[w].on(reuse.on) for w in row], reuse.basis, reuse.fit)
            for row in {tuple(r) for r in table}
        }
        if len(known) == 1:  # all rows were written together after all
            return list(next(iter(known.values())))
        columns = zip(*(known[tuple(r)] for r in table), strict=True)
        return [torch.tensor(c, dtype=torch.float32) for c in columns]


def _mix(values: Sequence[Tensor], weights: Sequence[float | Tensor], dtype: torch.dtype) -> Tensor:
    """Weighted sum in float32 or wider: newest values are nearly equal, and bf16 would lose their difference.

    In bf16, where weights add up to 1 (polynomials), as `newest + sum w_j (value_j - newest)` without wide copies, a
    third of the memory traffic: differences of values within a factor of 2 are exact, every term rounds once.
    """
    numbers = [w for w in weights if isinstance(w, float)]
    if values[0].dtype == dtype == torch.bfloat16 and len(numbers) == len(values) and abs(sum(numbers) - 1) < 1e-9:
        newest = values[0]
        out = torch.lerp(newest, values[1], numbers[1])
        for value, number in zip(values[2:], numbers[2:], strict=True):
            out.add_(value - newest, alpha=number)
        return out
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total: Tensor | None = None
    for value, weight in zip(values, weights, strict=True):
        if isinstance(weight, Tensor):
            weight = weight.to(value.device).view(-1, *[1] * (value.ndim - 1))
            part = value.to(wide) * weight
            total = part if total is None else total.add_(part)
        else:
            total = value.to(wide) * weight if total is None else total.add_(value.to(wide), alpha=weight)
    assert total is not None
    return total.to(dtype)


def _per_row(when: When, rows: int) -> Tensor:
    return torch.full((rows,), when, dtype=torch.int64) if isinstance(when, int) else when.clone()


def _name(slot: Slot) -> str:
    kind, first, last = slot
    whole = {"out": "the output", "drift": "output minus input", "state": "the last state"}
    whole["kv"] = f"keys and values of site {first}"
    return {"branch": f"the branch of site {first}", "span": f"span({first},{last})", **whole}.get(kind, kind)
