"""How much autograd holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Held:
    """Bytes that autograd graphs keep for their backward passes: now, and at most so far."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0


class _Packed:
    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor, self.size = held, tensor, tensor.numel() * tensor.element_size()
        held.now += self.size
        held.peak = max(held.peak, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


@contextmanager
def watching() -> Iterator[Held]:
    """Counts every tensor saved for backward while it is alive (saved-tensor hooks)."""
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Packed(held, t), lambda p: p.tensor):
        yield held
