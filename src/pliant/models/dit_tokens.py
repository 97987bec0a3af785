"""A DiT whose attention can be asked by some of its tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.compute.subset import put_tokens
from pliant.models.dit_sites import DiTSites
from pliant.models.layers import linear, modulated_norm
from pliant.models.patches import unpatchify


class DiTTokens(DiTSites):
    """The same sites, with keys and values that can be kept (sheet E, section 1)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.network.config.grid()

    def keyed(self, s: int, seen: State, context: Tensor) -> tuple[Branch, Branch]:
        """The branch (B, N, D) of attention site s, and the keys and values (B, heads, N, D / heads)."""
        q, k, v = self._heads(s, seen[0])
        # Copies: views would keep the queries alive too.
        return self._attended(s, q, k, v), (k.contiguous(), v.contiguous())

    def attend(self, s: int, seen: State, kept: Branch, active: Tensor, context: Tensor) -> tuple[Branch, Branch]:
        """seen (B, n, D), kept keys and values of all N tokens, active (B, n)."""
        q, k, v = self._heads(s, seen[0])
        old_k, old_v = kept
        assert old_k is not None and old_v is not None
        place = active[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        k, v = old_k.scatter(2, place, k.to(old_k.dtype)), old_v.scatter(2, place, v.to(old_v.dtype))
        return self._attended(s, q, k, v), (k, v)

    def head_rows(self, state: State, active: Tensor, context: Tensor) -> Tensor:
        """state (B, n, D) -> (B, out_channels, H, W), zero on the pixels of tokens that are not active."""
        network, config = self.network, self.network.config
        rows = network.head(modulated_norm(state[0], context[:, -2], context[:, -1], 1e-6))
        columns, lines = config.grid()
        whole = rows.new_zeros(len(rows), columns * lines, rows.shape[-1])
        return unpatchify(put_tokens(whole, rows, active), config.grid(), config.patch_size)

    def _heads(self, s: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, rows, D / heads) of x (B, rows, D)."""
        block = self._plain_block(s)
        q, k, v = linear(x, block.qkv, None).view(*x.shape[:2], 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _attended(self, s: int, q: Tensor, k: Tensor, v: Tensor) -> Branch:
        # What was kept may be of another precision than this call's.
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        return (linear(out.transpose(1, 2).reshape(len(q), q.shape[2], -1), self._plain_block(s).proj, None),)
