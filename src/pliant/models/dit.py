"""The diffusion transformer DiT (arXiv 2212.09748), numerically the official network on the official weights.

Differences of form only: any rectangular grid and patch, positions recomputed instead of stored, and the adaLN
linears of all blocks kept as one matrix, because they share their input and one product is faster than 2L+1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.compute import Compute, TransformerShape
from pliant.compute.sites import SiteModel
from pliant.errors import ConfigError, ShapeError
from pliant.mappings import from_mapping, to_mapping
from pliant.models.layers import Block, TimestepEmbedder, embed_times, modulated_norm, reset_jump
from pliant.models.network import Backbone, NetworkConfig, Size
from pliant.models.patches import patch_pair, patchify, token_grid, unpatchify
from pliant.models.positions import patch_positions

SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


@dataclass(frozen=True)
class DiTConfig:
    """Everything that determines a DiT's shape and arithmetic."""

    input_size: tuple[int, int] = (32, 32)
    """Height and width of the (latent) image."""
    patch_size: tuple[int, int] = (2, 2)
    in_channels: int = 4
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout: float = 0.1
    """Probability of replacing a label by the null label in training; 0 removes the null row from the table."""
    learn_sigma: bool = True
    """The output has twice the channels: prediction, then variance code."""
    frequency_divisor: int = 128
    """Of the timestep sinusoid: 128 official, 127 diffusers."""
    norm2_eps: float = 1e-6
    """Of each block's second LayerNorm: 1e-6 official, 1e-5 diffusers."""
    flow_map: bool = False
    """Also told where a step lands, so that one call predicts a whole jump: network times are pairs (B, 2)."""
    block_heads: tuple[int, ...] | None = None
    """Heads of every block of a network with heads cut away (each still width / heads wide); None: all of them."""
    block_hidden: tuple[int, ...] | None = None
    """Hidden features of every block's MLP where some are cut away; None: int(width * mlp_ratio) everywhere."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", patch_pair(self.input_size))
        object.__setattr__(self, "patch_size", patch_pair(self.patch_size))
        if self.width % self.heads or self.width % 4:
            raise ConfigError(f"width {self.width} must be divisible by 4 and by the number of heads ({self.heads})")
        if min(self.depth, self.in_channels, self.num_classes) < 1:
            raise ConfigError("depth, in_channels and num_classes must be at least 1")
        self.grid()
        for name, full in (("block_heads", self.heads), ("block_hidden", int(self.width * self.mlp_ratio))):
            given = getattr(self, name)
            if given is None:
                continue
            object.__setattr__(self, name, tuple(given))
            if len(given) != self.depth or not all(isinstance(k, int) and 1 <= k <= full for k in given):
                raise ConfigError(f"{name} needs a number of 1 to {full} for each of {self.depth} blocks, got {given}")

    @property
    def block_widths(self) -> tuple[tuple[int, int], ...]:
        """(heads, hidden features of the MLP) of every block."""
        heads = self.block_heads or (self.heads,) * self.depth
        hidden = self.block_hidden or (int(self.width * self.mlp_ratio),) * self.depth
        return tuple(zip(heads, hidden, strict=True))

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        return self.num_classes + (1 if self.class_dropout > 0 else 0)

    def grid(self, patch: tuple[int, int] | None = None) -> tuple[int, int]:
        """Token grid (rows, columns) at a patch size (default: the model's own)."""
        return token_grid(self.input_size, patch or self.patch_size)

    def shape(self, size: Size | None = None, patch: Size | None = None) -> TransformerShape:
        """A call's shape for the cost model, at a size and patch size (None: own)."""
        height, width = size or self.input_size
        rows, columns = patch or self.patch_size
        grid = token_grid((height, width), (rows, columns))
        return TransformerShape(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            patch=(rows, columns),
            tokens=grid[0] * grid[1],
            mlp_ratio=self.mlp_ratio,
            classes=self.label_rows,
            block_heads=self.block_heads,
            block_hidden=self.block_hidden,
            time_embedders=2 if self.flow_map else 1,
        )

    def check_input(self, x: Tensor) -> None:
        """Raises ShapeError unless x is (B, in_channels, *input_size)."""
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            raise ShapeError(
                f"the model takes inputs of {(self.in_channels, *self.input_size)} "
                f"(channels, height, width), got {tuple(x.shape[1:])}"
            )

    @staticmethod
    def named(name: str, **options: Any) -> DiTConfig:
        """"DiT-XL/2" -> its config; options override fields (e.g. `input_size=64`)."""
        match = re.fullmatch(r"(?:DiT-|SiT-)?(S|B|L|XL)/(\d+)(?:x(\d+))?", name)
        if not match:
            raise ConfigError(f"unknown model name {name!r}: write DiT-S/2, DiT-B/4, DiT-L/2, DiT-XL/2, ...")
        size, ph, pw = match.groups()
        return DiTConfig(**{"patch_size": (int(ph), int(pw or ph)), **SIZES[size], **options})

    def to_dict(self) -> dict[str, Any]:
        # Plain networks do not mention cuts or flow maps, so that identities made before there were any stay the same.
        return to_mapping(self, silent={"flow_map": False})

    @staticmethod
    def from_dict(config: dict[str, Any]) -> DiTConfig:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field and the nearest known one."""
        return from_mapping(DiTConfig, config, "DiT field")


class PatchEmbed(nn.Module):
    """Patches to tokens: one linear map, stored in the layout of a convolution kernel (D, C, ph, pw)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.width, config.in_channels, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return embed_patches(x, self.weight, self.bias)


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) and kernel (D, C, ph, pw) -> tokens (B, N, D), row-major."""
    ph, pw = weight.shape[2:]
    return F.linear(patchify(x.to(weight.dtype), (ph, pw)), weight.reshape(weight.shape[0], -1), bias)


class DiT(Backbone):
    """Class-conditional diffusion transformer.

    `forward(x (B,C,H,W), t (B,) network time, y (B,) labels)` -> (B, out_channels, H, W). The null label for
    classifier-free guidance is `config.num_classes`. Nothing is dropped inside: training objectives drop labels.
    """

    family = "dit"
    config: DiTConfig
    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimestepEmbedder(config.width, config.frequency_divisor)
        self.jump_embed = TimestepEmbedder(config.width, config.frequency_divisor) if config.flow_map else None
        table = torch.empty(config.label_rows, config.width)
        # nn.Embedding would draw this itself, on the meta device too; drawn here, seeds keep their meaning.
        table = table if table.is_meta else table.normal_()
        self.label_embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(
            [
                Block(config.width, config.heads, config.mlp_ratio, config.norm2_eps, heads, hidden)
                for heads, hidden in config.block_widths
            ]
        )
        # Rows: 6 per block (shift, scale, gate of attention, then of the MLP), then shift and scale of the head.
        self.modulation = nn.Linear(config.width, (6 * config.depth + 2) * config.width)
        self.head = nn.Linear(config.width, config.patch_size[0] * config.patch_size[1] * config.out_channels)
        if self.head.weight.is_meta:
            # A skeleton for shapes, or for weights to come. Numbers on the meta device load 80 MB of Python, in 0.9 s.
            rows, columns = config.grid()
            self.register_buffer("positions", torch.empty(rows * columns, config.width), persistent=False)
            return
        positions = patch_positions(config.grid(), config.patch_size, config.patch_size, config.width)
        self.register_buffer("positions", positions, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Official initialisation: Xavier linears, N(0, 0.02) embedders, zero modulation and head (output is 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc1.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc2.weight, std=0.02)
        if self.jump_embed is not None:
            reset_jump(self.jump_embed)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) network times and (B,) labels -> (B, 6*depth + 2, D), every scale already increased by 1.

        Of a flow map the times are pairs (B, 2): where the state is and where the step lands.
        """
        c = self.embed_time(t) + self.label_embed(y)
        rows: Tensor = self.modulation(F.silu(c)).view(len(y), -1, self.config.width)
        return rows + scale_rows(self.config.depth, rows)

    def embed_time(self, t: Tensor) -> Tensor:
        """(B,) network times, or (B, 2) of a flow map -> (B, D). Raises ShapeError for the other kind."""
        return embed_times(t, self.time_embed, self.jump_embed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward_modulated(x, self.modulations(t, y))

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """The network below the conditioning: (B, C, H, W) and (B, 6*depth + 2, D) -> (B, out_channels, H, W)."""
        tokens = self.embed(x)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, modulations[:, 6 * i : 6 * i + 6])
        return self.read(tokens, modulations)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the blocks' input (B, N, D). Raises ShapeError for another size than the config's."""
        self.config.check_input(x)
        return self.patch_embed(x) + self.positions.to(self.patch_embed.weight.dtype)

    def read(self, tokens: Tensor, modulations: Tensor) -> Tensor:
        """The blocks' output (B, N, D) and (B, 6*depth + 2, D) -> (B, out_channels, H, W)."""
        tokens = self.head(modulated_norm(tokens, modulations[:, -2], modulations[:, -1], 1e-6))
        return unpatchify(tokens, self.config.grid(), self.config.patch_size)

    @property
    def modulation_values(self) -> int:
        return self.modulation.out_features

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def in_dtype(self, dtype: torch.dtype) -> DiT:
        with torch.device("meta"):
            copy = type(self)(self.config)
        copy.load_state_dict({k: v.to(dtype) for k, v in self.state_dict().items()}, assign=True)
        copy.positions = self.positions.to(dtype)
        return copy.requires_grad_(False)

    def site_model(self, size: Size, tokens: bool = False) -> SiteModel:
        from pliant.models.dit_sites import DiTSites
        from pliant.models.dit_tokens import DiTTokens

        return (DiTTokens if tokens else DiTSites)(self)

    def check_compute(self, compute: Compute) -> None:
        """Nothing: a DiT does all of it."""

    def with_patch_size(self, patch: tuple[int, int]) -> DiTConfig:
        """This network's config at another patch size."""
        return replace(self.config, patch_size=patch)


def scale_rows(depth: int, like: Tensor) -> Tensor:
    """(6*depth + 2, 1) with 1 at rows that hold scales, else 0."""
    mask = like.new_zeros(6 * depth + 2, 1)
    mask[1 : 6 * depth : 6] = 1
    mask[4 : 6 * depth : 6] = 1
    mask[-1] = 1
    return mask
