"""What a gate remembers between calls, and its decision for every row of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pliant.compute.gate import Gate, Rows, mean_change, mean_size


class GateMemory:
    """Of one gate and the rows of its streams."""

    def __init__(self, signal: Tensor, rows: int) -> None:
        self.reference = signal
        self.known = np.zeros(rows, bool)
        """Rows that have a reference."""
        self.total = np.zeros(rows, np.float32)
        """Accumulated change since the last full call."""
        self.run = np.zeros(rows, np.int64)
        """Hits in a row."""
        self.hits = np.zeros(rows, np.int64)
        """Hits so far."""
        self.seen = np.zeros(rows, np.float32)
        """Changes so far, summed."""
        self.gain = np.full(rows, np.nan, np.float32)
        """Change of the output per change of the input at the last full call; NaN until there were two."""
        self.calls = np.zeros(rows, np.int64)
        """Full calls that the gain has learned from."""
        self.full: tuple[Tensor, Tensor] | None = None
        """Input and output of every row's last full call, where the gate watches the output."""

    def learn(self, x: Tensor, out: Tensor, rows: Rows) -> None:
        """The gain and the last full call of these rows, after a full call: x, out (len(rows), C, H, W)."""
        if self.full is None:
            total = len(self.known)
            self.full = x.new_zeros(total, *x.shape[1:]), out.new_zeros(total, *out.shape[1:])
        old_x, old_out = self.full
        there = torch.from_numpy(rows).to(x.device)
        gain = (mean_change(out, old_out[there]) / mean_change(x, old_x[there])).cpu().numpy()
        self.gain[rows] = np.where(self.calls[rows] > 0, gain, np.nan)
        self.calls[rows] += 1
        self.full = old_x.index_copy(0, there, x), old_out.index_copy(0, there, out)


def decide(gate: Gate, memory: GateMemory, signal: Tensor, ready: Rows, voters: Rows | None) -> Rows:
    """(rows,) bool: which rows hit. The one synchronisation of a gated call; updates the memory.

    signal (rows, ...): of now. ready: rows whose hit would find what it reads. voters: whose decision each row
    follows, None: its own.
    """
    if gate.signal == "output":  # NaN while the gain is unknown, which hits nowhere
        moved = mean_change(signal, memory.reference)
        size = moved.new_ones(()) if memory.full is None else mean_size(memory.full[1])
        change = memory.gain * (moved / size).cpu().numpy()
    else:
        change = gate.change(signal, memory.reference).cpu().numpy()
    total = memory.total + change if gate.accumulate else change
    allowed = memory.known
    if gate.max_run is not None:
        allowed = allowed & (memory.run < gate.max_run)
    if gate.max_hits is not None:
        allowed = allowed & (memory.hits < gate.max_hits)
    if gate.max_seen is not None:
        allowed = allowed & (memory.seen < gate.max_seen)
    if not gate.never_hits:
        memory.seen = memory.seen + np.where(allowed, change, np.float32(0))
    hit = allowed & gate.passes(total) & ready
    if voters is not None:
        hit = hit[voters]
    memory.run = (memory.run + 1) * hit
    memory.hits = memory.hits + hit
    memory.total = np.where(hit, total, np.float32(0))
    if gate.reference == "last_step" or not hit.any():
        memory.reference = signal
    elif not hit.all():
        keep = torch.from_numpy(hit).to(signal.device).view(-1, *[1] * (signal.ndim - 1))
        memory.reference = torch.where(keep, memory.reference, signal)
    memory.known = memory.known | ~hit
    return hit
