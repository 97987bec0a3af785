"""SD3Transformer2DModel: joint attention and the MLPs of every block, on two streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pliant.compute.sites import Branch, State
from pliant.integrations.sites.base import BlockSites, Inputs, attention_options, modulated, unpatched


class SD3Sites(BlockSites):
    """Site 2i is block i's attention, 2i+1 its MLPs. The streams are (image, text).

    In SD 3.5's dual blocks the attention site is both attentions (they look at the same tokens): its branch has a
    third part. The last block leaves the text alone.
    """

    unsupported = ("block_controlnet_hidden_states", "skip_layers")

    def __init__(self, transformer: Any) -> None:
        blocks = list(transformer.transformer_blocks)
        super().__init__(transformer, blocks, [("attention", "mlp")] * len(blocks))

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        net, patch = self.transformer, self.transformer.config.patch_size
        options = attention_options(arguments["joint_attention_kwargs"])
        tokens = net.pos_embed(x).contiguous()
        temb = net.time_text_embed(arguments["timestep"], arguments["pooled_projections"])
        text = net.context_embedder(arguments["encoder_hidden_states"])
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        return (tokens, text), Inputs({"temb": temb}, {"grid": grid, "attention": options})

    def modulate(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """shift, scale, gate of image attention and MLP, the same of the text's (not in the last block), and then of
        the second attention where there is one; (B, D) each.
        """
        b, temb = self.blocks[block], context.rows["temb"]
        image = b.norm1.linear(b.norm1.silu(temb)).chunk(9 if b.use_dual_attention else 6, dim=1)
        if b.context_pre_only:
            text: tuple[Tensor, ...] = ()
        else:
            text = b.norm1_context.linear(b.norm1_context.silu(temb)).chunk(6, dim=1)
        return (*image[:6], *text, *image[6:])

    def norm(self, s: int, state: State, context: Inputs) -> State:
        block = self.blocks[s // 2]
        m, (image, text) = self.modulations(s // 2, state, context), state
        if s % 2:
            seen = modulated(block.norm2(image), m[3], m[4])
            return (seen,) if block.context_pre_only else (seen, modulated(block.norm2_context(text), m[9], m[10]))
        plain = block.norm1.norm(image)
        if block.context_pre_only:
            words = block.norm1_context(text, context.rows["temb"])
        else:
            words = modulated(block.norm1_context.norm(text), m[6], m[7])
        out = (modulated(plain, m[0], m[1]), words)
        return (*out, modulated(plain, m[-3], m[-2])) if block.use_dual_attention else out

    def inner(self, s: int, seen: State, context: Inputs) -> Branch:
        block = self.blocks[s // 2]
        if s % 2:
            return (block.ff(seen[0]), None if block.context_pre_only else block.ff_context(seen[1]))
        options = context.shared["attention"]
        image, text = block.attn(hidden_states=seen[0], encoder_hidden_states=seen[1], **options)
        both = (image, None if block.context_pre_only else text)
        return (*both, block.attn2(hidden_states=seen[2], **options)) if block.use_dual_attention else both

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        m, part = self.modulations(s // 2, state, context), s % 2
        image, text = state
        first, words, *second = branch
        assert first is not None
        image = image + m[3 * part + 2][:, None] * first
        for change in second:
            image = image if change is None else image + m[-1][:, None] * change
        return image, text if words is None else text + m[3 * part + 8][:, None] * words

    def block(self, block: int, state: State, context: Inputs) -> State:
        text, image = self.blocks[block](
            hidden_states=state[0], encoder_hidden_states=state[1], temb=context.rows["temb"],
            joint_attention_kwargs=context.shared["attention"],
        )  # fmt: skip
        return image, state[1] if text is None else text

    def head(self, state: State, context: Inputs) -> Tensor:
        net = self.transformer
        x = net.proj_out(net.norm_out(state[0], context.rows["temb"]))
        return unpatched(x, context.shared["grid"], net.config.patch_size, net.out_channels)
