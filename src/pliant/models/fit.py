"""FiT and FiTv2, the flexible vision transformers (arXiv 2402.12376 and 2410.13925), numerically the released networks
on the released weights (sheet B, section 1).

An image of any size is a sequence of patches with two-dimensional rotary positions, counted in patches. FiTv2 adds
normalised queries and keys, adaLN-LoRA and a narrower MLP. Sizes beyond training stretch the positions by an
`extrapolation` of `pliant.models.rope.NAMED`.
"""

from __future__ import annotations

import copy
import math
import re
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
from pliant.errors import ConfigError, PlanError, ShapeError, suggest
from pliant.mappings import from_mapping, to_mapping
from pliant.models.dit import PatchEmbed, scale_rows
from pliant.models.layers import TimestepEmbedder, modulated_norm
from pliant.models.network import Backbone, Size, named
from pliant.models.patches import patch_pair, token_grid, unpatchify
from pliant.models.rope import RopeScaling, grid_positions, rope_table
from pliant.models.rotary import EPS, LowRankModulation, Rope, RotaryBlock
from pliant.models.token_batch import TokenBatch

# Published ones; FiTv2-S and -L follow the rule that made B and XL out of DiT's (a quarter more blocks).
SIZES: dict[str, dict[str, int]] = {
    "FiT-B": {"depth": 12, "width": 768, "heads": 12},
    "FiT-XL": {"depth": 28, "width": 1152, "heads": 16},
    "FiTv2-S": {"depth": 15, "width": 384, "heads": 6},
    "FiTv2-B": {"depth": 15, "width": 768, "heads": 12},
    "FiTv2-L": {"depth": 30, "width": 1024, "heads": 16},
    "FiTv2-XL": {"depth": 36, "width": 1152, "heads": 16},
    "FiTv2-3B": {"depth": 40, "width": 2304, "heads": 24},
}


@dataclass(frozen=True)
class FiTConfig:
    """Everything that determines a FiT's shape and arithmetic."""

    input_size: tuple[int, int] = (32, 32)
    """Height and width of the (latent) image, where no other is asked for."""
    patch_size: tuple[int, int] = (2, 2)
    in_channels: int = 4
    width: int = 1152
    depth: int = 36
    heads: int = 16
    mlp_hidden: int = 0
    """Features inside the gated MLP; 0: two thirds of 4 * width (FiTv2). FiT: 4 * width."""
    modulation_rank: int | None = 0
    """r of adaLN-LoRA; 0: a quarter of the width (FiTv2). None: full adaLN in every block (FiT)."""
    qk_norm: bool = True
    """Normalise queries and keys (FiTv2)."""
    learn_sigma: bool = False
    """The output has twice the channels: prediction, then variance code (FiT)."""
    num_classes: int = 1000
    class_dropout: float = 0.1
    """Probability of replacing a label by the null label in training; 0 removes the null row from the table."""
    train_length: int = 16
    """L0: tokens along a side of the square that positions were pre-trained on."""
    train_tokens: int = 256
    """Most tokens of an image in training; 1024 after FiTv2's high-resolution post-training."""
    extrapolation: str = "none"
    """What positions were trained with: "vision-ntk" after the high-resolution post-training."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "input_size", patch_pair(self.input_size))
        set_(self, "patch_size", patch_pair(self.patch_size))
        if min(self.depth, self.in_channels, self.num_classes, self.heads, self.width) < 1:
            raise ConfigError("depth, width, heads, in_channels and num_classes must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ConfigError(
                f"width {self.width} must split into {self.heads} heads of a multiple of 4 features: pairs for rows, "
                f"as many for columns"
            )
        if min(self.train_length, self.train_tokens) < 1:
            raise ConfigError("train_length and train_tokens must be at least 1")
        set_(self, "mlp_hidden", self.mlp_hidden or 4 * self.width * 2 // 3)
        if self.modulation_rank is not None:
            set_(self, "modulation_rank", self.modulation_rank or max(1, self.width // 4))
        RopeScaling.named(self.extrapolation, self.train_length)
        token_grid(self.input_size, self.patch_size)

    @property
    def patch_sizes(self) -> tuple[Size, ...]:
        return (self.patch_size,)

    @property
    def flow_map(self) -> bool:
        """Never: this network answers for one time, not for a jump between two."""
        return False

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        return self.num_classes + (1 if self.class_dropout > 0 else 0)

    def shape(self, size: Size | None = None, patch: Size | None = None) -> TransformerShape:
        """A call's shape for the cost model, at a size (None: own)."""
        patch = patch or self.patch_size
        return TransformerShape(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            patch=patch,
            tokens=math.prod(token_grid(patch_pair(size or self.input_size), patch_pair(patch))),
            mlp_ratio=self.mlp_hidden / self.width,
            classes=self.label_rows,
            gated=True,
            modulation_rank=self.modulation_rank,
        )

    @property
    def name(self) -> str:
        """The published name, or the sizes of a network without one."""
        version = "FiT" if self.modulation_rank is None else "FiTv2"
        ph, pw = self.patch_size
        patch = str(ph) if ph == pw else f"{ph}x{pw}"
        for name, size in SIZES.items():
            if name.startswith(f"{version}-") and size == {k: getattr(self, k) for k in ("depth", "width", "heads")}:
                return f"{name}/{patch}"
        return f"{version} of width {self.width}, depth {self.depth}, {self.heads} heads, patch {patch}"

    @staticmethod
    def named(name: str, **options: Any) -> FiTConfig:
        """"FiTv2-XL/2", "FiT-B/2" -> its config; options override fields (e.g. `num_classes=10`)."""
        match = re.fullmatch(r"(FiT(?:v2)?-\w+)/(\d+)", name)
        if not match or match[1] not in SIZES:
            raise ConfigError(f"unknown model name {name!r}: {suggest(name, [f'{size}/2' for size in SIZES])}")
        size, patch = SIZES[match[1]], int(match[2])
        first = {"mlp_hidden": 4 * size["width"], "modulation_rank": None, "qk_norm": False, "learn_sigma": True}
        kind: dict[str, Any] = {} if match[1].startswith("FiTv2") else first
        return FiTConfig(**{"patch_size": (patch, patch), **size, **kind, **options})

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> FiTConfig:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field and the nearest known one."""
        return from_mapping(FiTConfig, config, "FiT field")


class FullModulation(nn.Module):
    """adaLN with a matrix of its own for every block, kept as one (FiT). Zero at initialisation."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, (6 * depth + 2) * width)

    def forward(self, c: Tensor) -> Tensor:
        """Conditioning (B, D) -> rows (B, 6*depth + 2, D): 6 of every block, then shift and scale of the head."""
        return self.linear(F.silu(c)).view(len(c), -1, c.shape[1])

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class FiT(Backbone):
    """`forward(x (B, C, H, W), t (B,) network time, y (B,) labels)` -> (B, out_channels, H, W), at any size.

    Nothing is dropped inside: training objectives drop labels. Unlike the released class, the network never clamps t
    (which broke FiT's integer times).
    """

    family = "fit"
    any_size = True
    config: FiTConfig

    def __init__(self, config: FiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch: Size = config.patch_size
        self.extrapolation = "none"
        """How calls that name no extrapolation stretch positions; "none": as in training (`config.extrapolation`)."""
        self.checkpointing = False
        """Whether training recomputes every block in the backward pass instead of keeping its activations."""
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimestepEmbedder(config.width, 128)
        # Not drawn here: random numbers on the meta device cost a second of imports.
        table = torch.empty(config.label_rows, config.width)
        self.label_embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(
            [RotaryBlock(config.width, config.heads, config.mlp_hidden, config.qk_norm) for _ in range(config.depth)]
        )
        if config.modulation_rank is None:
            self.modulation: FullModulation | LowRankModulation = FullModulation(config.depth, config.width)
        else:
            self.modulation = LowRankModulation(config.depth, config.width, config.modulation_rank)
        self.head = nn.Linear(config.width, config.patch_size[0] * config.patch_size[1] * config.out_channels)
        if not self.head.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Official initialisation: Xavier linears, N(0, 0.02) embedders, zero modulation and head (output is 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embed.bias)
        for weight in (self.label_embed.weight, self.time_embed.fc1.weight, self.time_embed.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        self.modulation.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    # What it is ---------------------------------------------------------------------------------------------------

    @property
    def modulation_values(self) -> int:
        return (6 * self.config.depth + 2) * self.config.width

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def plain(self, patch: Size, merged: bool = True, extrapolation: str = "none") -> FiT:
        """A view whose calls use this extrapolation; it shares all weights."""
        self._check_patch(patch)
        view = copy.copy(self)
        view.extrapolation = extrapolation
        return view

    def _check_patch(self, patch: Size | None) -> None:
        if patch is not None and tuple(patch) != self.config.patch_size:
            raise ConfigError(f"this FiT has patch size {named(self.config.patch_size)} only, not {named(patch)}")

    @torch.no_grad()
    def in_dtype(self, dtype: torch.dtype) -> Self:
        with torch.device("meta"):
            other = type(self)(self.config)
        other.load_state_dict({k: v.to(dtype) for k, v in self.state_dict().items()}, assign=True)
        other.extrapolation = self.extrapolation
        return other.requires_grad_(False)

    def site_model(self, size: Size, tokens: bool = False) -> SiteModel:
        from pliant.models.flexible_sites import FlexibleSites

        if tokens:
            raise PlanError("token subsets, merging and kept keys do not work on a FiT")
        return FlexibleSites(self, size)

    def check_compute(self, compute: Compute) -> None:
        if compute.scale is not None:
            raise PlanError("a FiT has no scale: sample it at a smaller size instead")
        if compute.tokens is not None or "kv" in compute.write:
            raise PlanError("token subsets, merging and kept keys do not work on a FiT")
        if compute.has_increments:
            raise PlanError("increments do not work on a FiT; keep branches instead")

    def check_size(self, size: Size) -> None:
        if len(size) != 2:
            raise ShapeError(f"states of a FiT have 2 sides, {named(size)} has {len(size)}")
        patch = self.config.patch_size
        if any(n < 1 or n % p for n, p in zip(size, patch, strict=True)):
            nearest = tuple(max(1, round(n / p)) * p for n, p in zip(size, patch, strict=True))
            raise ShapeError(
                f"size {named(size)} is no multiple of the patch {named(patch)}; the nearest that is: {named(nearest)}"
            )

    def check_extrapolation(self, extrapolation: str) -> None:
        RopeScaling.named(extrapolation, self.config.train_length)

    def beyond(self, size: Size) -> str | None:
        tokens = math.prod(token_grid(patch_pair(size), self.config.patch_size))
        return f"images of at most {self.config.train_tokens} tokens" if tokens > self.config.train_tokens else None

    # What it computes -----------------------------------------------------------------------------------------------

    def scaling(self, extrapolation: str | None = None) -> RopeScaling:
        """How positions stretch: as asked, else as this view does, else as in training."""
        chosen = extrapolation or self.extrapolation
        return RopeScaling.named(self.config.extrapolation if chosen == "none" else chosen, self.config.train_length)

    def rope(self, size: Size, patch: Size, extrapolation: str | None, device: torch.device) -> Rope:
        """(cos, sin) of the tokens of a state of this size; patches count 0, 1, 2, ... along either side."""
        head = self.config.width // self.config.heads
        cos, sin = _rope(token_grid(patch_pair(size), patch_pair(patch)), head, self.scaling(extrapolation))
        return cos.to(device), sin.to(device)

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) network times and (B,) labels -> (B, 6*depth + 2, D), every scale already increased by 1."""
        rows: Tensor = self.modulation(self.time_embed(t) + self.label_embed(y))
        return rows + scale_rows(self.config.depth, rows)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, patch: Size | None = None, extrapolation: str | None = None
    ) -> Tensor:
        self._check_patch(patch)
        return self.forward_modulated(x, self.modulations(t, y), extrapolation)

    def forward_modulated(self, x: Tensor, modulations: Tensor, extrapolation: str | None = None) -> Tensor:
        """(B, C, H, W) and (B or 1, 6*depth + 2, D) -> (B, out_channels, H, W)."""
        tokens, size = self.embed(x), tuple(x.shape[2:])
        rope = self.rope(size, self.patch, extrapolation, x.device)
        for i, block in enumerate(self.blocks):
            rows = modulations[:, 6 * i : 6 * i + 6]
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, rows, rope, use_reentrant=False)
            else:
                tokens = block(tokens, rows, rope)
        return self.read(tokens, modulations, size)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the blocks' input (B, N, D). Raises ShapeError for states the network cannot read."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ShapeError(f"the model takes states of ({self.config.in_channels}, H, W), got {tuple(x.shape[1:])}")
        if 0 in x.shape:
            raise ShapeError(f"there is nothing in states of shape {tuple(x.shape)}")
        self.check_size(tuple(x.shape[2:]))
        return cast(Tensor, self.patch_embed(x))

    def read(self, tokens: Tensor, modulations: Tensor, size: Size) -> Tensor:
        """The blocks' output (B, N, D) and (B, 6*depth + 2, D) -> (B, out_channels, H, W)."""
        out = self.head(modulated_norm(tokens, modulations[:, -2], modulations[:, -1], EPS))
        patch = self.config.patch_size
        return unpatchify(out, token_grid(patch_pair(size), patch), patch)

    def forward_packed(
        self, xs: Sequence[Tensor], t: Tensor, y: Tensor, patch: Size | None = None, extrapolation: str | None = None
    ) -> list[Tensor]:
        """Groups of states of different sizes in one pass, nothing padded: xs[g] (B_g, C, *size_g) -> like xs.

        t, y: (sum of B_g,), group by group. Equal to one call per group up to rounding.
        """
        if not xs:
            raise ShapeError("a packed call needs at least one state")
        self._check_patch(patch)
        counts = [len(x) for x in xs]
        if sum(counts) != len(t) or len(t) != len(y):
            raise ShapeError(f"{sum(counts)} states need as many times and labels, got {len(t)} and {len(y)}")
        modulations = self.modulations(t, y).split(counts)
        tokens = [self.embed(x) for x in xs]
        ropes = [self.rope(tuple(x.shape[2:]), self.patch, extrapolation, x.device) for x in xs]
        for i, module in enumerate(self.blocks):
            block, rows = cast(RotaryBlock, module), [m[:, 6 * i : 6 * i + 6] for m in modulations]
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block.packed, tokens, rows, ropes, use_reentrant=False)
            else:
                tokens = block.packed(tokens, rows, ropes)
        return [self.read(tok, m, tuple(x.shape[2:])) for tok, m, x in zip(tokens, modulations, xs, strict=True)]

    def forward_tokens(self, batch: TokenBatch, t: Tensor, y: Tensor, extrapolation: str | None = None) -> Tensor:
        """Rows of tokens with padding, as the released code runs them; t, y: (I,), one per image.

        -> (B, L, patch area * out_channels), zero where there is padding; `batch.images` cuts it into images. Every
        image has the positions of its own size, also where several share a row.
        """
        images = len(batch.grids)
        if len(t) != images or len(y) != images:
            raise ShapeError(f"{images} images need as many times and labels, got {len(t)} and {len(y)}")
        weight = self.patch_embed.weight
        x = F.linear(batch.tokens.to(weight.dtype), weight.flatten(1), self.patch_embed.bias)
        head = self.config.width // self.config.heads
        cos, sin = rope_table(batch.positions, head, lengths=batch.lengths, scaling=self.scaling(extrapolation))
        rope, mask, modulations = (cos[:, None], sin[:, None]), batch.mask, self.modulations(t, y)
        for i, block in enumerate(self.blocks):
            x = block(x, self._rows(batch, modulations[:, 6 * i : 6 * i + 6]), rope, mask)
        shift, scale = self._rows(batch, modulations[:, -2:]).unbind(1)
        out = self.head(modulated_norm(x, shift, scale, EPS))
        return torch.where((batch.ids > 0)[..., None], out, 0.0)

    @staticmethod
    def _rows(batch: TokenBatch, rows: Tensor) -> Tensor:
        """(I, R, D) -> (B, R, D) where every row is one image, else one for each token: (B, R, L, D)."""
        return rows if batch.single else rows[batch.index].transpose(1, 2)


@lru_cache(maxsize=512)
def _rope(grid: tuple[int, int], head: int, scaling: RopeScaling) -> Rope:
    with torch.device("cpu"):
        positions = grid_positions(*(torch.arange(n, dtype=torch.float64) for n in grid))
        return rope_table(positions, head, lengths=(float(grid[0]), float(grid[1])), scaling=scaling)
