"""Routed width, executed: heads and hidden features that are off are cut out, tokens that skip are not computed.

The routers of heads and groups read only the time, so for known times each distinct mask becomes a network of its own,
with fewer features per block and nothing to decide. Token routers read the tokens; they stay, and the MLP runs on the
tokens that they pick (gather, MLP, scatter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.adapters.width import DynamicDiT, TokenRouter, router_hidden
from pliant.compute import MATMUL, Convention, TransformerShape, macs
from pliant.errors import ConfigError
from pliant.models.dit import DiT, DiTConfig
from pliant.models.layers import Block, Delta, linear, linear_gelu, modulated_norm, per_token

Kept: TypeAlias = tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
"""Heads and groups that are on, block by block."""


class SkippingBlock(Block):
    """A block whose MLP sees only the tokens that its router picks."""

    def __init__(self, config: DiTConfig, kept_heads: int, hidden: int) -> None:
        super().__init__(config.width, config.heads, config.mlp_ratio, config.norm2_eps, kept_heads, hidden)
        self.router = TokenRouter(config.width)

    def forward(
        self, x: Tensor, modulation: Tensor, loras: Mapping[str, Delta] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """As `Block.forward`. Raises ConfigError for packed sequences, which have no one modulation per sample."""
        if loras or modulation.ndim != 3:
            raise ConfigError("blocks that skip tokens run neither adapters nor packed sequences")
        b, n, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        h = self.attention(modulated_norm(x, shift1, scale1, 1e-6), lambda _: None, mask)
        x = torch.addcmul(x, per_token(gate1), h)
        rows = (self.router(x) > 0).flatten().nonzero().squeeze(1)
        if len(rows) == b * n:  # nothing skips: bit-equal to a block without a router
            h = linear_gelu(modulated_norm(x, shift2, scale2, self.norm2_eps), self.fc1, None)
            return torch.addcmul(x, per_token(gate2), linear(h, self.fc2, None))
        flat = x.reshape(b * n, width)
        picked = flat[rows]
        # One modulation for all, or each token's own sample's. Samples keep different numbers of tokens: no padding.
        shift, scale, gate = (v if len(v) == 1 else v[rows // n] for v in (shift2, scale2, gate2))
        h = torch.addcmul(shift, F.layer_norm(picked, (width,), eps=self.norm2_eps), scale)
        h = linear(linear_gelu(h, self.fc1, None), self.fc2, None)
        return flat.index_copy(0, rows, torch.addcmul(picked, gate, h)).view(b, n, width)


class SkippingDiT(DiT):
    """A DiT (possibly cut) whose blocks have token routers. Build with `slice_network` or `width_variants`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([SkippingBlock(config, *widths) for widths in config.block_widths])


def slice_network(
    dit: DiT,
    heads: Sequence[Sequence[int]],
    hidden: Sequence[Sequence[int]],
    groups: int,
    token_routers: Sequence[TokenRouter] = (),
) -> DiT:
    """A network that has, in block i, only the heads `heads[i]` and of `groups` equal groups of hidden features
    only `hidden[i]`. It shares all weights that are not cut; with nothing to cut (and no routers) it is `dit` itself.

    Raises ConfigError for a head or group that a block does not have, or a block with none left.
    """
    config = dit.config
    kept_heads = [_chosen(keep, block.heads, "head", i) for i, (keep, block) in enumerate(_pairs(heads, dit))]
    kept_groups = [_chosen(keep, groups, "group", i) for i, (keep, _) in enumerate(_pairs(hidden, dit))]
    whole = all(len(keep) == block.heads for keep, block in _pairs(kept_heads, dit))
    whole = whole and all(len(keep) == groups for keep in kept_groups)
    if whole and not token_routers:
        return dit
    state = dict(dit.state_dict())
    block_heads, block_hidden = [], []
    for i, (keep, block) in enumerate(_pairs(kept_heads, dit)):
        block_heads.append(len(keep))
        total = block.fc1.out_features
        if total % groups:
            raise ConfigError(f"the {total} hidden features of block {i} do not divide into {groups} groups")
        block_hidden.append(total // groups * len(kept_groups[i]))
        if len(keep) < block.heads:
            _cut_heads(state, f"blocks.{i}.", keep, block.heads)
        if len(kept_groups[i]) < groups:
            _cut_groups(state, f"blocks.{i}.", kept_groups[i], groups)
    for i, router in enumerate(token_routers):
        state |= {f"blocks.{i}.router.{name}": tensor for name, tensor in router.state_dict().items()}
    if not whole:
        config = replace(config, block_heads=tuple(block_heads), block_hidden=tuple(block_hidden))
    return _filled(SkippingDiT if token_routers else DiT, config, state, dit.positions)


def _pairs(lists: Sequence[Sequence[int]], dit: DiT) -> list[tuple[Sequence[int], Block]]:
    if len(lists) != len(dit.blocks):
        raise ConfigError(f"slicing needs one list per block: the network has {len(dit.blocks)}, got {len(lists)}")
    return [(keep, cast(Block, block)) for keep, block in zip(lists, dit.blocks, strict=True)]


def _chosen(keep: Sequence[int], total: int, what: str, block: int) -> list[int]:
    chosen = sorted(set(keep))
    if not chosen or chosen[0] < 0 or chosen[-1] >= total or len(chosen) != len(keep):
        raise ConfigError(f"block {block} has {what}s 0 to {total - 1} and needs at least one, got {list(keep)}")
    return chosen


def _cut_heads(state: dict[str, Tensor], block: str, keep: Sequence[int], heads: int) -> None:
    """Rows of q, k and v and columns of the output projection that belong to other heads go."""
    weight = state[f"{block}qkv.weight"]
    state[f"{block}qkv.weight"] = weight.view(3, heads, -1, weight.shape[1])[:, list(keep)].reshape(-1, weight.shape[1])
    state[f"{block}qkv.bias"] = state[f"{block}qkv.bias"].view(3, heads, -1)[:, list(keep)].flatten()
    weight = state[f"{block}proj.weight"]
    state[f"{block}proj.weight"] = weight.view(len(weight), heads, -1)[:, list(keep)].flatten(1)


def _cut_groups(state: dict[str, Tensor], block: str, keep: Sequence[int], groups: int) -> None:
    weight = state[f"{block}fc1.weight"]
    state[f"{block}fc1.weight"] = weight.view(groups, -1, weight.shape[1])[list(keep)].flatten(0, 1)
    state[f"{block}fc1.bias"] = state[f"{block}fc1.bias"].view(groups, -1)[list(keep)].flatten()
    weight = state[f"{block}fc2.weight"]
    state[f"{block}fc2.weight"] = weight.view(len(weight), groups, -1)[:, list(keep)].flatten(1)


def _filled(kind: type[DiT], config: DiTConfig, state: dict[str, Tensor], positions: Tensor) -> DiT:
    with torch.device("meta"):
        network = kind(config)
    network.load_state_dict(state, assign=True)
    network.positions = positions
    return network.requires_grad_(False).eval()


@torch.no_grad()
def width_masks(network: DynamicDiT, times: Tensor) -> list[Kept]:
    """Heads and groups that are on at each of the network times (T,)."""
    heads, groups = network.time_masks(times.to(network.base.head.weight.device))
    return [(_indices(h), _indices(g)) for h, g in zip(heads.bool().tolist(), groups.bool().tolist(), strict=True)]


def _indices(blocks: list[list[bool]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(i for i, on in enumerate(block) if on) for block in blocks)


@torch.no_grad()
def width_variants(network: DynamicDiT, times: Tensor, cache: dict[Kept, DiT] | None = None) -> list[DiT]:
    """For each of the network times (T,) the network that the routers leave, cut out for real.

    Times with equal masks get the same object; give `cache` to share variants between calls. They run
    `forward_modulated` with the modulations of `network.base`, and share with it whatever they do not cut.
    """
    made = {} if cache is None else cache
    routers = cast(Sequence[TokenRouter], network.routers.tokens)
    for kept in (masks := width_masks(network, times)):
        if kept not in made:
            made[kept] = slice_network(network.base, *kept, network.groups, routers)
    return [made[kept] for kept in masks]


def width_macs(
    network: DiT, tokens: Sequence[float] | None = None, convention: Convention = MATMUL
) -> int:
    """Multiply-adds of one image's call of a sliced network, its token routers included.

    tokens: share of the tokens that go through each block's MLP (`token_shares`); None: all of them.
    """
    config = network.config
    rows, columns = config.grid()
    n, width = rows * columns, config.width
    total = macs(
        TransformerShape(
            depth=config.depth,
            width=width,
            heads=config.heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            patch=config.patch_size,
            tokens=n,
            mlp_ratio=config.mlp_ratio,
            classes=config.label_rows,
            block_heads=config.block_heads,
            block_hidden=config.block_hidden,
        ),
        convention,
    )
    if not isinstance(network, SkippingDiT):
        return total
    skipped = 0.0
    for share, (_, hidden) in zip(tokens or (1.0,) * config.depth, config.block_widths, strict=True):
        skipped += (1.0 - share) * n * 2 * width * hidden
    return total + config.depth * n * (width + 1) * router_hidden(width) - round(skipped)
