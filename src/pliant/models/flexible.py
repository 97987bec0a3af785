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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pliant.compute import Compute
from pliant.compute.sites import SiteModel
from pliant.errors import ConfigError, PlanError, ShapeError
from pliant.models.dit import scale_rows
from pliant.models.flexible_config import FlexibleConfig as FlexibleConfig
from pliant.models.layers import TimestepEmbedder, embed_times, modulated_norm, reset_jump
from pliant.models.network import Backbone, Size, Taps, named
from pliant.models.patch_mode import PatchMode
from pliant.models.patches import grid_of, patch_name, unpatchify
from pliant.models.rope import RopeScaling, grid_positions, rope_table
from pliant.models.rotary import EPS, LowRankModulation, Rope, RotaryBlock

MOST_SIDE_RATIO = 64
"""Longest over shortest side that calls accept: beyond it nothing was ever trained and the cost is a mistake."""
NO_TOKENS = "token subsets, merging and kept keys do not work on a flexible network; use a larger patch"


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
        self.jump_embed = TimestepEmbedder(config.width, 128) if config.flow_map else None
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
        if self.jump_embed is not None:
            reset_jump(self.jump_embed)
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
        if compute.has_increments:
            raise PlanError("increments do not work on a flexible network; keep branches instead")

    def check_size(self, size: Size) -> None:
        """Every patch size has to divide it, so that plans may use any."""
        config = self.config
        if len(size) != len(config.input_size):
            raise ShapeError(f"states of this network have {len(config.input_size)} sides, {named(size)} {len(size)}")
        if min(size) >= 1 and max(size) > MOST_SIDE_RATIO * min(size) and len(size) > 1:
            raise ShapeError(
                f"size {named(size)} is more than {MOST_SIDE_RATIO} times as long as wide; choose another aspect ratio"
            )
        steps = [math.lcm(*(p[a] for p in config.patch_sizes)) for a in range(len(size))]
        if any(n < 1 or n % step for n, step in zip(size, steps, strict=True)):
            nearest = tuple(max(1, round(n / step)) * step for n, step in zip(size, steps, strict=True))
            raise ShapeError(
                f"size {named(size)} is no multiple of this model's patches ({', '.join(self.modes)}); the nearest "
                f"that is: {named(nearest)}"
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
        """(B,) network times and (B,) labels -> (B, 6*depth + 2, D), every scale already increased by 1.

        Of a flow map the times are pairs (B, 2): where the state is and where the step lands.
        """
        c = embed_times(t, self.time_embed, self.jump_embed) + self.label_embed(y) + self.mode(patch).embedding
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


def with_patches(network: FlexibleTransformer, patches: Iterable[int | Size]) -> FlexibleTransformer:
    """A copy with these patch sizes too: whatever it did before it does bit for bit, the new sizes start as the finest.

    Raises ConfigError for sizes it has or that are no multiples of the finest, ShapeError for those that do not divide
    its own state size.
    """
    config = network.config
    axes = len(config.input_size)
    new = tuple((p,) * axes if isinstance(p, int) else tuple(p) for p in patches)
    more = replace(config, patch_sizes=(*config.patch_sizes, *new))
    made = copy.deepcopy(network)
    made.config = more
    for patch in new:
        grid_of(config.input_size, patch)
        mode = PatchMode(more, patch).to(made.device, made.dtype)
        mode.start_from(made.mode(config.patch_size))
        made.modes[patch_name(patch)] = mode
    return made


@lru_cache(maxsize=512)
def _rope(
    size: Size, patch: Size, head: int, theta: float, train_side: float, extrapolation: str
) -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        grid = grid_of(size, patch)
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * p for n, p in zip(grid, patch, strict=True)]
        scaling = RopeScaling.named(extrapolation, train_side)
        return rope_table(grid_positions(*axes), head, theta, tuple(float(n) for n in size), scaling)
