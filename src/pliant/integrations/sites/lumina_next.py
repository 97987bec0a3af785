"""LuminaNextDiT2DModel: attention (to the image and to the text, which share the last layer) and MLP of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.integrations.sites.base import BlockSites, Inputs, attention_options


class LuminaNextSites(BlockSites):
    """Site 2i is both attentions of block i with the norm behind them, 2i+1 the same of its MLP."""

    def __init__(self, transformer: Any) -> None:
        blocks = list(transformer.layers)
        super().__init__(transformer, blocks, [("attention", "mlp")] * len(blocks))

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        net, text, text_mask = self.transformer, arguments["encoder_hidden_states"], arguments["encoder_mask"]
        tokens, mask, sizes, rope = net.patch_embedder(x, arguments["image_rotary_emb"])
        temb = net.time_caption_embed(arguments["timestep"], text, text_mask)
        rows = {"temb": temb, "mask": mask, "text": text, "text_mask": text_mask.bool()}
        options = attention_options(arguments["cross_attention_kwargs"])
        return (tokens,), Inputs(rows, {"rope": rope.to(tokens.device), "size": sizes[0], "attention": options})

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
        rope, options = context.shared["rope"], context.shared["attention"]
        own = block.attn1(
            hidden_states=x, encoder_hidden_states=x, attention_mask=rows["mask"], query_rotary_emb=rope,
            key_rotary_emb=rope, **options,
        )  # fmt: skip
        other = block.attn2(
            hidden_states=x, encoder_hidden_states=block.norm1_context(rows["text"]), attention_mask=rows["text_mask"],
            query_rotary_emb=rope, key_rotary_emb=None, **options,
        )  # fmt: skip
        mixed = own + other * block.gate.tanh().view(1, 1, -1, 1)
        return (block.norm2(block.attn2.to_out[0](mixed.flatten(-2))),)

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        gate = self.modulations(s // 2, state, context)[2 * (s % 2) + 1]
        change = branch[0]
        assert change is not None
        return (state[0] + gate[:, None].tanh() * change,)

    def block(self, block: int, state: State, context: Inputs) -> State:
        rows, shared = context.rows, context.shared
        out = self.blocks[block](
            state[0], rows["mask"], shared["rope"], rows["text"], rows["text_mask"], temb=rows["temb"],
            cross_attention_kwargs=shared["attention"],
        )  # fmt: skip
        return (out,)

    def head(self, state: State, context: Inputs) -> Tensor:
        net, patch = self.transformer, self.transformer.patch_size
        height, width = (side // patch for side in context.shared["size"])
        x = net.norm_out(state[0], context.rows["temb"])
        x = x[:, : height * width].view(len(x), height, width, patch, patch, net.out_channels)
        out: Tensor = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return out
