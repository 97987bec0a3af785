"""The exact cost of one diffusion-transformer call, from its shape alone.

Everything is per image and per forward pass, in whole multiply-adds (MACs); one multiply-add counts 2 FLOPs.
Papers disagree on what they count, so the cost comes in named parts and a convention is a set of parts:

- `MATMUL`: every matrix product and convolution. Pliant's FLOPs; equal to what `counted_flops` measures.
- `PUBLISHED`: `MATMUL` plus layer norms. Reproduces the DiT paper's table (it calls MACs "Gflops").
- `WITHOUT_CONDITIONING`: `MATMUL` minus the work once per image (embedders, adaLN). FlexiDiT's percentages.
- `BLOCKS`: the transformer blocks' token work only.
- `FIT_PUBLISHED`: `MATMUL` minus the two products inside attention. FiT's and FiTv2's tables ("GFLOPs", again MACs).

Formulas: DiT (arXiv 2212.09748, table of models) as counted by fvcore, FlexiDiT (arXiv 2502.20126).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from pliant.errors import ConfigError, suggest

Convention = frozenset[str]
"""Names of the fields of `CostParts` that are counted."""


@dataclass(frozen=True)
class TransformerShape:
    """What the cost of a call depends on. Letters as in the papers: L depth, D width, N tokens."""

    depth: int
    """L, transformer blocks."""
    width: int
    """D, features per token."""
    heads: int
    """Attention heads; they divide the width and do not change the cost."""
    in_channels: int
    """C, channels of the latent."""
    out_channels: int
    """C_out: C, or 2C with a learned variance."""
    patch: tuple[int, ...]
    """Patch sides, (height, width) or (frames, height, width)."""
    tokens: int
    """N = product of (size / patch side)."""
    mlp_ratio: float = 4.0
    """m: hidden features of the MLP are int(m*D)."""
    cross_tokens: int = 0
    """M, text tokens seen by cross-attention (already of width D); 0: no cross-attention."""
    lora_rank: int = 0
    """r of unmerged low-rank adapters on self-attention (fused qkv) and MLP linears; 0: none or merged."""
    frequency_dim: int = 256
    """Input features of the time embedder's MLP."""
    time_embedders: int = 1
    """Embedders of times: 2 of a flow map, which is told where its step lands."""
    classes: int = 0
    """Rows of the label table, null class included. Costs no arithmetic, only weights."""
    block_heads: tuple[int, ...] | None = None
    """Heads that each block has left, where some are cut away; None: all of them."""
    block_hidden: tuple[int, ...] | None = None
    """Hidden features that each block's MLP has left; None: int(m*D) everywhere."""
    router_hidden: int = 0
    """Hidden features of each site's token router; 0: there are none."""
    gated: bool = False
    """Whether MLPs multiply two first linears (SwiGLU), so that they have three."""
    modulated: bool = True
    """Whether there are a time embedder and adaLN; False: neither."""
    injections: int = 0
    """Linears D -> 3D on every token that feed later blocks (GET)."""
    modulation_rank: int | None = None
    """r of adaLN-LoRA: one D -> 6D linear shared by all blocks, and D -> r -> 6D in each; None: D -> 6D in each."""

    def __post_init__(self) -> None:
        positive = (
            "depth", "width", "heads", "in_channels", "out_channels", "tokens", "frequency_dim", "time_embedders",
        )  # fmt: skip
        for name in (*positive, "cross_tokens", "lora_rank", "classes"):
            value, least = getattr(self, name), int(name in positive)
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"transformer shape has {name}={value!r}; expected a whole number >= {least}."
                )
        if not self.patch or not all(isinstance(side, int) and side > 0 for side in self.patch):
            raise ConfigError(
                f"transformer shape has patch={self.patch!r}; expected positive whole sides, e.g. (2, 2)."
            )
        if self.mlp_ratio <= 0:
            raise ConfigError(f"transformer shape has mlp_ratio={self.mlp_ratio!r}; expected a number > 0.")
        if self.width % self.heads:
            raise ConfigError(
                f"width {self.width} is not divisible by {self.heads} heads; change one of them."
            )
        for name, full in (("block_heads", self.heads), ("block_hidden", self.mlp_hidden)):
            cut = getattr(self, name)
            if cut is not None and (len(cut) != self.depth or not all(1 <= kept <= full for kept in cut)):
                raise ConfigError(
                    f"transformer shape has {name}={cut!r}; expected a number of 1 to {full} for each of "
                    f"{self.depth} blocks."
                )

    @property
    def patch_volume(self) -> int:
        """Latent positions covered by one token."""
        return math.prod(self.patch)

    @property
    def mlp_hidden(self) -> int:
        """Hidden features of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def mlp_linears(self) -> int:
        """Linears of one MLP."""
        return 3 if self.gated else 2

    @property
    def modulation_macs(self) -> int:
        """Multiply-adds of all adaLN linears, once per image: six vectors per block and two for the head."""
        L, D, rank = self.depth, self.width, self.modulation_rank
        if not self.modulated:
            return 0
        blocks = L * 6 * D * D if rank is None else 6 * D * D + L * (D * rank + rank * 6 * D)
        return blocks + 2 * D * D

    @property
    def total_inner(self) -> int:
        """Features of all blocks' attention heads together; L*D where nothing is cut away."""
        return self.width // self.heads * sum(self.block_heads or (self.heads,) * self.depth)

    @property
    def total_hidden(self) -> int:
        """Hidden features of all blocks' MLPs together; L*int(m*D) where nothing is cut away."""
        return sum(self.block_hidden or (self.mlp_hidden,) * self.depth)


@dataclass(frozen=True)
class CostParts:
    """MACs of one call, one field for each kind of work, all blocks together."""

    patch_embed: int
    """Patchify convolution."""
    self_projections: int
    """qkv and output linears of self-attention."""
    self_attention: int
    """Q K^T and A V of self-attention; grows with the square of the tokens."""
    mlp: int
    """Both linears of every MLP."""
    cross_projections: int
    """Query and output linears of cross-attention."""
    cross_context: int
    """Key and value linears of cross-attention, on the text tokens."""
    cross_attention: int
    """Q K^T and A V of cross-attention."""
    lora: int
    """Unmerged low-rank adapters."""
    final: int
    """The head: linear from tokens to patches."""
    modulation: int
    """adaLN linears of the blocks and the head; once per image."""
    embedders: int
    """The time embedder's MLP; once per image. The label table is a look-up."""
    layer_norm: int
    """Layer norms as fvcore counts them: one multiply-add per feature."""
    routers: int = 0
    """Token routers, where a call asks them."""

    def total(self, convention: Convention) -> int:
        """Sum of the parts that the convention counts. Raises `ConfigError` for an unknown part."""
        unknown = convention - ALL_PARTS
        if unknown:
            raise ConfigError(f"no cost part {min(unknown)!r}; {suggest(min(unknown), ALL_PARTS)}")
        return sum(getattr(self, name) for name in convention)


ALL_PARTS: Convention = frozenset(field.name for field in fields(CostParts))
PUBLISHED: Convention = ALL_PARTS
MATMUL: Convention = PUBLISHED - {"layer_norm"}
WITHOUT_CONDITIONING: Convention = MATMUL - {"modulation", "embedders"}
BLOCKS: Convention = WITHOUT_CONDITIONING - {"patch_embed", "final"}
FIT_PUBLISHED: Convention = MATMUL - {"self_attention"}


def cost_parts(shape: TransformerShape) -> CostParts:
    """MACs of one image's forward pass through a DiT of this shape, part by part."""
    L, D, N, M = shape.depth, shape.width, shape.tokens, shape.cross_tokens
    inner, hidden, rank = shape.total_inner, shape.total_hidden, shape.lora_rank
    cross = int(M > 0)
    return CostParts(
        patch_embed=N * shape.patch_volume * shape.in_channels * D,
        self_projections=N * (4 * D * inner + shape.injections * 3 * D * D),
        self_attention=2 * N * N * inner,
        mlp=N * shape.mlp_linears * D * hidden,
        cross_projections=cross * L * N * 2 * D * D,
        cross_context=L * M * 2 * D * D,
        cross_attention=L * 2 * N * M * D,
        # Down and up factors of qkv (D -> r -> 3D), the output (D -> r -> D) and the two MLP linears.
        lora=N * rank * ((L * D + 3 * inner) + (inner + L * D) + 2 * (L * D + hidden)),
        final=N * D * shape.patch_volume * shape.out_channels,
        modulation=shape.modulation_macs,
        embedders=shape.modulated * shape.time_embedders * (shape.frequency_dim * D + D * D),
        layer_norm=(2 * L + 1) * N * D,
    )


def macs(shape: TransformerShape, convention: Convention = MATMUL) -> int:
    """Multiply-adds of one image's forward pass."""
    return cost_parts(shape).total(convention)


def flops(shape: TransformerShape, convention: Convention = MATMUL) -> int:
    """FLOPs of one image's forward pass; one multiply-add counts 2."""
    return 2 * macs(shape, convention)


def parameter_count(shape: TransformerShape) -> int:
    """Trainable parameters, position table (a constant) excluded, low-rank factors included."""
    L, D, inner, hidden = shape.depth, shape.width, shape.total_inner, shape.total_hidden
    attention = 4 * D * inner + 3 * inner + L * D
    firsts = shape.mlp_linears - 1
    blocks = attention + ((firsts + 1) * D * hidden + firsts * hidden + L * D)
    if shape.modulation_rank is None:
        blocks += L * (6 * D * D + 6 * D)
    else:
        rank = shape.modulation_rank
        blocks += 6 * D * D + 6 * D + L * (D * rank + rank + rank * 6 * D + 6 * D)
    if shape.cross_tokens:
        blocks += L * (4 * D * D + 4 * D)
    blocks += shape.lora_rank * ((L * D + 3 * inner) + (inner + L * D) + 2 * (L * D + hidden))
    patch_embed = shape.patch_volume * shape.in_channels * D + D
    head_outputs = shape.patch_volume * shape.out_channels
    final = D * head_outputs + head_outputs + 2 * D * D + 2 * D
    embedders = shape.time_embedders * (shape.frequency_dim * D + D + D * D + D) + shape.classes * D
    return patch_embed + blocks + final + embedders


def weight_bytes(shape: TransformerShape, bytes_per_value: int = 4) -> int:
    """Bytes of the weights, exact when all of them are stored in one number format."""
    return parameter_count(shape) * bytes_per_value


def activation_bytes(shape: TransformerShape, batch: int = 1, bytes_per_value: int = 4) -> int:
    """Estimate of the peak activations of a forward pass without gradients, with fused attention.

    The residual stream and one modulated copy of it live beside the widest pair of intermediate tensors: qkv
    with the attention's output, or the MLP's hidden features before and after the activation function.
    """
    widest = max(3 * shape.width + shape.width, 2 * shape.mlp_hidden)
    return batch * shape.tokens * (2 * shape.width + widest) * bytes_per_value
