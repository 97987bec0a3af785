"""A DiT whose attention can be asked by some of its tokens."""

from __future__ import annotations

from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.compute.subset import put_tokens
from pliant.models import kernels
from pliant.models.dit_sites import DiTSites
from pliant.models.increments import plain_block
from pliant.models.layers import linear, modulated_norm
from pliant.models.patches import unpatchify


class DiTTokens(DiTSites):
    """The same sites, with keys and values that can be kept (sheet E, section 1)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.network.config.grid()

    def keyed(self, s: int, seen: State, context: Tensor) -> tuple[Branch, Branch]:
        """The branch (B, N, D) of attention site s, and the keys and values (B, N, heads * side)."""
        qkv = self._projected(s, seen[0])
        q, k, v = qkv.chunk(3, dim=-1)
        # Copies: views would keep the queries alive too.
        return self._attended(s, q, k, v), (k.contiguous(), v.contiguous())

    def attend(self, s: int, seen: State, kept: Branch, active: Tensor, context: Tensor) -> tuple[Branch, Branch]:
        """seen (B, n, D), kept keys and values of all N tokens, active (B, n)."""
        q, k, v = self._projected(s, seen[0]).chunk(3, dim=-1)
        old_k, old_v = kept
        assert old_k is not None and old_v is not None
        k, v = put_tokens(old_k, k, active), put_tokens(old_v, v, active)
        return self._attended(s, q, k, v), (k, v)

    def head_rows(self, state: State, active: Tensor, context: Tensor) -> Tensor:
        """state (B, n, D) -> (B, out_channels, H, W), zero on the pixels of tokens that are not active."""
        network, config = self.network, self.network.config
        rows = network.head(modulated_norm(state[0], context[:, -2], context[:, -1], 1e-6))
        columns, lines = config.grid()
        whole = rows.new_zeros(len(rows), columns * lines, rows.shape[-1])
        return unpatchify(put_tokens(whole, rows, active), config.grid(), config.patch_size)

    def _projected(self, s: int, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, (B, rows, 3 * heads * side), of x (B, rows, D)."""
        return linear(x, plain_block(self.blocks, s).qkv, None)

    def _attended(self, s: int, q: Tensor, k: Tensor, v: Tensor) -> Branch:
        """Queries (B, n, heads * side) of some tokens against keys and values (B, N, heads * side)."""
        block = plain_block(self.blocks, s)
        # What was kept may be of another precision than this call's.
        heads = (part.to(q.dtype).unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = kernels.attention(*heads)
        return (linear(out.transpose(1, 2).flatten(2), block.proj, None),)
