"""A network of rotary blocks seen as sites, at one size: attention and MLP of every block, one after the other."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pliant.compute.sites import Branch, Site, State
from pliant.errors import PlanError
from pliant.models.layers import modulated_norm, per_token
from pliant.models.network import Size
from pliant.models.rotary import EPS, RotaryBlock, RotaryNetwork


class FlexibleSites:
    """Site 2i is block i's attention, 2i+1 its MLP. The context is the call's modulations (B or 1, 6L+2, D)."""

    def __init__(self, network: RotaryNetwork, size: Size) -> None:
        self.network, self.size = network, size
        self.blocks = [cast(RotaryBlock, block) for block in network.blocks]
        self.rope = network.rope(size, network.patch, network.extrapolation, network.device)
        self.sites = tuple(Site(kind, i) for i in range(len(self.blocks)) for kind in ("attention", "mlp"))

    def begin(self, x: Tensor, modulations: Tensor) -> tuple[State, Tensor]:
        """x (B, C, *size)."""
        return (self.network.embed(x),), modulations

    def norm(self, s: int, state: State, context: Tensor) -> State:
        return (modulated_norm(state[0], context[:, 3 * s], context[:, 3 * s + 1], EPS),)

    def inner(self, s: int, seen: State, context: Tensor) -> Branch:
        block = self.blocks[s // 2]
        return (block.mlp(seen[0]) if s % 2 else block.attention(seen[0], self.rope),)

    def traced(self, s: int, seen: State, rank: int, context: Tensor) -> Branch:
        raise PlanError("increments do not work on a flexible network; keep branches instead")

    def corrected(self, s: int, seen: State, kept: Branch, rank: int, context: Tensor) -> Branch:
        raise PlanError("increments do not work on a flexible network; keep branches instead")

    def add(self, s: int, state: State, branch: Branch, context: Tensor) -> State:
        change = branch[0]
        assert change is not None
        return (torch.addcmul(state[0], per_token(context[:, 3 * s + 2]), change),)

    def run(self, first: int, last: int, state: State, context: Tensor) -> State:
        s = first
        while s < last:
            if s % 2 == 0 and s + 1 < last:  # a whole block, as the plain network runs it
                i = s // 2
                state = (self.blocks[i](state[0], context[:, 6 * i : 6 * i + 6], self.rope),)
                s += 2
            else:
                state = self.add(s, state, self.inner(s, self.norm(s, state, context), context), context)
                s += 1
        return state

    def head(self, state: State, context: Tensor) -> Tensor:
        return self.network.read(state[0], context, self.size)
