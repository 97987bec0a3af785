"""Batches of samples of different sizes that fill a token budget: a pure function of the step, with nothing to save."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from pliant.errors import ConfigError, DataError
from pliant.models.network import Size, named
from pliant.models.patches import grid_of
from pliant.training.data.sizes import SizedSet
from pliant.training.draws import Draws, derived_seed
from pliant.training.objectives.base import SizedBatch

WINDOW = 8
"""Packs' worth of samples that are sorted by size together: fewer sizes in each pack, and still a random one."""


class Packs:
    """Pack number p of the endless stream: which samples, size by size, never more than `budget` tokens.

    Each epoch shuffles the samples, sorts windows of them by size, fills packs in that order until the next sample
    does not fit, and shuffles the packs. Every sample comes once per epoch.
    """

    def __init__(self, sizes: Tensor, tokens: Tensor, budget: int, seed: int) -> None:
        """sizes (N, axes) and tokens (N,) int64 of every sample. Raises DataError if one alone exceeds the budget."""
        if len(tokens) == 0:
            raise DataError("the data set is empty: there is nothing to train on")
        largest = int(tokens.argmax())
        if int(tokens[largest]) > budget:
            raise DataError(
                f"sample {largest} of size {named(tuple(sizes[largest].tolist()))} has {int(tokens[largest])} tokens, "
                f"more than the budget of {budget}; raise `tokens`"
            )
        self.budget, self.seed = budget, seed
        self.tokens = tokens
        _, self.kinds = torch.unique(sizes, dim=0, return_inverse=True)
        self.most = min(len(tokens), budget // int(tokens.min()))
        """Samples that a pack holds at most."""
        self._window = max(1, WINDOW * budget // max(1, int(tokens.float().mean())))
        self._starts = [0]
        """Number of the first pack of every epoch so far."""
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def members(self, pack: int) -> list[int]:
        """Indices of a pack's samples; those of one size are neighbours."""
        while pack >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._packs(len(self._starts) - 1)))
        epoch = next(e for e in reversed(range(len(self._starts))) if self._starts[e] <= pack)
        return self._packs(epoch)[pack - self._starts[epoch]]

    def _packs(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._fill(epoch))
        return self._epoch[1]

    def _fill(self, epoch: int) -> list[list[int]]:
        generator = Generator().manual_seed(derived_seed("packs", self.seed, epoch))
        order = torch.randperm(len(self.tokens), generator=generator)
        packs: list[list[int]] = []
        for window in order.split(self._window):
            window = window[torch.argsort(self.kinds[window], stable=True)]
            # Windows begin anywhere in the list of sizes, so that no size is always last and alone.
            turn = int(torch.randint(len(window), (1,), generator=generator))
            full = self.budget + 1
            for index in window.roll(turn).tolist():
                count = int(self.tokens[index])
                if full + count > self.budget:
                    packs.append([])
                    full = 0
                packs[-1].append(index)
                full += count
        return [packs[i] for i in torch.randperm(len(packs), generator=generator).tolist()]


class TokenFeed:
    """Serves packs of a `SizedSet`, mirrored at random if wanted."""

    def __init__(self, data: SizedSet, patch: Size, budget: int, seed: int, flip: bool = False) -> None:
        """patch: whose tokens are counted. Raises DataError for a sample that it does not divide or that is too big."""
        if budget < 1:
            raise ConfigError(f"a token budget is at least 1, got {budget}")
        self.data, self.flip = data, flip
        self._seed = derived_seed("data", seed)
        counts = [_tokens(tuple(size), patch) for size in data.sizes.unique(dim=0).tolist()]
        _, kinds = torch.unique(data.sizes, dim=0, return_inverse=True)
        self.packs = Packs(data.sizes, torch.tensor(counts)[kinds], budget, self._seed)

    def rows(self, step: int, block: int, blocks: int) -> range:
        """The samples' places in step `step`, for one of its `blocks` packs: for draws."""
        first = block * self.packs.most
        return range(first, first + len(self.packs.members(step * blocks + block)))

    def total(self, blocks: int) -> int:
        """Places that a step has."""
        return blocks * self.packs.most

    def batch(self, step: int, block: int, blocks: int) -> SizedBatch:
        """Pack `block` of the `blocks` of an optimizer step, on the CPU."""
        members = torch.tensor(self.packs.members(step * blocks + block))
        draws = Draws(self._seed, step, self.rows(step, block, blocks), self.total(blocks))
        heads = draws.each(lambda n, g: torch.rand(n, generator=g)) < 0.5
        flips = heads if self.flip else torch.zeros_like(heads)
        groups, at = [], 0
        for part in _neighbours(self.packs.kinds[members]):
            here = slice(at, at + part)
            at += part
            own = Draws(self._seed, step, draws.rows[here], draws.total)
            groups.append(self.data.samples(members[here], flips[here], own))
        return SizedBatch(tuple(groups), self.data.labels[members])


def _neighbours(kinds: Tensor) -> Sequence[int]:
    """Lengths of the runs of equal values."""
    lengths: list[int] = torch.unique_consecutive(kinds, return_counts=True)[1].tolist()
    return lengths


def _tokens(size: Size, patch: Size) -> int:
    count = 1
    for n in grid_of(size, patch):
        count *= n
    return count
