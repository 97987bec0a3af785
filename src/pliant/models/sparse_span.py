"""Fewer tokens in the middle of the network, on every call: SparseDiT's layout (arXiv 2412.06028; sheet H, section 3).

From the bottom: pooling blocks, whose attention is uniform; groups of

    merge      the token grid averaged to `grid`, x, asks the dense tokens y (cross-attention);
    semantic   ordinary blocks on x;
    recover    `W1 up(x) + W2 y` asks x; W1 = 0 and W2 = 1 at first, so a fresh group leaves y alone but for its gates;
    normal     ordinary blocks on all tokens;

and dense blocks. Every block has the parameters of a DiT's `Block`, so the pre-trained weights load by name; pooling
blocks use the value rows of qkv only. It must be fine-tuned (the paper: 1 M steps) before it is worth sampling from.

`pooled_span` is the form without new weights, for any blocks of any network: a coarser patch at some depths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ConfigError
from pliant.models import kernels
from pliant.models.dit import DiT, DiTConfig
from pliant.models.layers import Block, linear, linear_gelu, modulated_norm, per_token


@dataclass(frozen=True)
class SparseLayout:
    """Which blocks do what. The defaults are SparseDiT-XL at 256 pixels: 28 blocks, 64 of 256 tokens in the middle."""

    pooling: int = 1
    groups: int = 4
    semantic: int = 3
    """Per group."""
    normal: int = 1
    """Per group."""
    dense: int = 3
    grid: tuple[int, int] = (8, 8)
    """Token rows and columns in the sparse part."""

    def __post_init__(self) -> None:
        if min(self.pooling, self.semantic, self.normal, self.dense) < 0 or min(self.groups, *self.grid) < 1:
            raise ConfigError(f"a sparse layout needs at least one group and one token, and no negative counts: {self}")

    @property
    def depth(self) -> int:
        """Blocks in all."""
        return self.pooling + self.groups * (2 + self.semantic + self.normal) + self.dense

    def check(self, config: DiTConfig) -> None:
        """Raises ConfigError for a network of another depth, or with a smaller token grid."""
        if self.depth != config.depth:
            raise ConfigError(f"this sparse layout has {self.depth} blocks, the network {config.depth}")
        if any(few > many for few, many in zip(self.grid, config.grid(), strict=True)):
            raise ConfigError(f"the network has {config.grid()} tokens, fewer than the sparse grid {self.grid}")


class PoolingBlock(Block):
    """A block whose attention is 1/N everywhere: every token receives the projection of the mean value."""

    def attention(self, x: Tensor, get, mask: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        """(B, N, D) -> (B, 1, D). The mean commutes with the linear maps, so they see one token."""
        if mask is not None:
            raise ConfigError("a pooling block cannot mask tokens")
        inner = self.proj.in_features
        values = F.linear(x.mean(1, keepdim=True), self.qkv.weight[2 * inner :], self.qkv.bias[2 * inner :])
        return linear(values, self.proj, get("proj"))


class CrossBlock(Block):
    """A block that looks at other tokens than its own; both are normalised and modulated alike."""

    def look(self, x: Tensor, context: Tensor, modulation: Tensor) -> Tensor:
        """x (B, n, D) asks context (B, N, D); modulation (B, 6, D) -> (B, n, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        inner = self.proj.in_features
        asking, seen = (modulated_norm(v, shift1, scale1, 1e-6) for v in (x, context))
        q = F.linear(asking, self.qkv.weight[:inner], self.qkv.bias[:inner])
        k, v = F.linear(seen, self.qkv.weight[inner:], self.qkv.bias[inner:]).chunk(2, dim=-1)
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v)]
        out = kernels.attention(*heads).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, per_token(gate1), linear(out, self.proj, None))
        h = linear_gelu(modulated_norm(x, shift2, scale2, self.norm2_eps), self.fc1, None)
        return torch.addcmul(x, per_token(gate2), linear(h, self.fc2, None))


class RecoverBlock(CrossBlock):
    """Back to all tokens: `W1 up(x) + W2 y` looks at x."""

    spread: nn.Linear
    keep: nn.Linear

    def add_linears(self) -> None:
        """W1 = 0, W2 = 1: the group starts from the dense tokens as they were."""
        width = self.fc1.in_features
        self.spread, self.keep = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.spread.to(self.fc1.weight)
        self.keep.to(self.fc1.weight)
        nn.init.zeros_(self.spread.weight)
        nn.init.eye_(self.keep.weight)

    def recover(self, x: Tensor, y: Tensor, modulation: Tensor, few: tuple[int, int], many: tuple[int, int]) -> Tensor:
        """Sparse x (B, n, D) on the grid `few` and dense y (B, N, D) on `many` -> (B, N, D)."""
        # Nearest repetition commutes with W1, which then sees n tokens instead of N.
        z = regridded(self.spread(x), few, many) + self.keep(y)
        return self.look(z, x, modulation)


class SparseDiT(nn.Module):
    """A DiT with a sparse layout, from a trained DiT's weights (a copy; the given network is left alone).

    `forward` as `DiT.forward`. Raises ConfigError where the layout does not fit.
    """

    def __init__(self, dit: DiT, layout: SparseLayout) -> None:
        super().__init__()
        layout.check(dit.config)
        self.layout = layout
        self.base = copy.deepcopy(dit)
        roles = block_roles(layout)
        for block, role in zip(self.base.blocks, roles, strict=True):
            # The parameters stay what they are; only what is done with them changes.
            if role == "pooling":
                block.__class__ = PoolingBlock
            elif role == "merge":
                block.__class__ = CrossBlock
            elif role == "recover":
                block.__class__ = RecoverBlock
                cast(RecoverBlock, block).add_linears()

    @property
    def config(self) -> DiTConfig:
        return self.base.config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows = self.base.modulations(t, y)
        tokens = self.run_blocks(self.base.embed(x), rows)
        return self.base.read(tokens, rows)

    def run_blocks(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """(B, N, D) and modulations (B, 6*depth + 2, D) -> (B, N, D)."""
        few, many = self.layout.grid, self.config.grid()
        sparse: Tensor | None = None
        for i, (block, role) in enumerate(zip(self.base.blocks, block_roles(self.layout), strict=True)):
            modulation = rows[:, 6 * i : 6 * i + 6]
            if role == "merge":
                sparse = cast(CrossBlock, block).look(pooled(tokens, many, few), tokens, modulation)
            elif role == "recover" and sparse is not None:
                tokens, sparse = cast(RecoverBlock, block).recover(sparse, tokens, modulation, few, many), None
            elif sparse is not None:
                sparse = block(sparse, modulation)
            else:
                tokens = block(tokens, modulation)
        return tokens


def pooled_span(
    blocks: Callable[[Tensor], Tensor], tokens: Tensor, many: tuple[int, int], few: tuple[int, int]
) -> Tensor:
    """Blocks run on averaged tokens, and what they change is repeated: `y + up(blocks(x) - x)`, x = averaged y.

    tokens: (B, N, D) on the grid `many`; blocks: (B, n, D) -> (B, n, D) on `few`. Detail within a coarse token passes
    by untouched, as the missing band does in weak steps. With few == many it is `blocks(tokens)` itself.
    """
    if few == many:
        return blocks(tokens)
    x = pooled(tokens, many, few)
    return tokens + regridded(blocks(x) - x, few, many)


def block_roles(layout: SparseLayout) -> list[str]:
    """What each block does, from the bottom: "pooling", "merge", "semantic", "recover", "normal", "dense"."""
    group = ["merge", *["semantic"] * layout.semantic, "recover", *["normal"] * layout.normal]
    return ["pooling"] * layout.pooling + group * layout.groups + ["dense"] * layout.dense


def pooled(tokens: Tensor, many: tuple[int, int], few: tuple[int, int]) -> Tensor:
    """(B, N, D) on the grid `many`, averaged to (B, n, D) on `few`."""
    image = tokens.transpose(1, 2).unflatten(2, many)
    return F.adaptive_avg_pool2d(image, few).flatten(2).transpose(1, 2)


def regridded(tokens: Tensor, few: tuple[int, int], many: tuple[int, int]) -> Tensor:
    """(B, n, D) on the grid `few`, repeated (nearest) to (B, N, D) on `many`."""
    image = tokens.transpose(1, 2).unflatten(2, few)
    return F.interpolate(image, size=many, mode="nearest").flatten(2).transpose(1, 2)


def sparse_block_macs(config: DiTConfig, layout: SparseLayout) -> int:
    """Multiply-adds of all blocks' token work for one image (`CostParts`' blocks), whole products of two matrices."""
    d, hidden = config.width, int(config.width * config.mlp_ratio)
    n, few = (rows * columns for rows, columns in (config.grid(), layout.grid))

    def work(asking: int, seen: int) -> int:
        """q and projection on the asking tokens, k and v on those seen, attention, MLP."""
        return 2 * d * d * (asking + seen) + 2 * d * asking * seen + 2 * d * hidden * asking

    cost = {
        "pooling": 2 * d * d + 2 * d * hidden * n,
        "merge": work(few, n),
        "semantic": work(few, few),
        "recover": work(n, few) + d * d * (n + few),
        "normal": work(n, n),
        "dense": work(n, n),
    }
    return sum(cost[role] for role in block_roles(layout))
