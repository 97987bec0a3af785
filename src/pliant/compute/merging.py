"""Token merging: similar tokens are averaged before a branch and its answer is copied back (ToMe, arXiv 2303.17604).

Every window of the grid keeps one *destination*, the rest are *sources*. The sources most similar to some destination
are merged into it. Row 9 (ToMe) of sheet E's section 9.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pliant.compute.subset import flat_rows, take_tokens
from pliant.compute.tokens import Merge
from pliant.errors import ShapeError


@lru_cache(maxsize=256)
def places(grid: tuple[int, int], window: int, moment: int) -> tuple[Tensor, Tensor]:
    """(sources, destinations), int64 on the CPU, of a token grid (rows, columns) at a moment (number of the call).

    The destination of each whole window is drawn from a generator seeded by these three numbers, and by nothing else:
    all samples, streams and sites of a call share it, repeated runs agree, and over the calls of a request every place
    has its turn. (The published code draws anew at every site.) Tokens outside whole windows are sources. Raises
    ShapeError for a grid without a window.
    """
    rows, columns = grid[0] // window, grid[1] // window
    if rows * columns == 0:
        raise ShapeError(f"merging needs windows of {window}x{window}, and the grid has {grid[0]}x{grid[1]} tokens")
    text = f"merge/{grid[0]}/{grid[1]}/{window}/{moment}"
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    drawn = torch.randint(window**2, (rows, columns), generator=torch.Generator().manual_seed(seed))
    r = torch.arange(rows)[:, None] * window + drawn // window
    c = torch.arange(columns)[None] * window + drawn % window
    destinations = (r * grid[1] + c).flatten().sort().values
    free = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    free[destinations] = False
    return free.nonzero().flatten(), destinations


@dataclass(frozen=True)
class Matching:
    """Which tokens are merged into which, per sample."""

    kept: Tensor
    """(B, N - d - r) int64: sources that stay, as token numbers."""
    merged: Tensor
    """(B, r) int64: sources that are merged away, as token numbers."""
    into: Tensor
    """(B, r) int64: for each of them, which destination (0..d-1)."""
    destinations: Tensor
    """(d,) int64 token numbers."""

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N - r, D): the kept sources, then the destinations, averaged with what merges into them."""
        ends = self.destinations.expand(len(x), -1)
        rows = take_tokens(x, torch.cat([self.kept, ends], dim=1))
        kept, few = self.kept.shape[1], len(self.destinations)
        places = flat_rows(self.into + kept, rows.shape[1])
        rows.flatten(0, 1).index_add_(0, places, take_tokens(x, self.merged).flatten(0, 1))
        size = torch.ones(len(x), few, dtype=x.dtype, device=x.device)
        size.scatter_add_(1, self.into, torch.ones_like(self.into, dtype=x.dtype))
        rows[:, kept:] /= size[..., None]
        return rows

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, N - r, D) -> (B, N, D): every token gets the row that it went into."""
        kept, few = self.kept.shape[1], y.shape[1]
        own = torch.arange(few, device=y.device).expand(len(y), -1)
        tokens = torch.cat([self.kept, self.destinations.expand(len(y), -1), self.merged], dim=1)
        source = torch.empty_like(tokens).scatter_(1, tokens, torch.cat([own, self.into + kept], dim=1))
        return take_tokens(y, source)


def match(metric: Tensor, grid: tuple[int, int], merge: Merge, moment: int) -> Matching | None:
    """The matching of tokens (B, N, D), or None where nothing is merged.

    Each source looks for the destination of highest cosine similarity; the `N - merge.count(N)` sources of highest
    similarity go. Similarity costs `sources * destinations * D` multiply-adds per sample.
    """
    tokens = metric.shape[1]
    gone = tokens - merge.count(tokens)
    if gone == 0:
        return None
    sources, destinations = (p.to(metric.device) for p in places(grid, merge.window, moment))
    # A source's own length changes how it compares with other sources, not which destination is nearest.
    length = metric.norm(dim=-1).clamp_min(1e-12)
    ends = metric.index_select(1, destinations) / length[:, destinations, None]
    best, partner = (metric.index_select(1, sources) @ ends.transpose(1, 2)).max(-1)
    order = (best / length[:, sources]).argsort(dim=1, descending=True, stable=True)
    first, rest = order[:, :gone], order[:, gone:]
    return Matching(sources[rest.sort(1).values], sources[first], partner.gather(1, first), destinations)
