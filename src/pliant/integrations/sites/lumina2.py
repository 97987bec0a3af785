"""Lumina2Transformer2DModel: attention and MLP of every joint block, on one stream of text and image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.integrations.sites.base import BlockSites, Inputs, attention_options


class Lumina2Sites(BlockSites):
    """Site 2i is block i's attention with the norm behind it, 2i+1 the same of its MLP.

    The refiners before the joint blocks run in every call: they see other token sequences than the blocks do.
    """

    def __init__(self, transformer: Any) -> None:
        blocks = list(transformer.layers)
        super().__init__(transformer, blocks, [("attention", "mlp")] * len(blocks))

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        net, mask = self.transformer, arguments["encoder_attention_mask"]
        attention_options(arguments["attention_kwargs"])  # this class acts on none of them itself
        temb, text = net.time_caption_embed(x, arguments["timestep"], arguments["encoder_hidden_states"])
        image, text_rope, image_rope, rope, words, ends = net.rope_embedder(x, mask)
        image = net.x_embedder(image)
        for layer in net.context_refiner:
            text = layer(text, mask, text_rope)
        for layer in net.noise_refiner:
            image = layer(image, None, image_rope, temb)
        tokens = image.new_zeros(len(x), max(ends), image.shape[-1])
        here = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        for i, (word, end) in enumerate(zip(words, ends, strict=True)):
            here[i, :end] = True
            tokens[i, :word] = text[i, :word]
            tokens[i, word:end] = image[i]
        rows = {"temb": temb, "rope": rope, "mask": here if len(set(ends)) > 1 else None}
        return (tokens,), Inputs(rows, {"places": tuple(zip(words, ends, strict=True)), "size": x.shape[-2:]})

    def rows(self, context: Inputs, rows: Tensor, total: int) -> Inputs:
        part = super().rows(context, rows, total)
        places = tuple(context.shared["places"][i] for i in rows.tolist())
        return Inputs(part.rows, {**context.shared, "places": places}, part.modulations)

    def modulate(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """scale, gate of the attention, then of the MLP, (B, D) each."""
        norm = self.blocks[block].norm1
        chunks: tuple[Tensor, ...] = norm.linear(norm.silu(context.rows["temb"])).chunk(4, dim=1)
        return chunks

    def norm(self, s: int, state: State, context: Inputs) -> State:
        i, part = divmod(s, 2)
        block, scale = self.blocks[i], self.modulations(i, state, context)[2 * part]
        return ((block.ffn_norm1 if part else block.norm1.norm)(state[0]) * (1 + scale[:, None]),)

    def inner(self, s: int, seen: State, context: Inputs) -> Branch:
        block, x, rows = self.blocks[s // 2], seen[0], context.rows
        if s % 2:
            return (block.ffn_norm2(block.feed_forward(x)),)
        out = block.attn(
            hidden_states=x, encoder_hidden_states=x, attention_mask=rows["mask"], image_rotary_emb=rows["rope"]
        )
        return (block.norm2(out),)

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        gate = self.modulations(s // 2, state, context)[2 * (s % 2) + 1]
        change = branch[0]
        assert change is not None
        return (state[0] + gate[:, None].tanh() * change,)

    def block(self, block: int, state: State, context: Inputs) -> State:
        return (self.blocks[block](state[0], *(context.rows[name] for name in ("mask", "rope", "temb"))),)

    def head(self, state: State, context: Inputs) -> Tensor:
        net, patch = self.transformer, self.transformer.config.patch_size
        height, width = (side // patch for side in context.shared["size"])
        x = net.norm_out(state[0], context.rows["temb"])
        images = [
            row[first:last].view(height, width, patch, patch, net.out_channels)
            for row, (first, last) in zip(x, context.shared["places"], strict=True)
        ]
        out = torch.stack(images).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), net.out_channels, height * patch, width * patch)
