"""A DiT seen as sites: attention and MLP of every block, one after the other."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.compute.sites import Branch, Site, State
from pliant.errors import PlanError
from pliant.models import kernels
from pliant.models.dit import DiT
from pliant.models.layers import Block, linear, linear_gelu, modulated_norm, per_token

Factors: TypeAlias = tuple[Tensor, ...]
"""(weight,), or (left, right) with weight ~ left @ right."""


class DiTSites:
    """Site 2i is block i's attention, 2i+1 its MLP. The context is the call's modulations (B or 1, 6L+2, D)."""

    def __init__(self, network: DiT) -> None:
        self.network = network
        self.blocks: list[Block] = list(network.blocks)  # type: ignore[arg-type]
        self.factors: dict[tuple[int, str, int], Factors] = {}
        """Low-rank factors of weights, made when first needed; constants of the network."""
        self.sites = tuple(Site(kind, i) for i in range(len(self.blocks)) for kind in ("attention", "mlp"))

    def begin(self, x: Tensor, modulations: Tensor) -> tuple[State, Tensor]:
        """x (B, C, H, W)."""
        return (self.network.embed(x),), modulations

    def norm(self, s: int, state: State, context: Tensor) -> State:
        eps = self.blocks[s // 2].norm2_eps if s % 2 else 1e-6
        return (modulated_norm(state[0], context[:, 3 * s], context[:, 3 * s + 1], eps),)

    def inner(self, s: int, seen: State, context: Tensor) -> Branch:
        block = self.blocks[s // 2]
        if s % 2 == 0:
            return (block.attention(seen[0], lambda _: None, None),)
        return (linear(linear_gelu(seen[0], block.fc1, None), block.fc2, None),)

    def traced(self, s: int, seen: State, context: Tensor) -> Branch:
        """(branch, input of both linear layers, output of the first)."""
        block, x = self._plain_block(s), seen[0]
        first, second = (block.qkv, block.proj) if s % 2 == 0 else (block.fc1, block.fc2)
        middle = linear(x, first, None)
        between = self._between(s, middle)
        return linear(between, second, None), x, middle, between

    def corrected(self, s: int, seen: State, kept: Branch, rank: int, context: Tensor) -> Branch:
        """Increment-calibrated reuse (arXiv 2505.05829): `y = y_kept + W_rank (x - x_kept)` in both linear layers."""
        out, x, middle, between = kept
        assert out is not None and x is not None and middle is not None and between is not None
        if rank == 0:
            return (out,)
        names = ("qkv", "proj") if s % 2 == 0 else ("fc1", "fc2")
        now = self._between(s, self._added(s, names[0], rank, seen[0] - x, middle))
        return (self._added(s, names[1], rank, now - between, out),)

    def _between(self, s: int, middle: Tensor) -> Tensor:
        """From the first linear layer of a site to the second: attention, or the activation."""
        if s % 2:
            return kernels.gelu(middle)
        b, n, _ = middle.shape
        q, k, v = middle.view(b, n, 3, self.blocks[s // 2].heads, -1).permute(2, 0, 3, 1, 4)
        return kernels.attention(q, k, v).transpose(1, 2).reshape(b, n, -1)

    def _added(self, s: int, name: str, rank: int, change: Tensor, kept: Tensor) -> Tensor:
        """kept (B, N, out) plus the best approximation of that rank of a layer's weight, times a change (B, N, in)."""
        key = (s, name, rank)
        if key not in self.factors:
            weight = getattr(self._plain_block(s), name).weight.detach()
            if rank * sum(weight.shape) >= weight.numel() or rank >= min(weight.shape):
                # Two factors would cost more than the matrix, which is exact.
                self.factors[key] = (weight,)
            else:
                u, sigma, v = torch.linalg.svd(weight.float(), full_matrices=False)
                root = sigma[:rank].sqrt()
                self.factors[key] = ((u[:, :rank] * root).to(weight.dtype), (root[:, None] * v[:rank]).to(weight.dtype))
        *left, last = reversed(self.factors[key])
        for factor in left:
            change = F.linear(change, factor)
        return kernels.linear_plus(change, last, kept)

    def _plain_block(self, s: int) -> Block:
        block = self.blocks[s // 2]
        if type(block) is not Block:
            raise PlanError(f"increments need plain blocks; block {s // 2} of this network is a {type(block).__name__}")
        return block

    def add(self, s: int, state: State, branch: Branch, context: Tensor) -> State:
        change = branch[0]
        assert change is not None
        return (torch.addcmul(state[0], per_token(context[:, 3 * s + 2]), change),)

    def run(self, first: int, last: int, state: State, context: Tensor) -> State:
        s = first
        while s < last:
            if s % 2 == 0 and s + 1 < last:  # a whole block, as the plain network runs it
                i = s // 2
                state = (self.blocks[i](state[0], context[:, 6 * i : 6 * i + 6]),)
                s += 2
            else:
                state = self.add(s, state, self.inner(s, self.norm(s, state, context), context), context)
                s += 1
        return state

    def head(self, state: State, context: Tensor) -> Tensor:
        return self.network.read(state[0], context)
