"""DiTTransformer2DModel: attention and MLP of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pliant.compute.sites import Branch, State
from pliant.integrations.sites.base import BlockSites, Inputs, attention_options, modulated, unpatched


class DiTTransformerSites(BlockSites):
    """Site 2i is block i's attention, 2i+1 its MLP."""

    def __init__(self, transformer: Any) -> None:
        blocks = list(transformer.transformer_blocks)
        super().__init__(transformer, blocks, [("attention", "mlp")] * len(blocks))

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        rows = {name: arguments[name] for name in ("timestep", "class_labels")}
        shared = {"attention": attention_options(arguments["cross_attention_kwargs"])}
        return (self.transformer.pos_embed(x),), Inputs(rows, shared)

    def modulate(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """shift, scale, gate of the attention, then of the MLP, (B, D) each."""
        norm = self.blocks[block].norm1
        emb = norm.emb(context.rows["timestep"], context.rows["class_labels"], hidden_dtype=state[0].dtype)
        chunks: tuple[Tensor, ...] = norm.linear(norm.silu(emb)).chunk(6, dim=1)
        return chunks

    def norm(self, s: int, state: State, context: Inputs) -> State:
        i, part = divmod(s, 2)
        shift, scale = self.modulations(i, state, context)[3 * part : 3 * part + 2]
        block = self.blocks[i]
        return (modulated((block.norm3 if part else block.norm1.norm)(state[0]), shift, scale),)

    def inner(self, s: int, seen: State, context: Inputs) -> Branch:
        block = self.blocks[s // 2]
        return (block.ff(seen[0]) if s % 2 else block.attn1(seen[0], **context.shared["attention"]),)

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        gate = self.modulations(s // 2, state, context)[3 * (s % 2) + 2]
        change = branch[0]
        assert change is not None
        return (gate[:, None] * change + state[0],)

    def block(self, block: int, state: State, context: Inputs) -> State:
        options = {"cross_attention_kwargs": context.shared["attention"] or None}
        return (self.blocks[block](state[0], **context.rows, **options),)

    def head(self, state: State, context: Inputs) -> Tensor:
        net, x = self.transformer, state[0]
        emb = self.blocks[0].norm1.emb(*(context.rows[n] for n in ("timestep", "class_labels")), hidden_dtype=x.dtype)
        shift, scale = net.proj_out_1(F.silu(emb)).chunk(2, dim=1)
        x = net.proj_out_2(modulated(net.norm_out(x), shift, scale))
        side = int(x.shape[1] ** 0.5)  # this class knows square latents only
        return unpatched(x, (side, side), net.patch_size, net.out_channels)
