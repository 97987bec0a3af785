"""The native backbone: any resolution, any aspect ratio and any of its patch sizes in one network.

FiTv2's ingredients that pay (arXiv 2410.13925; sheet B, section 1): rotary positions in pixels of the state, so that
all patch sizes and sizes share them, normalised queries and keys, SwiGLU, adaLN-LoRA. What it adds: every patch size
reads and writes tokens through projections of its own and tells the conditioning which it is, so that one training run
with random patch sizes makes all of them (FlexiDiT, arXiv 2502.20126, does that to a finished network). States may have
any number of axes: images (C, H, W), videos (C, T, H, W), signals (C, L).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pliant.compute import Compute, TransformerShape
from pliant.compute.sites import SiteModel
from pliant.errors import ConfigError, PlanError, ShapeError
from pliant.mappings import from_mapping, to_mapping
from pliant.models.dit import scale_rows
from pliant.models.layers import TimestepEmbedder, modulated_norm
from pliant.models.network import Backbone, Size, Taps, named
from pliant.models.patches import grid_of, patch_name, patchify, resize_head, resize_kernel, resize_matrix, unpatchify
from pliant.models.rope import RopeScaling, axis_widths, grid_positions, rope_table
from pliant.models.rotary import EPS, LowRankModulation, Rope, RotaryBlock

MOST_SIDE_RATIO = 64
"""Longest over shortest side that calls accept: beyond it nothing was ever trained and the cost is a mistake."""
NO_TOKENS = "token subsets, merging and kept keys do not work on a flexible network; use a larger patch"


@dataclass(frozen=True)
class FlexibleConfig:
    """Everything that determines the backbone's shape and arithmetic."""

    input_size: Size = (16, 16)
    """The size of states unless another is asked for."""
    patch_sizes: tuple[Size, ...] = ((1, 1), (2, 2))
    """All patch sizes, the network's own (finest) first. As many axes as input_size."""
    in_channels: int = 4
    width: int = 256
    depth: int = 8
    heads: int = 8
    mlp_hidden: int = 0
    """Features inside the gated MLP; 0: two thirds of 4 * width, as FiTv2."""
    modulation_rank: int = 0
    """r of adaLN-LoRA; 0: a quarter of the width, as FiTv2."""
    num_classes: int = 1000
    class_dropout: float = 0.1
    """Probability of replacing a label by the null label in training; 0 removes the null row from the table."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; small states (sides below about 32) do better with 100."""
    train_sides: tuple[int, int] | None = None
    """Shortest and longest side of training states; None: input_size's."""
    train_pixels: tuple[int, int] | None = None
    """Fewest and most pixels of training states; None: the squares of train_sides and everything between."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "input_size", tuple(self.input_size))
        axes = len(self.input_size)
        given: Sequence[int | Sequence[int]] = self.patch_sizes  # files and people may write 2 for (2, 2)
        sizes = ((p,) * axes if isinstance(p, int) else tuple(p) for p in given)
        set_(self, "patch_sizes", tuple(sizes))
        if not 1 <= axes <= 3 or not self.patch_sizes or any(len(p) != axes for p in self.patch_sizes):
            raise ConfigError(
                f"a flexible network has states of 1 to 3 axes and patch sizes of as many, got input_size "
                f"{self.input_size} and patch_sizes {self.patch_sizes}"
            )
        if len(set(self.patch_sizes)) != len(self.patch_sizes):
            raise ConfigError(f"patch_sizes repeat one: {self.patch_sizes}")
        own = self.patch_sizes[0]
        for patch in self.patch_sizes:
            if any(p < 1 or p % o for p, o in zip(patch, own, strict=True)):
                raise ConfigError(f"patch size {patch_name(patch)} is no multiple of the finest, {patch_name(own)}")
        if min(self.in_channels, self.width, self.depth, self.heads, self.num_classes) < 1:
            raise ConfigError("in_channels, width, depth, heads and num_classes must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be divisible by the number of heads ({self.heads})")
        axis_widths(self.width // self.heads, axes)  # says if a head is too narrow
        set_(self, "mlp_hidden", self.mlp_hidden or 4 * self.width * 2 // 3)
        set_(self, "modulation_rank", self.modulation_rank or max(1, self.width // 4))
        for name in ("train_sides", "train_pixels"):
            value = getattr(self, name)
            if value is not None:
                set_(self, name, tuple(value))
                if len(value) != 2 or not 1 <= value[0] <= value[1]:
                    raise ConfigError(f"{name} is (least, most), whole numbers of at least 1; got {value}")
        grid_of(self.input_size, own)

    @property
    def patch_size(self) -> Size:
        return self.patch_sizes[0]

    @property
    def learn_sigma(self) -> bool:
        """Never: this network predicts, and its variances are not learned."""
        return False

    @property
    def flow_map(self) -> bool:
        """Never yet: calls tell it one time."""
        return False

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def label_rows(self) -> int:
        return self.num_classes + (1 if self.class_dropout > 0 else 0)

    @property
    def sides(self) -> tuple[int, int]:
        """Shortest and longest side of training states."""
        return self.train_sides or (min(self.input_size), max(self.input_size))

    @property
    def pixels(self) -> tuple[int, int]:
        """Fewest and most pixels of training states."""
        if self.train_pixels is not None:
            return self.train_pixels
        if self.train_sides is None:
            return math.prod(self.input_size), math.prod(self.input_size)
        axes = len(self.input_size)
        return self.train_sides[0] ** axes, self.train_sides[1] ** axes

    def shape(self, size: Size | None = None, patch: Size | None = None) -> TransformerShape:
        """A call's shape for the cost model, at a size and patch size (None: own)."""
        patch = patch or self.patch_size
        return TransformerShape(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            patch=patch,
            tokens=math.prod(grid_of(size or self.input_size, patch)),
            mlp_ratio=max(4.0, self.mlp_hidden / self.width),
            classes=self.label_rows,
            block_hidden=(self.mlp_hidden,) * self.depth,
            gated=True,
            modulation_rank=self.modulation_rank,
        )

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in to_mapping(self).items() if v is not None}

    @staticmethod
    def from_dict(config: dict[str, Any]) -> FlexibleConfig:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field and the nearest known one."""
        return from_mapping(FlexibleConfig, config, "field of a flexible network")


class PatchMode(nn.Module):
    """How one patch size enters and leaves the network."""

    def __init__(self, config: FlexibleConfig, patch: Size) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(config.width, config.in_channels, *patch))
        self.bias = nn.Parameter(torch.zeros(config.width))
        self.embedding = nn.Parameter(torch.zeros(config.width))
        """Added to the conditioning, which so knows the patch size."""
        self.head = nn.Linear(config.width, math.prod(patch) * config.out_channels)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, N, D)."""
        kernel = self.weight.reshape(self.weight.shape[0], -1)
        return F.linear(patchify(x.to(self.weight.dtype), self.patch), kernel, self.bias)

    @torch.no_grad()
    def start_from(self, other: PatchMode) -> None:
        """The tokens and predictions of another (finer) mode: kernels averaged, heads resized (sheet A, 1.2-1.3)."""
        down, up = resize_matrix(self.patch, other.patch, "bilinear"), resize_matrix(other.patch, self.patch, "area")
        self.weight.copy_(resize_kernel(other.weight, down.T, self.patch))
        self.bias.copy_(other.bias)
        self.embedding.copy_(other.embedding)
        self.head.weight.copy_(resize_head(other.head.weight, up))
        self.head.bias.copy_(resize_head(other.head.bias, up))


class FlexibleTransformer(Backbone):
    """`forward(x (B, C, *size), t (B,) network time, y (B,) labels, patch, extrapolation)` -> (B, C, *size).

    As it is it runs at any of its patch sizes; `plain` gives the view of one, which shares every weight. Nothing is
    dropped inside: training objectives drop labels.
    """

    family = "flexible"
    any_size = True
    config: FlexibleConfig

    def __init__(self, config: FlexibleConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch_size
        """What calls that name no patch size run at."""
        self.extrapolation = "none"
        self.projector: nn.Module | None = None
        """A part that only training has: see `pliant.training.representation`."""
        self.checkpointing = False
        """Whether training recomputes every block in the backward pass instead of keeping its activations."""
        self.time_embed = TimestepEmbedder(config.width, 128)
        self.label_embed = nn.Embedding(config.label_rows, config.width)
        self.modulation = LowRankModulation(config.depth, config.width, config.modulation_rank)
        self.blocks = nn.ModuleList(
            [RotaryBlock(config.width, config.heads, config.mlp_hidden) for _ in range(config.depth)]
        )
        self.modes = nn.ModuleDict({patch_name(p): PatchMode(config, p) for p in config.patch_sizes})
        if not self.label_embed.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """FiTv2's initialisation: Xavier linears, N(0, 0.02) embedders, zero modulation and heads (output is 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc1.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc2.weight, std=0.02)
        self.modulation.reset_parameters()
        own = self.mode(self.config.patch_size)
        nn.init.xavier_uniform_(own.weight.data.view(self.config.width, -1))
        for patch in self.config.patch_sizes:
            mode = self.mode(patch)
            nn.init.zeros_(mode.head.weight)
            nn.init.zeros_(mode.head.bias)
            nn.init.normal_(mode.embedding, std=0.02)
            if mode is not own:
                mode.start_from(own)

    # What it is ---------------------------------------------------------------------------------------------------

    @property
    def patch_sizes(self) -> tuple[Size, ...]:
        return self.config.patch_sizes

    @property
    def modulation_values(self) -> int:
        return (6 * self.config.depth + 2) * self.config.width

    @property
    def dtype(self) -> torch.dtype:
        return self.label_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.label_embed.weight.device

    def mode(self, patch: Size | None) -> PatchMode:
        """The projections of a patch size (None: this view's). Raises ConfigError for one the network lacks."""
        name = patch_name(patch or self.patch)
        if name not in self.modes:
            known = ", ".join(self.modes)
            raise ConfigError(f"this model has patch sizes {known}, not {name}; add it with pliant.flexify")
        return cast(PatchMode, self.modes[name])

    def plain(self, patch: Size, merged: bool = True, extrapolation: str = "none") -> FlexibleTransformer:
        """A view that calls run at this patch size and extrapolation; it shares all weights."""
        self.mode(patch)
        view = copy.copy(self)
        view.patch, view.extrapolation = tuple(patch), extrapolation
        return view

    @torch.no_grad()
    def in_dtype(self, dtype: torch.dtype) -> Self:
        with torch.device("meta"):
            other = type(self)(self.config)
        other.load_state_dict({k: v.to(dtype) for k, v in self.state_dict().items()}, assign=True)
        other.patch, other.extrapolation = self.patch, self.extrapolation
        return other.requires_grad_(False)

    def site_model(self, size: Size, tokens: bool = False) -> SiteModel:
        from pliant.models.flexible_sites import FlexibleSites

        if tokens:
            raise PlanError(NO_TOKENS)
        return FlexibleSites(self, size)

    def check_compute(self, compute: Compute) -> None:
        if compute.scale is not None:
            raise PlanError("a flexible network has no scale: its coarse calls are those of larger patches")
        if compute.tokens is not None or "kv" in compute.write:
            raise PlanError(NO_TOKENS)
        if "increment" in compute.write:
            raise PlanError("increments do not work on a flexible network; keep branches instead")

    def check_size(self, size: Size) -> None:
        """Every patch size has to divide it, so that plans may use any."""
        config = self.config
        if len(size) != len(config.input_size):
            raise ShapeError(f"states of this network have {len(config.input_size)} sides, {named(size)} {len(size)}")
        steps = [math.lcm(*(p[a] for p in config.patch_sizes)) for a in range(len(size))]
        if any(n < 1 or n % step for n, step in zip(size, steps, strict=True)):
            nearest = tuple(max(1, round(n / step)) * step for n, step in zip(size, steps, strict=True))
            raise ShapeError(
                f"size {named(size)} is no multiple of this model's patches ({', '.join(self.modes)}); the nearest "
                f"that is: {named(nearest)}"
            )
        if max(size) > MOST_SIDE_RATIO * min(size) and len(size) > 1:
            raise ShapeError(
                f"size {named(size)} is more than {MOST_SIDE_RATIO} times as long as wide; choose another aspect ratio"
            )

    def check_extrapolation(self, extrapolation: str) -> None:
        RopeScaling.named(extrapolation)

    @property
    def reference_pixels(self) -> int:
        return self.config.pixels[1]

    def beyond(self, size: Size) -> str | None:
        (least, most), (fewest, largest) = self.config.sides, self.config.pixels
        if min(size) < least or max(size) > most:
            return f"sides of {least} to {most}"
        if not fewest <= math.prod(size) <= largest:
            return f"{fewest} to {largest} pixels"
        return None

    # What it computes -----------------------------------------------------------------------------------------------

    def rope(self, size: Size, patch: Size, extrapolation: str, device: torch.device) -> Rope:
        """(cos, sin) of the tokens of a state: every patch at its centre, in pixels of the state."""
        config = self.config
        head, longest = config.width // config.heads, float(config.sides[1])
        cos, sin = _rope(size, patch, head, config.rope_theta, longest, extrapolation)
        return cos.to(device), sin.to(device)

    def modulations(self, t: Tensor, y: Tensor, patch: Size | None = None) -> Tensor:
        """(B,) network times and (B,) labels -> (B, 6*depth + 2, D), every scale already increased by 1."""
        c = self.time_embed(t) + self.label_embed(y) + self.mode(patch).embedding
        rows: Tensor = self.modulation(c)
        return rows + scale_rows(self.config.depth, rows)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, patch: Size | None = None, extrapolation: str | None = None
    ) -> Tensor:
        return self.forward_modulated(x, self.modulations(t, y, patch), patch, extrapolation)

    def forward_modulated(
        self, x: Tensor, modulations: Tensor, patch: Size | None = None, extrapolation: str | None = None
    ) -> Tensor:
        """(B, C, *size) and (B or 1, 6*depth + 2, D) -> (B, C, *size)."""
        mode, size = self.mode(patch), tuple(x.shape[2:])
        tokens, rope = self.embed(x, patch), self.rope(size, mode.patch, extrapolation or self.extrapolation, x.device)
        for i, block in enumerate(self.blocks):
            rows = modulations[:, 6 * i : 6 * i + 6]
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, rows, rope, use_reentrant=False)
            else:
                tokens = block(tokens, rows, rope)
        return self.read(tokens, modulations, size, patch)

    def embed(self, x: Tensor, patch: Size | None = None) -> Tensor:
        """(B, C, *size) -> the blocks' input (B, N, D). Raises ShapeError for states the network cannot read."""
        self.check_state(x)
        return self.mode(patch).embed(x)

    def check_state(self, x: Tensor) -> None:
        """Raises ShapeError unless x is (B, in_channels, *size) with B and all sides at least 1."""
        axes, channels = len(self.config.input_size), self.config.in_channels
        if x.ndim != axes + 2 or x.shape[1] != channels:
            raise ShapeError(
                f"the model takes states of {channels} channels and {axes} sides, got {tuple(x.shape[1:])}"
            )
        if 0 in x.shape:
            raise ShapeError(f"there is nothing in states of shape {tuple(x.shape)}")

    def read(self, tokens: Tensor, modulations: Tensor, size: Size, patch: Size | None = None) -> Tensor:
        """The blocks' output (B, N, D) and (B, 6*depth + 2, D) -> (B, C, *size)."""
        mode = self.mode(patch)
        out = mode.head(modulated_norm(tokens, modulations[:, -2], modulations[:, -1], EPS))
        return unpatchify(out, grid_of(size, mode.patch), mode.patch)

    def forward_packed(
        self,
        xs: Sequence[Tensor],
        t: Tensor,
        y: Tensor,
        patch: Size | None = None,
        extrapolation: str | None = None,
        taps: Taps | None = None,
    ) -> list[Tensor]:
        """Groups of states of different sizes in one pass, nothing padded: xs[g] (B_g, C, *size_g) -> like xs.

        t, y: (sum of B_g,), group by group. taps: tokens after so many blocks, to be filled in. Equal to one call per
        group up to rounding.
        """
        if not xs:
            raise ShapeError("a packed call needs at least one state")
        counts = [len(x) for x in xs]
        if sum(counts) != len(t) or len(t) != len(y):
            raise ShapeError(f"{sum(counts)} states need as many times and labels, got {len(t)} and {len(y)}")
        return self.packed_modulated(xs, self.modulations(t, y, patch).split(counts), patch, extrapolation, taps)

    def packed_modulated(
        self,
        xs: Sequence[Tensor],
        modulations: Sequence[Tensor],
        patch: Size | None = None,
        extrapolation: str | None = None,
        taps: Taps | None = None,
    ) -> list[Tensor]:
        """`forward_packed` below the conditioning: modulations[g] (B_g or 1, 6*depth + 2, D)."""
        mode, method = self.mode(patch), extrapolation or self.extrapolation
        tokens = [self.embed(x, patch) for x in xs]
        ropes = [self.rope(tuple(x.shape[2:]), mode.patch, method, x.device) for x in xs]
        for i, module in enumerate(self.blocks):
            block = cast(RotaryBlock, module)
            rows = [m[:, 6 * i : 6 * i + 6] for m in modulations]
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block.packed, tokens, rows, ropes, use_reentrant=False)
            else:
                tokens = block.packed(tokens, rows, ropes)
            if taps is not None and i + 1 in taps:
                taps[i + 1] = tokens
        return [
            self.read(tok, m, tuple(x.shape[2:]), patch) for tok, m, x in zip(tokens, modulations, xs, strict=True)
        ]


@lru_cache(maxsize=512)
def _rope(
    size: Size, patch: Size, head: int, theta: float, train_side: float, extrapolation: str
) -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        grid = grid_of(size, patch)
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * p for n, p in zip(grid, patch, strict=True)]
        scaling = RopeScaling.named(extrapolation, train_side)
        return rope_table(grid_positions(*axes), head, theta, tuple(float(n) for n in size), scaling)
