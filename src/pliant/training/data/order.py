"""The order in which samples are seen: a pure function of (seed, position), with nothing to save."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from pliant.errors import DataError
from pliant.training.draws import derived_seed


class EpochOrder:
    """Position p of the endless sample stream is in epoch p // n; each epoch has its own permutation."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise DataError("the data set is empty: there is nothing to train on")
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def indices(self, positions: Sequence[int]) -> Tensor:
        """(B,) int64 data set indices of these stream positions."""
        return torch.stack([self._permutation(p // self.n)[p % self.n] for p in positions])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # A batch touches at most neighbouring epochs unless the data set is tiny: keep few.
            if len(self._epochs) >= 4:
                self._epochs.clear()
            generator = Generator().manual_seed(derived_seed("epoch", self.seed, epoch))
            self._epochs[epoch] = torch.randperm(self.n, generator=generator)
        return self._epochs[epoch]
