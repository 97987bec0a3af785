"""What determines the native backbone (`pliant.models.flexible`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pliant.compute import TransformerShape
from pliant.errors import ConfigError
from pliant.mappings import from_mapping, to_mapping
from pliant.models.network import Size
from pliant.models.patches import grid_of, patch_name
from pliant.models.rope import axis_widths


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

    flow_map: bool = False
    """Also told where a step lands, so that one call predicts a whole jump: network times are pairs (B, 2)."""

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
            time_embedders=2 if self.flow_map else 1,
        )

    def to_dict(self) -> dict[str, Any]:
        # Networks that jump nowhere do not mention it, so that identities made before there were flow maps stay.
        return to_mapping(self, silent={"flow_map": False})

    @staticmethod
    def from_dict(config: dict[str, Any]) -> FlexibleConfig:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field and the nearest known one."""
        return from_mapping(FlexibleConfig, config, "field of a flexible network")
