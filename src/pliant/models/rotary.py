"""The block of FiTv2 (arXiv 2410.13925; sheet B, section 1): adaLN, attention with rotary positions and normalised
queries and keys, SwiGLU. Tokens come as sequences of one length, or as several lengths side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.models import kernels
from pliant.models.layers import linear, modulated_norm, per_token
from pliant.models.network import Size
from pliant.models.rope import apply_rope

Rope: TypeAlias = tuple[Tensor, Tensor]
"""(cos, sin) of the tokens of one sequence, (N, head width / 2) each; (B, 1, N, head width / 2): of every sequence."""
EPS = 1e-6


class RotaryBlock(nn.Module):
    """Self-attention and gated MLP, each normalised, modulated and gated by the conditioning. No dropout."""

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool = True) -> None:
        """hidden: features between the MLP's first linears and the last; qk_norm: queries and keys are normalised."""
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1_gate = nn.Linear(width, hidden)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D); modulation (B or 1, 6, D): shift, 1+scale, gate of attention, then of the MLP -> (B, N, D).

        Rows of several images modulate every token on its own: modulation (B, 6, N, D). `mask`: (B, 1, N, N), True =
        attend.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        x = torch.addcmul(x, per_token(gate1), self.attention(modulated_norm(x, shift1, scale1, EPS), rope, mask))
        return torch.addcmul(x, per_token(gate2), self.mlp(modulated_norm(x, shift2, scale2, EPS)))

    def attention(self, x: Tensor, rope: Rope, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D): every token attends to all of its sequence, or to those of the mask."""
        return linear(self.attend(linear(x, self.qkv, None), rope, mask), self.proj, None)

    def attend(self, qkv: Tensor, rope: Rope, mask: Tensor | None = None) -> Tensor:
        """Queries, keys and values (B, N, 3D) -> (B, N, D), before the output projection."""
        b, n, _ = qkv.shape
        q, k, v = qkv.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = (F.layer_norm(u, u.shape[-1:], eps=EPS) for u in (q, k))
        out = kernels.attention(apply_rope(q, *rope), apply_rope(k, *rope), v, mask)
        return out.transpose(1, 2).reshape(b, n, -1)

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU on (..., D)."""
        if type(self.fc1) is nn.Linear and type(self.fc1_gate) is nn.Linear:
            hidden = kernels.linear_silu_gate(x, self.fc1_gate, self.fc1)
        else:
            hidden = F.silu(linear(x, self.fc1_gate, None)) * linear(x, self.fc1, None)
        return linear(hidden, self.fc2, None)

    def packed(self, xs: Sequence[Tensor], modulations: Sequence[Tensor], ropes: Sequence[Rope]) -> list[Tensor]:
        """Sequences of several lengths: xs[g] (B_g, N_g, D), modulations[g] (B_g, 6, D), ropes[g] -> like xs.

        One product per linear over all tokens; attention length by length, with nothing padded.
        """
        seen = _flat([modulated_norm(x, m[:, 0], m[:, 1], EPS) for x, m in zip(xs, modulations, strict=True)])
        qkv = _like(linear(seen, self.qkv, None), xs)
        heads = [self.attend(part, rope) for part, rope in zip(qkv, ropes, strict=True)]
        xs = _gated(xs, modulations, 2, linear(_flat(heads), self.proj, None))
        seen = _flat([modulated_norm(x, m[:, 3], m[:, 4], EPS) for x, m in zip(xs, modulations, strict=True)])
        return _gated(xs, modulations, 5, self.mlp(seen))


def _flat(xs: Sequence[Tensor]) -> Tensor:
    """(B_g, N_g, D) ... -> (all tokens, D)."""
    return xs[0].flatten(0, 1) if len(xs) == 1 else torch.cat([x.flatten(0, 1) for x in xs])


def _like(flat: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """(all tokens, F) cut as xs are."""
    parts = flat.split([x.shape[0] * x.shape[1] for x in xs])
    return [part.view(*x.shape[:2], -1) for part, x in zip(parts, xs, strict=True)]


def _gated(xs: Sequence[Tensor], modulations: Sequence[Tensor], row: int, change: Tensor) -> list[Tensor]:
    parts = zip(xs, modulations, _like(change, xs), strict=True)
    return [torch.addcmul(x, m[:, row, None], part) for x, m, part in parts]


class RotaryNetwork(Protocol):
    """What a network made of rotary blocks shows of itself to whoever runs it block by block."""

    blocks: nn.ModuleList
    patch: Size
    extrapolation: str

    @property
    def device(self) -> torch.device: ...

    def rope(self, size: Size, patch: Size, extrapolation: str, device: torch.device) -> Rope:
        """Of the tokens of a state of this size."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> the blocks' input (B, N, D)."""
        ...

    def read(self, tokens: Tensor, modulations: Tensor, size: Size) -> Tensor:
        """The blocks' output (B, N, D) and (B, 6*depth + 2, D) -> (B, C_out, *size)."""
        ...


class LowRankModulation(nn.Module):
    """adaLN-LoRA: `W2_i W1_i silu(c) + G silu(c)` for every block i, G shared; and the head's own shift and scale.

    All factors of one kind are one matrix, because all blocks read the same conditioning. Zero at initialisation but
    for the factors W1.
    """

    def __init__(self, depth: int, width: int, rank: int) -> None:
        super().__init__()
        self.depth, self.width, self.rank = depth, width, rank
        self.shared = nn.Linear(width, 6 * width)
        self.down = nn.Linear(width, depth * rank)
        self.up_weight = nn.Parameter(torch.zeros(depth, rank, 6 * width))
        self.up_bias = nn.Parameter(torch.zeros(depth, 6 * width))
        self.head = nn.Linear(width, 2 * width)

    def forward(self, c: Tensor) -> Tensor:
        """Conditioning (B, D) -> rows (B, 6*depth + 2, D): 6 of every block, then shift and scale of the head."""
        active = F.silu(c)
        low = self.down(active).view(len(c), self.depth, self.rank).transpose(0, 1)  # (L, B, r)
        own = torch.baddbmm(self.up_bias[:, None], low, self.up_weight).transpose(0, 1)  # (B, L, 6D)
        blocks = (own + self.shared(active)[:, None]).reshape(len(c), 6 * self.depth, self.width)
        return torch.cat([blocks, self.head(active).view(len(c), 2, self.width)], dim=1)

    def reset_parameters(self) -> None:
        """Everything that reaches the network is zero; the factors W1 are Xavier."""
        for factor in self.down.weight.data.view(self.depth, self.rank, self.width):
            nn.init.xavier_uniform_(factor)
        for layer in (self.shared, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for parameter in (self.down.bias, self.up_weight, self.up_bias):
            nn.init.zeros_(parameter)
