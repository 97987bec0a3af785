"""GET, the generative equilibrium transformer (Geng, Pokle, Kolter, NeurIPS 2023): noise in, image out, one call.

An injection transformer reads the noise once; a few weight-tied blocks, fed by it, are then iterated towards their
fixed point. More iterations cost more and change less. There is no time and no adaLN: the class is an additive bias of
the queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from pliant.compute import TransformerShape
from pliant.errors import ConfigError, suggest
from pliant.mappings import from_mapping, to_mapping
from pliant.models import kernels
from pliant.models.layers import linear, linear_gelu
from pliant.models.network import Backbone, Size
from pliant.models.patches import patch_pair, patchify, token_grid, unpatchify
from pliant.models.positions import patch_positions

SIZES: dict[str, dict[str, int]] = {
    "T": {"width": 256, "injection_depth": 6, "heads": 4, "equilibrium_ratio": 6},
    "M": {"width": 384, "injection_depth": 6, "heads": 6, "equilibrium_ratio": 6},
    "S": {"width": 512, "injection_depth": 6, "heads": 8, "equilibrium_ratio": 8},
    "B": {"width": 768, "injection_depth": 1, "heads": 12, "equilibrium_ratio": 12},
    "B+": {"width": 768, "injection_depth": 6, "heads": 12, "equilibrium_ratio": 8},
}
"""The published sizes, for 32x32 images at patch size 2."""


@dataclass(frozen=True)
class EquilibriumConfig:
    """Everything that determines a GET's shape and arithmetic."""

    input_size: tuple[int, int] = (32, 32)
    patch_size: tuple[int, int] = (2, 2)
    in_channels: int = 3
    width: int = 256
    heads: int = 4
    injection_depth: int = 6
    equilibrium_depth: int = 3
    equilibrium_ratio: int = 6
    """Hidden features of an equilibrium block's MLP, in widths; the injection's have 4."""
    iterations: int = 6
    """How often the equilibrium blocks run."""
    num_classes: int = 1000

    learn_sigma = False
    flow_map = False
    class_dropout = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", patch_pair(self.input_size))
        object.__setattr__(self, "patch_size", patch_pair(self.patch_size))
        if self.width % self.heads or self.width % 4:
            raise ConfigError(f"width {self.width} must be divisible by 4 and by the number of heads ({self.heads})")
        numbers = ("in_channels", "equilibrium_depth", "equilibrium_ratio", "iterations", "num_classes")
        if min(getattr(self, name) for name in numbers) < 1 or self.injection_depth < 0:
            raise ConfigError(f"{', '.join(numbers)} must be at least 1, injection_depth at least 0")
        token_grid(self.input_size, self.patch_size)

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def depth(self) -> int:
        """Blocks that run in one call."""
        return self.injection_depth + self.equilibrium_depth * self.iterations

    def shape(self, size: Size | None = None, patch: Size | None = None) -> TransformerShape:
        """A call's shape for the cost model; it has one size and one patch size."""
        equilibrium = self.equilibrium_depth * self.iterations
        return TransformerShape(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            patch=self.patch_size,
            tokens=math.prod(token_grid(self.input_size, self.patch_size)),
            mlp_ratio=max(4, self.equilibrium_ratio),
            block_hidden=(4 * self.width,) * self.injection_depth
            + (self.equilibrium_ratio * self.width,) * equilibrium,
            modulated=False,
            injections=self.equilibrium_depth,
            classes=3 * self.num_classes,
        )

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> EquilibriumConfig:
        """Inverse of `to_dict`; `name: T` fills in a published size. Raises ConfigError naming an unknown field."""
        values = dict(config)
        name = values.pop("name", None)
        if name is not None and name not in SIZES:
            raise ConfigError(f"unknown size {name!r} of an equilibrium transformer: {suggest(str(name), SIZES)}")
        base = SIZES.get(name or "", {})
        return from_mapping(EquilibriumConfig, {**base, **values}, "field of an equilibrium transformer")


class InjectedBlock(nn.Module):
    """Pre-norm attention and MLP; what is injected is a bias of queries, keys and values."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, injected: Tensor) -> Tensor:
        """x (B, N, D), injected (B, N or 1, 3D) -> (B, N, D)."""
        b, n, d = x.shape
        qkv = linear(self.norm1(x), self.qkv, None) + injected
        q, k, v = qkv.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = kernels.attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + linear(attended, self.proj, None)
        return x + linear(linear_gelu(self.norm2(x), self.fc1, None), self.fc2, None)


class EquilibriumTransformer(Backbone):
    """`forward(z (B, C, H, W), t, y (B,))` -> images (B, C, H, W). The time is not looked at."""

    family = "equilibrium"
    config: EquilibriumConfig
    positions: Tensor
    start: Tensor

    def __init__(self, config: EquilibriumConfig) -> None:
        super().__init__()
        self.config = config
        d, (ph, pw) = config.width, config.patch_size
        self.embed = nn.Linear(config.in_channels * ph * pw, d)
        self.class_bias = nn.Embedding(config.num_classes, 3 * d)
        self.injection = nn.ModuleList(InjectedBlock(d, config.heads, 4 * d) for _ in range(config.injection_depth))
        self.inject = nn.Linear(d, 3 * d * config.equilibrium_depth, bias=False)
        self.equilibrium = nn.ModuleList(
            InjectedBlock(d, config.heads, config.equilibrium_ratio * d) for _ in range(config.equilibrium_depth)
        )
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, config.in_channels * ph * pw)
        grid = token_grid(config.input_size, config.patch_size)
        meta = self.head.weight.is_meta
        shape = (math.prod(grid), d)
        places = torch.empty(shape) if meta else patch_positions(grid, config.patch_size, config.patch_size, d)
        # The paper starts the iteration from fresh noise; one fixed draw makes an image a function of its seed alone.
        start = torch.empty(shape) if meta else torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("positions", places, persistent=False)
        self.register_buffer("start", start, persistent=False)
        if not meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier linears, N(0, 0.02) class biases, a zero head: the first output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_bias.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def iterates(self, z: Tensor, bias: Tensor) -> Iterator[Tensor]:
        """The equilibrium blocks' states (B, N, D) after every iteration, without end. bias: (B, 1, 3D)."""
        h = self.embed(patchify(z.to(self.dtype), self.config.patch_size)) + self.positions.to(self.dtype)
        for block in self.injection:
            h = block(h, bias)
        injected = [u + bias for u in self.inject(h).chunk(self.config.equilibrium_depth, dim=-1)]
        state = self.start.to(self.dtype).expand(len(z), -1, -1)
        while True:
            for block, u in zip(self.equilibrium, injected, strict=True):
                state = block(state, u)
            yield state

    def read(self, state: Tensor) -> Tensor:
        """(B, N, D) -> images (B, C, H, W)."""
        grid = token_grid(self.config.input_size, self.config.patch_size)
        return unpatchify(self.head(self.norm(state)), grid, self.config.patch_size)

    def outputs(self, z: Tensor, y: Tensor) -> list[Tensor]:
        """The images that every iteration says, (B, C, H, W) each: what training looks at."""
        found = zip(range(self.config.iterations), self.iterates(z, self._bias(self.modulations(y, y))), strict=False)
        return [self.read(state) for _, state in found]

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward_modulated(z, self.modulations(t, y))

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) labels -> the class's bias, (B, 3, D)."""
        rows: Tensor = self.class_bias(y)
        return rows.view(len(y), 3, -1)

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        self.check_size(tuple(x.shape[2:]))
        found = zip(range(self.config.iterations), self.iterates(x, self._bias(modulations)), strict=False)
        *_, (_, state) = found
        return self.read(state)

    @staticmethod
    def _bias(modulations: Tensor) -> Tensor:
        return modulations.reshape(len(modulations), 1, -1)

    def with_iterations(self, iterations: int) -> Self:
        """A network that shares these weights and iterates another number of times."""
        with torch.device("meta"):
            other = type(self)(replace(self.config, iterations=iterations))
        other.load_state_dict(self.state_dict(), assign=True)
        other.positions, other.start = self.positions, self.start
        return other.train(self.training)

    @property
    def modulation_values(self) -> int:
        return 3 * self.config.width

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def in_dtype(self, dtype: torch.dtype) -> Self:
        with torch.device("meta"):
            other = type(self)(self.config)
        other.load_state_dict({k: v.to(dtype) for k, v in self.state_dict().items()}, assign=True)
        other.positions, other.start = self.positions, self.start
        return other.requires_grad_(False)
