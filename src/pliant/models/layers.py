"""Building blocks of diffusion transformers: embedders, adaLN modulation, the block. Sheet A, section 3.1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ShapeError
from pliant.models import kernels


def timestep_features(t: Tensor, width: int = 256, divisor: int | None = None) -> Tensor:
    """(B,) network times -> (B, width) `[cos(t f_k), sin(t f_k)]`, `f_k = 10000^(-k/divisor)`, fp32 or wider.

    `divisor` is width/2 in the official code and width/2 - 1 in diffusers; both kinds of checkpoints exist.
    """
    half = width // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    # Multiply, then divide, as both do: at t = 1000 another rounding of a frequency is a visible change of the output.
    exponents = -math.log(10000.0) * torch.arange(half, device=t.device, dtype=t.dtype) / (divisor or half)
    frequencies = torch.exp(exponents)
    angles = t[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Network time -> vector: sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width: int, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor
        self.fc1 = nn.Linear(256, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        features = timestep_features(t, 256, self.divisor).to(self.fc1.weight.dtype)
        hidden: Tensor = self.fc2(F.silu(self.fc1(features)))
        return hidden


def embed_times(t: Tensor, time: TimestepEmbedder, jump: TimestepEmbedder | None) -> Tensor:
    """(B,) network times, or with `jump` pairs (B, 2), where a state is and where its step lands -> (B, D).

    Raises ShapeError for the other kind.
    """
    if t.ndim != (1 if jump is None else 2):
        told = "one time" if jump is None else "two times, where it is and where it lands"
        raise ShapeError(f"this network is told {told} per sample; got times of shape {tuple(t.shape)}")
    if jump is None:
        alone: Tensor = time(t)
        return alone
    # The length of the jump, not its end: one number whose zero means the plain velocity at every time.
    both: Tensor = time(t[:, 0]) + jump(t[:, 0] - t[:, 1])
    return both


def reset_jump(jump: TimestepEmbedder) -> None:
    """Start of a flow map's second embedder: N(0, 0.02), then zeros, so that lengths change nothing at first."""
    nn.init.normal_(jump.fc1.weight, std=0.02)
    for tensor in (jump.fc1.bias, jump.fc2.weight, jump.fc2.bias):
        nn.init.zeros_(tensor)


class LowRank(nn.Module):
    """A LoRA delta of one linear: `y += (alpha/rank) * up(down(x))` (arXiv 2106.09685). Zero at initialisation."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, d_in))
        self.up = nn.Parameter(torch.zeros(d_out, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up * self.scale)

    def delta(self) -> Tensor:
        """(d_out, d_in) weight change, for merging."""
        return self.scale * (self.up @ self.down)


Delta: TypeAlias = Callable[[Tensor], Tensor]
"""What is added to a linear's output, as a function of its input: a `LowRank`, or one that acts on some tokens only."""


class OwnLinear(nn.Module):
    """A linear map with its own arithmetic (8-bit, mixed precision); may stand wherever a block has an `nn.Linear`."""

    def gelu(self, x: Tensor) -> Tensor:
        """tanh-GELU of `self(x)`; to be overridden where one kernel does both."""
        return F.gelu(self(x), approximate="tanh")


def linear(x: Tensor, layer: nn.Module, lora: Delta | None) -> Tensor:
    """`layer(x)`, plus the low-rank delta if there is one. A plain `nn.Linear` runs on our fused kernels."""
    y: Tensor = kernels.linear(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(x)
    return y if lora is None else y + lora(x)


def linear_gelu(x: Tensor, layer: nn.Module, lora: Delta | None) -> Tensor:
    """tanh-GELU of `linear(x, layer, lora)`."""
    if lora is None:
        if type(layer) is nn.Linear:
            return kernels.linear_gelu(x, layer.weight, layer.bias)
        if isinstance(layer, OwnLinear):
            return layer.gelu(x)
    return kernels.gelu(linear(x, layer, lora))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`LN(x) * scale + shift`, x (B, N, D). `scale` already includes the 1.

    shift and scale: one for all (1, D), one per sample (B, D), or one per token (B, N, D).
    """
    if shift.ndim == 2 and shift.shape[0] == 1:  # the normalisation kernel applies them in the same pass
        return F.layer_norm(x, x.shape[-1:], scale[0], shift[0], eps)
    return torch.addcmul(per_token(shift), F.layer_norm(x, x.shape[-1:], eps=eps), per_token(scale))


def per_token(vector: Tensor) -> Tensor:
    """(B, D) -> (B, 1, D), which every token of a sample shares; (B, N, D) is per token already."""
    return vector[:, None] if vector.ndim == 2 else vector


class Block(nn.Module):
    """Self-attention and MLP, each normalised, modulated and gated by the conditioning (adaLN-zero).

    The modulation comes in from outside: it depends on time and label only, so a sampler computes it for many steps
    at once instead of once per block per step.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        norm2_eps: float,
        kept_heads: int | None = None,
        hidden: int | None = None,
    ) -> None:
        """`kept_heads` of the `heads` and `hidden` features of the MLP, where some are cut away; None: all."""
        super().__init__()
        hidden = int(width * mlp_ratio) if hidden is None else hidden
        inner = width if kept_heads is None else width // heads * kept_heads
        heads = heads if kept_heads is None else kept_heads
        self.heads = heads
        self.norm2_eps = norm2_eps
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, modulation: Tensor, loras: Mapping[str, Delta] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, D); modulation (B, 6, D): shift, 1+scale, gate of attention, then of the MLP -> (B, N, D).

        Packed sequences modulate every token on its own: modulation (B, 6, N, D). `loras`: deltas by layer name
        ("qkv", "proj", "fc1", "fc2"); `mask`: (B or 1, 1, N, N), True = attend.
        """
        get = loras.__getitem__ if loras else lambda _: None
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        h = self.attention(modulated_norm(x, shift1, scale1, 1e-6), get, mask)
        x = torch.addcmul(x, per_token(gate1), h)
        h = linear_gelu(modulated_norm(x, shift2, scale2, self.norm2_eps), self.fc1, get("fc1"))
        return torch.addcmul(x, per_token(gate2), linear(h, self.fc2, get("fc2")))

    def attention(self, x: Tensor, get, mask: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        """Multi-head self-attention of (B, N, D), fused qkv, no masking unless a mask is given."""
        b, n, _ = x.shape
        q, k, v = linear(x, self.qkv, get("qkv")).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = kernels.attention(q, k, v, mask)
        return linear(out.transpose(1, 2).reshape(b, n, -1), self.proj, get("proj"))
