"""A DiT seen as sites: attention and MLP of every block, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.compute.sites import Branch, Site, State
from pliant.models.dit import DiT
from pliant.models.increments import Increments
from pliant.models.layers import Block, linear, linear_gelu, modulated_norm, per_token


class DiTSites:
    """Site 2i is block i's attention, 2i+1 its MLP. The context is the call's modulations (B or 1, 6L+2, D)."""

    def __init__(self, network: DiT) -> None:
        self.network = network
        self.blocks: list[Block] = list(network.blocks)  # type: ignore[arg-type]
        self.increments = Increments(self.blocks)
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

    def traced(self, s: int, seen: State, rank: int, context: Tensor) -> Branch:
        return self.increments.traced(s, seen[0], rank)

    def corrected(self, s: int, seen: State, kept: Branch, rank: int, context: Tensor) -> Branch:
        return (self.increments.corrected(s, seen[0], kept, rank),)

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
