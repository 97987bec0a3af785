"""Reuse of a block's branches that is corrected by low-rank parts of its linear layers (arXiv 2505.05829; sheet H, 7).

Every linear layer is `y_kept + W_rank (x - x_kept)`. With `W_rank = up @ down` only `down @ x_kept` needs to be kept,
`rank` numbers per token, and not x. Queries, keys and values have factors of their own, as in the official code. A
layer whose two factors would cost more than its matrix is computed as it is, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pliant.compute.sites import Branch
from pliant.compute.spent import in_two_factors
from pliant.errors import PlanError
from pliant.models import kernels
from pliant.models.layers import Block, linear


def plain_block(blocks: Sequence[Block], s: int) -> Block:
    """The block of site s. Raises PlanError for one whose linear layers are not simply its own."""
    block = blocks[s // 2]
    if type(block) is not Block:
        kind = type(block).__name__
        raise PlanError(f"increments and single tokens need plain blocks; block {s // 2} of this network is a {kind}")
    return block


class Factors(NamedTuple):
    """Of `parts` matrices (out, in) that see the same input, one below the other in a layer's weight."""

    down: Tensor
    """(parts * rank, in)."""
    up: Tensor
    """(parts, out, rank)."""


class Increments:
    """Site 2i is block i's attention, 2i+1 its MLP. Holds factors of weights, which are constants of the network."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._factors: dict[tuple[int, str, int], Factors | None] = {}

    def traced(self, s: int, x: Tensor, rank: int) -> Branch:
        """The branch, what the first layer puts out, and `down @ x` of both layers: None where it is not needed.

        x (B, N, D): what the site sees.
        """
        first, second = self._layers(s)
        middle = linear(x, self._linear(s, first), None)
        between = self._between(s, middle)
        branch = linear(between, self._linear(s, second), None)
        if rank == 0:
            return (branch,)
        one, two = self._of(s, first, rank), self._of(s, second, rank)
        seen = None if one is None else kernels.linear(x, one.down, None)
        return (
            branch,
            None if one is None else middle,
            seen,
            None if two is None else kernels.linear(between, two.down, None),
        )

    def corrected(self, s: int, x: Tensor, kept: Branch, rank: int) -> Tensor:
        """The branch of now. kept: `traced`'s answer of an earlier call with the same rank, 1 or more."""
        first, second = self._layers(s)
        branch, middle, seen, seen_between = kept
        between = self._between(s, self._layer(s, first, rank, x, middle, seen))
        return self._layer(s, second, rank, between, branch, seen_between)

    def _layer(self, s: int, name: str, rank: int, x: Tensor, kept: Tensor | None, seen: Tensor | None) -> Tensor:
        """(B, N, in) -> (B, N, out); where there are several parts (parts, B, N, out / parts)."""
        factors = self._of(s, name, rank)
        if factors is None:
            return linear(x, self._linear(s, name), None)
        assert kept is not None and seen is not None
        change = kernels.linear(x, factors.down, None) - seen
        parts, out, _ = factors.up.shape
        if parts == 1:
            return kernels.linear_plus(change, factors.up[0], kept)
        y, u = (t.reshape(-1, parts, t.shape[-1] // parts).transpose(0, 1) for t in (kept, change))
        return torch.baddbmm(y, u, factors.up.transpose(1, 2)).view(parts, *x.shape[:2], out)

    def _between(self, s: int, middle: Tensor) -> Tensor:
        """From the first linear layer of a site to the second: attention, or the activation."""
        if s % 2:
            return kernels.gelu(middle)
        heads = self.blocks[s // 2].heads
        if middle.ndim == 3:  # queries, keys and values side by side
            q, k, v = middle.view(*middle.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = middle.view(*middle.shape[:3], heads, -1).transpose(2, 3)
        return kernels.attention(q, k, v).transpose(1, 2).flatten(2)

    def _of(self, s: int, name: str, rank: int) -> Factors | None:
        """The layer's factors, or None where the matrix itself costs less."""
        key = (s, name, rank)
        if key not in self._factors:
            weight = self._linear(s, name).weight.detach()
            parts = 3 if name == "qkv" else 1
            each = weight.view(parts, -1, weight.shape[1])
            self._factors[key] = _factors(each, rank) if in_two_factors(rank, weight.shape[1], each.shape[1]) else None
        return self._factors[key]

    def _linear(self, s: int, name: str) -> nn.Linear:
        layer: nn.Linear = getattr(plain_block(self.blocks, s), name)
        return layer

    @staticmethod
    def _layers(s: int) -> tuple[str, str]:
        return ("fc1", "fc2") if s % 2 else ("qkv", "proj")


def _factors(weights: Tensor, rank: int) -> Factors:
    """The best approximations of that rank of (parts, out, in)."""
    u, sigma, v = torch.linalg.svd(weights.float(), full_matrices=False)
    root = sigma[:, :rank].sqrt()
    up, down = u[..., :rank] * root[:, None], root[..., None] * v[:, :rank]
    return Factors(down.flatten(0, 1).to(weights.dtype), up.to(weights.dtype).contiguous())
