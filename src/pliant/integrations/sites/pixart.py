"""PixArtTransformer2DModel: attention, cross-attention and MLP of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.integrations.sites.base import BlockSites, Inputs, attention_options, unpatched


class PixArtSites(BlockSites):
    """Sites 3i, 3i+1, 3i+2: block i's attention, cross-attention (no norm, no gate) and MLP."""

    def __init__(self, transformer: Any) -> None:
        blocks = list(transformer.transformer_blocks)
        super().__init__(transformer, blocks, [("attention", "cross", "mlp")] * len(blocks))

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        net, patch = self.transformer, self.transformer.config.patch_size
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        masks = (_bias(arguments[name], x) for name in ("attention_mask", "encoder_attention_mask"))
        added, text = arguments["added_cond_kwargs"], arguments["encoder_hidden_states"]
        tokens = net.pos_embed(x)
        timestep, embedded = net.adaln_single(
            arguments["timestep"], added, batch_size=len(x), hidden_dtype=tokens.dtype
        )
        if net.caption_projection is not None:
            text = net.caption_projection(text).view(len(x), -1, tokens.shape[-1])
        names = ("timestep", "embedded", "text", "mask", "text_mask")
        rows = dict(zip(names, (timestep, embedded, text, *masks), strict=True))
        return (tokens,), Inputs(
            rows, {"grid": grid, "attention": attention_options(arguments["cross_attention_kwargs"])}
        )

    def modulate(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """shift, scale, gate of the attention, then of the MLP, (B, 1, D) each."""
        table = self.blocks[block].scale_shift_table[None]
        chunks: tuple[Tensor, ...] = (table + context.rows["timestep"].reshape(len(state[0]), 6, -1)).chunk(6, dim=1)
        return chunks

    def norm(self, s: int, state: State, context: Inputs) -> State:
        i, part = divmod(s, 3)
        if part == 1:
            return state
        at = 3 if part else 0
        shift, scale = self.modulations(i, state, context)[at : at + 2]
        block = self.blocks[i]
        return ((block.norm2 if part else block.norm1)(state[0]) * (1 + scale) + shift,)

    def inner(self, s: int, seen: State, context: Inputs) -> Branch:
        i, part = divmod(s, 3)
        block, rows, options = self.blocks[i], context.rows, context.shared["attention"]
        if part == 0:
            return (block.attn1(seen[0], attention_mask=rows["mask"], **options),)
        if part == 1:
            text = {"encoder_hidden_states": rows["text"], "attention_mask": rows["text_mask"]}
            return (block.attn2(seen[0], **text, **options),)
        return (block.ff(seen[0]),)

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        i, part = divmod(s, 3)
        change = branch[0]
        assert change is not None
        if part == 1:
            return (change + state[0],)
        return (self.modulations(i, state, context)[5 if part else 2] * change + state[0],)

    def block(self, block: int, state: State, context: Inputs) -> State:
        rows = context.rows
        out = self.blocks[block](
            state[0], attention_mask=rows["mask"], encoder_hidden_states=rows["text"],
            encoder_attention_mask=rows["text_mask"], timestep=rows["timestep"],
            cross_attention_kwargs=context.shared["attention"] or None,
        )  # fmt: skip
        return (out,)

    def head(self, state: State, context: Inputs) -> Tensor:
        net = self.transformer
        shift, scale = (net.scale_shift_table[None] + context.rows["embedded"][:, None]).chunk(2, dim=1)
        x = net.proj_out(net.norm_out(state[0]) * (1 + scale) + shift)
        return unpatched(x, context.shared["grid"], net.config.patch_size, net.out_channels)


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, L) of ones to keep and zeros to drop -> (B, 1, L) added to attention scores; others are biases already."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(like.dtype)) * -10000.0)[:, None]
