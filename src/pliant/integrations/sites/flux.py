"""FluxTransformer2DModel: two sites in every double block, one in every single block, on two streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.integrations.sites.base import BlockSites, Inputs, attention_options, modulated


class FluxSites(BlockSites):
    """Double blocks: joint attention and the MLPs. Single blocks, where attention and MLP share the last layer: one
    site of kind "block". The streams are (image, text).
    """

    unsupported = ("controlnet_block_samples", "controlnet_single_block_samples")

    def __init__(self, transformer: Any) -> None:
        double, single = list(transformer.transformer_blocks), list(transformer.single_transformer_blocks)
        self.doubles = len(double)
        kinds: list[tuple[str, ...]] = [("attention", "mlp")] * len(double) + [("block",)] * len(single)
        super().__init__(transformer, double + single, kinds)

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        net, guidance = self.transformer, arguments["guidance"]
        tokens = net.x_embedder(x)
        numbers = [arguments["timestep"]] + ([] if guidance is None else [guidance])
        temb = net.time_text_embed(*(n.to(tokens.dtype) * 1000 for n in numbers), arguments["pooled_projections"])
        text = net.context_embedder(arguments["encoder_hidden_states"])
        ids = [i[0] if i.ndim == 3 else i for i in (arguments["txt_ids"], arguments["img_ids"])]
        rope = net.pos_embed(torch.cat(ids, dim=0))
        options = attention_options(arguments["joint_attention_kwargs"])
        return (tokens, text), Inputs({"temb": temb}, {"image_rotary_emb": rope, "attention": options})

    def modulate(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """shift, scale, gate: of image attention and MLP, then of the text's; of a single block just three."""
        b, temb = self.blocks[block], context.rows["temb"]
        if block >= self.doubles:
            chunks: tuple[Tensor, ...] = b.norm.linear(b.norm.silu(temb)).chunk(3, dim=1)
            return chunks
        norms = (b.norm1, b.norm1_context)
        return tuple(m for norm in norms for m in norm.linear(norm.silu(temb)).chunk(6, dim=1))

    def norm(self, s: int, state: State, context: Inputs) -> State:
        i = self.sites[s].block
        block, m, (image, text) = self.blocks[i], self.modulations(i, state, context), state
        if i >= self.doubles:
            norms, at = (block.norm.norm, block.norm.norm), (0, 0)
        elif s % 2:
            norms, at = (block.norm2, block.norm2_context), (3, 9)
        else:
            norms, at = (block.norm1.norm, block.norm1_context.norm), (0, 6)
        parts = zip((image, text), norms, at, strict=True)
        return tuple(modulated(norm(x), m[k], m[k + 1]) for x, norm, k in parts)

    def inner(self, s: int, seen: State, context: Inputs) -> Branch:
        i = self.sites[s].block
        block, (image, text) = self.blocks[i], seen
        options = {"image_rotary_emb": context.shared["image_rotary_emb"], **context.shared["attention"]}
        if i >= self.doubles:
            x = torch.cat([text, image], dim=1)
            middle = block.act_mlp(block.proj_mlp(x))
            out = block.proj_out(torch.cat([block.attn(hidden_states=x, **options), middle], dim=2))
            return out[:, text.shape[1] :], out[:, : text.shape[1]]
        if s % 2:
            return block.ff(image), block.ff_context(text)
        out = block.attn(hidden_states=image, encoder_hidden_states=text, **options)
        return out[0], out[1]

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        i = self.sites[s].block
        m = self.modulations(i, state, context)
        gates = (2, 2) if i >= self.doubles else (5, 11) if s % 2 else (2, 8)
        image, text = (
            x + m[k][:, None] * change for x, change, k in zip(state, branch, gates, strict=True) if change is not None
        )
        if text.dtype == torch.float16 and (i >= self.doubles or s % 2):  # where the blocks themselves clip
            text = text.clip(-65504, 65504)
            image = image.clip(-65504, 65504) if i >= self.doubles else image
        return image, text

    def block(self, block: int, state: State, context: Inputs) -> State:
        text, image = self.blocks[block](
            hidden_states=state[0], encoder_hidden_states=state[1], temb=context.rows["temb"],
            image_rotary_emb=context.shared["image_rotary_emb"], joint_attention_kwargs=context.shared["attention"],
        )  # fmt: skip
        return image, text

    def head(self, state: State, context: Inputs) -> Tensor:
        net = self.transformer
        out: Tensor = net.proj_out(net.norm_out(state[0], context.rows["temb"]))
        return out
