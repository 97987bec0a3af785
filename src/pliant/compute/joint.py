"""Calls of several requests as one batch, each with the memory of its own request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.compute.cache import Cache, Key, Moment, Streams
from pliant.compute.lowering import SiteProgram
from pliant.compute.reuse import Reuse
from pliant.compute.sites import Branch


@dataclass(frozen=True)
class Share:
    """One request's rows of a joint batch: its cache, what the rows are, and when the call happens there."""

    cache: Cache
    streams: Streams
    moment: Moment
    rows: int


class JointCache(Cache):
    """Reads and writes every share of a batch in its own request's cache; keeps nothing itself.

    For programs that `can_join`: those only read and write whole batches.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        super().__init__()
        self.shares = shares
        self.sizes = [share.rows for share in shares]

    def write(self, key: Key, streams: Streams, value: Branch, moment: Moment) -> None:
        """Keep each share's rows of value (rows, ...) where and when its own request makes this call."""
        parts = [(None,) * len(self.sizes) if v is None else v.split(self.sizes) for v in value]
        for i, share in enumerate(self.shares):
            share.cache.write(key, share.streams, tuple(part[i] for part in parts), share.moment)

    def read(
        self,
        key: Key,
        streams: Streams,
        reuse: Reuse,
        moment: Moment,
        dtype: torch.dtype | None = None,
        rows: Tensor | None = None,
    ) -> Branch:
        """Each share's forecast from its own request's history, one after the other."""
        found = [share.cache.read(key, share.streams, reuse, share.moment, dtype) for share in self.shares]
        return tuple(
            None if parts[0] is None else torch.cat([p for p in parts if p is not None])
            for parts in zip(*found, strict=True)
        )


def can_join(program: SiteProgram) -> bool:
    """Whether a batch of such calls may hold rows of several requests.

    Not with a gate or fewer tokens, which remember and decide per request; and calls that take their whole output from
    memory run no network that could be shared.
    """
    compute = program.compute
    return compute.gate is None and compute.tokens is None and program.miss_whole not in ("out", "drift")
