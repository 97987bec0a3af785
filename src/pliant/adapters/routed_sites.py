"""A DiT seen as sites, with token routers."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.adapters.token_router import SiteRouter
from pliant.compute.sites import Branch, State
from pliant.errors import PlanError
from pliant.models.dit import DiT
from pliant.models.dit_tokens import DiTTokens
from pliant.models.increments import plain_block


class RoutedSites(DiTTokens):
    """The same sites; routers keep their own precision."""

    def __init__(self, network: DiT, routers: nn.ModuleList) -> None:
        super().__init__(network)
        self.routers = routers

    def keep_logits(self, s: int, seen: State, context: Tensor) -> Tensor:
        """(B, N) keep logit minus drop logit."""
        logits = cast(SiteRouter, self.routers[s])(seen[0], context[:, 3 * s + 2])
        return logits[..., 1] - logits[..., 0]

    def among(self, s: int, rows: State, seen: State, context: Tensor) -> Branch:
        """Queries of rows (B, n, D) against the keys and values of seen (B, N, D)."""
        block = plain_block(self.blocks, s)
        if type(block.qkv) is not nn.Linear:
            raise PlanError("routed tokens need attention in fp32 or bf16: 8-bit layers cannot answer queries alone")
        weight, bias = block.qkv.weight, block.qkv.bias
        inner = weight.shape[0] // 3
        q = F.linear(rows[0], weight[:inner], bias[:inner])
        k, v = F.linear(seen[0], weight[inner:], bias[inner:]).chunk(2, dim=-1)
        return self._attended(s, q, k, v)
