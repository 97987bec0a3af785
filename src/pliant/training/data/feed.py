"""Batches as a pure function of the step: order, mirroring and partners of any row of any step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from pliant.training.data.images import PairedSet, TrainingSet
from pliant.training.data.order import EpochOrder
from pliant.training.draws import Draws, derived_seed
from pliant.training.objectives.base import Batch


class Feed:
    """Serves rows of the global batch of any step, without state of its own."""

    def __init__(self, data: TrainingSet, seed: int, flip: bool = False, partners: bool = False) -> None:
        self.data, self.flip, self.partners = data, flip, partners
        self._seed = derived_seed("data", seed)
        self.order = EpochOrder(len(data.labels), self._seed)
        self._members = _members(data.labels) if partners else {}

    def batch(self, step: int, rows: Sequence[int], total: int) -> Batch:
        """Rows (places in the global batch of `total` samples) of optimizer step `step`, on the CPU."""
        draws = Draws(self._seed, step, rows, total)
        indices = self.order.indices([step * total + row for row in rows])
        labels = self.data.labels[indices]
        flips = self._flips(draws)
        images = self.data.samples(indices, flips, draws)
        if isinstance(self.data, PairedSet):
            return Batch(images, labels, sources=self.data.sources(indices, flips, draws))
        if not self.partners:
            return Batch(images, labels)
        others = self._partners(labels, draws)
        return Batch(images, labels, self.data.samples(others, self._flips(draws), draws))

    def _flips(self, draws: Draws) -> Tensor:
        heads = draws.each(lambda n, g: torch.rand(n, generator=g)) < 0.5
        return heads if self.flip else torch.zeros_like(heads)

    def _partners(self, labels: Tensor, draws: Draws) -> Tensor:
        """(B,) indices of uniformly chosen samples with the same labels (possibly the sample itself)."""

        def choice(n: int, generator: Generator) -> Tensor:
            return torch.rand(n, generator=generator, dtype=torch.float64)

        u = draws.each(choice).tolist()
        members = [self._members[label] for label in labels.tolist()]
        return torch.stack([m[int(x * len(m))] for m, x in zip(members, u, strict=True)])


class EqualBlocks:
    """A `Feed` served in blocks of equally many rows: what one process reads for one forward pass."""

    def __init__(self, feed: Feed, size: int) -> None:
        self.feed, self.size = feed, size

    def rows(self, step: int, block: int, blocks: int) -> range:
        """A block's places in the global batch of step `step`."""
        return range(block * self.size, (block + 1) * self.size)

    def total(self, blocks: int) -> int:
        """Places in a global batch of so many blocks."""
        return blocks * self.size

    def batch(self, step: int, block: int, blocks: int) -> Batch:
        """Block `block` of the `blocks` of an optimizer step, on the CPU."""
        return self.feed.batch(step, self.rows(step, block, blocks), self.total(blocks))


def _members(labels: Tensor) -> dict[int, Tensor]:
    return {int(label): (labels == label).nonzero()[:, 0] for label in labels.unique()}
