"""What a gate remembers between calls, and its decision for every row of a batch.

Plain numbers, row by row: a batch has few rows, and one small operation of PyTorch's costs as much as all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.compute.gate import Gate, mean_change, mean_size


@dataclass
class RowMemory:
    """Of one row."""

    known: bool = False
    """Whether it has a reference."""
    total: float = 0.0
    """Accumulated change since the last full call."""
    run: int = 0
    """Hits in a row."""
    hits: int = 0
    """Hits so far."""
    seen: float = 0.0
    """Changes so far, summed."""
    gain: float = math.nan
    """Change of the output per change of the input at the last full call; NaN until there were two."""
    calls: int = 0
    """Full calls that the gain has learned from."""


class GateMemory:
    """Of one gate and the rows of its streams."""

    def __init__(self, signal: Tensor) -> None:
        self.rows = [RowMemory() for _ in range(len(signal))]
        self.reference = signal
        """(rows, ...): what the signal of now is compared with."""
        self.sizes: list[float] | None = None
        """Of the reference, once they were asked for."""
        self.full: tuple[Tensor, Tensor] | None = None
        """Input and output of every row's last full call, where the gate watches the output."""

    def refer(self, reference: Tensor) -> None:
        self.reference, self.sizes = reference, None

    def changes(self, signal: Tensor) -> list[float]:
        """`mean|signal - reference| / mean|reference|` of every row: the one synchronisation of a gated call."""
        moved = mean_change(signal, self.reference)
        if self.sizes is None:
            parts: list[list[float]] = torch.stack((moved, mean_size(self.reference))).tolist()
            distances, self.sizes = parts
        else:
            distances = moved.tolist()
        return [distance / size for distance, size in zip(distances, self.sizes, strict=True)]

    def predicted_changes(self, signal: Tensor) -> list[float]:
        """How much of it every row's output should have changed by; NaN while the gain is unknown."""
        moved: list[float] = mean_change(signal, self.reference).tolist()
        sizes: list[float] = [1.0] * len(moved) if self.full is None else mean_size(self.full[1]).tolist()
        return [row.gain * change / size for row, change, size in zip(self.rows, moved, sizes, strict=True)]

    def learn(self, x: Tensor, out: Tensor, places: Sequence[int]) -> None:
        """The gain and the last full call of the rows at these places, after it: x, out (len(places), C, H, W)."""
        x, out = x.float(), out.float()  # a plan may change the precision between calls
        if self.full is None:
            total = len(self.rows)
            self.full = x.new_zeros(total, *x.shape[1:]), out.new_zeros(total, *out.shape[1:])
        old_x, old_out = self.full
        there = torch.tensor(places, device=x.device)
        gains: list[float] = (mean_change(out, old_out[there]) / mean_change(x, old_x[there])).tolist()
        for place, gain in zip(places, gains, strict=True):
            row = self.rows[place]
            row.gain = gain if row.calls else math.nan
            row.calls += 1
        self.full = old_x.index_copy(0, there, x), old_out.index_copy(0, there, out)


def decide(
    gate: Gate, memory: GateMemory, signal: Tensor, ready: Sequence[bool], voters: Sequence[int] | None = None
) -> list[bool]:
    """Which rows hit. Updates the memory.

    signal (rows, ...): of now. ready: rows whose hit would find what it reads. voters: whose decision each row
    follows; None: its own.
    """
    if gate.signal == "output":
        changes = memory.predicted_changes(signal)
    else:
        changes = [gate.rescaled(change) for change in memory.changes(signal)]
    totals = [row.total + c if gate.accumulate else c for row, c in zip(memory.rows, changes, strict=True)]
    hit: list[bool] = []
    for row, change, total, can in zip(memory.rows, changes, totals, ready, strict=True):
        allowed = row.known and gate.allows(row.run, row.hits, row.seen)
        if allowed and not gate.never_hits and not math.isnan(change):
            row.seen += change
        hit.append(allowed and can and gate.passes(total))
    if voters is not None:
        hit = [hit[voter] for voter in voters]
    for row, total, hits in zip(memory.rows, totals, hit, strict=True):
        row.run = row.run + 1 if hits else 0
        row.hits += hits
        row.total = total if hits else 0.0
        row.known = row.known or not hits
    if gate.reference == "last_step" or not any(hit):
        memory.refer(signal)
    elif not all(hit):
        keep = torch.tensor(hit, device=signal.device).view(-1, *[1] * (signal.ndim - 1))
        memory.refer(torch.where(keep, memory.reference, signal))
    return hit
