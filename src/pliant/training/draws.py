"""Randomness without state: every random number of a training step is a function of (seed, step, row).

A *row* is a sample's place in the global batch of one optimizer step. Whoever computes row 5 of step 700 (one
process or the third of four, with or without gradient accumulation) draws the same time, noise and label
dropout for it. So a run resumes exactly from its step counter alone, and the number of processes does not
change the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from pliant.paths import Path


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts (and their order)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """Random numbers for some rows of one step. Each call gives fresh numbers, in a fixed sequence.

    All draws happen on the CPU, so that a run on a GPU sees the same noise as a run on a CPU, and are then
    moved.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        rows: Sequence[int],
        total: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`rows`: this process's places in the global batch of `total` samples (default: max(rows) + 1)."""
        self.seed, self.step = seed, step
        self.rows = list(rows)
        self.total = max(self.rows, default=-1) + 1 if total is None else total
        self.device = torch.device(device)
        self._calls = 0

    @staticmethod
    def single(n: int, seed: int = 0, step: int = 0, device: torch.device | str = "cpu") -> Draws:
        """Draws for a whole batch of n samples in one process."""
        return Draws(seed, step, range(n), n, device)

    def shared(self) -> Generator:
        """A CPU generator that is equal for all rows and processes: for choices made once per step."""
        self._calls += 1
        return Generator().manual_seed(derived_seed("shared", self.seed, self.step, self._calls))

    def each(self, draw: Callable[[int, Generator], Tensor]) -> Tensor:
        """`draw(total, generator) -> (total, ...)` for the global batch; returns this process's rows.

        For cheap per-sample numbers (times, dropout). Costs `total` draws on every process.
        """
        return draw(self.total, self.shared())[self.rows].to(self.device, non_blocking=True)

    def uniform(self) -> Tensor:
        """(B,) float32 numbers in [0, 1)."""
        return self.each(lambda n, generator: torch.rand(n, generator=generator))

    def integers(self, high: int) -> Tensor:
        """(B,) int64 numbers in 0..high-1."""
        return self.each(lambda n, generator: torch.randint(high, (n,), generator=generator))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32 standard normal noise; each row from a generator of its own."""
        return self._noise(shape, lambda generator: torch.randn(tuple(shape), generator=generator))

    def noise(self, path: Path, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32 noise of the path's own law; on Gaussian paths the numbers of `normal`."""
        return self._noise(shape, lambda generator: path.sample_noise((1, *shape), generator)[0])

    def noises(self, path: Path, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """`noise` of rows with shapes of their own: one (*shape) float32 per row. Equal shapes: the same numbers."""
        draws = self._generators()
        drawn = [path.sample_noise((1, *shape), generator)[0] for shape, generator in zip(shapes, draws, strict=True)]
        return [noise.to(self.device, non_blocking=True) for noise in drawn]

    def _noise(self, shape: Sequence[int], draw: Callable[[Generator], Tensor]) -> Tensor:
        out = torch.empty(len(self.rows), *shape)
        for place, generator in enumerate(self._generators()):
            out[place] = draw(generator)
        return out.to(self.device, non_blocking=True)

    def _generators(self) -> Iterator[Generator]:
        """One generator per row (the same object, seeded anew)."""
        self._calls += 1
        generator = Generator()
        base = derived_seed("normal", self.seed, self.step, self._calls)
        for row in self.rows:
            # torch's CPU generator uses 32 bits of a seed; an odd multiplier keeps rows distinct.
            yield generator.manual_seed((base + 0x9E3779B1 * row) & 0xFFFFFFFF)
