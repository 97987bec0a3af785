"""A DiT whose width depends on the time, and whose MLPs skip easy tokens (DyDiT, arXiv 2410.03456; sheet A, 5).

In every block a router that reads the time embedding switches attention heads on or off, another one groups of the
MLP's hidden features, and a third one reads each token and lets it pass the MLP by. Here the network is *masked*: it
computes everything and multiplies by zeros and ones, which is what training needs. For inference the masks of known
times are cut out of the weights: `pliant.adapters.width_slicing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ConfigError, suggest
from pliant.mappings import from_mapping, to_mapping
from pliant.models import kernels
from pliant.models.dit import DiT, DiTConfig
from pliant.models.layers import Block, linear, linear_gelu, modulated_norm, per_token

Route: TypeAlias = Literal["heads", "groups", "tokens"]
Base: TypeAlias = Literal["trained", "frozen"]


@dataclass(frozen=True)
class WidthSpec:
    """What `route_width` adds to a network. Frozen and serialisable."""

    routes: tuple[Route, ...] = ("heads", "groups", "tokens")
    """What is routed: "heads" and "groups" by time (the paper's TDW), "tokens" by content (its SDT)."""
    base: Base = "trained"
    """"trained": routers and network are fine-tuned together (the paper); "frozen": only the routers learn."""
    groups: int | None = None
    """Groups of hidden features of each MLP; None: as many as heads (the paper)."""
    time_bias: float = 15.0
    """First bias of the routers of heads and groups: everything is on."""
    token_bias: float = 35.0
    """First bias of the token routers."""
    temperature: float = 5.0
    """Of the sigmoid whose gradient training uses in place of the threshold's; it does not change a decision."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "routes", tuple(self.routes))
        for route in self.routes:
            if route not in get_args(Route):
                raise ConfigError(f"route {route!r} is unknown: {suggest(str(route), get_args(Route))}")
        if not self.routes or len(set(self.routes)) != len(self.routes):
            raise ConfigError(f"routes needs some of heads, groups and tokens, each once; got {list(self.routes)}")
        if self.base not in get_args(Base):
            raise ConfigError(f"base={self.base!r} is unknown: {suggest(str(self.base), get_args(Base))}")
        if not self.temperature > 0:
            raise ConfigError(f"the routers' temperature must be above 0, got {self.temperature}")

    def groups_of(self, config: DiTConfig) -> int:
        """Groups of hidden features in a network. Raises ConfigError if its MLPs do not divide into them."""
        groups, hidden = self.groups or config.heads, int(config.width * config.mlp_ratio)
        if groups < 1 or hidden % groups:
            raise ConfigError(f"{hidden} hidden features do not divide into {groups} groups; choose another `groups`")
        return groups

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> WidthSpec:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field and the nearest known one."""
        return from_mapping(WidthSpec, config, "width option")


@dataclass(frozen=True)
class Masks:
    """What is on, 1.0 or 0.0; in training with the gradient of a sigmoid."""

    heads: Tensor
    """(B, L, H)."""
    groups: Tensor
    """(B, L, G)."""
    tokens: Tensor
    """(B, L, N): which tokens go through each block's MLP."""

    def share(self, config: DiTConfig) -> Tensor:
        """(B,) multiply-adds of attention and MLP that are left, as a share of all (rho of sheet A, 5.2)."""
        n, width, hidden = self.tokens.shape[-1], config.width, int(config.width * config.mlp_ratio)
        attention, mlp = 4 * n * width**2 + 2 * n**2 * width, 2 * n * width * hidden
        left = self.groups.mean(-1) * self.tokens.mean(-1) * mlp + self.heads.mean(-1) * attention
        return left.mean(-1) / (attention + mlp)


@dataclass(frozen=True)
class RouterNoise:
    """Logistic noise (the difference of two Gumbels) on every routed logit; None where nothing is routed."""

    heads: Tensor | None
    """(B, L, H-1)."""
    groups: Tensor | None
    """(B, L, G-1)."""
    tokens: Tensor | None
    """(B, L, N)."""


def switch(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """Which logits are on, as 1.0 and 0.0, of any shape.

    Without noise: logits > 0. With it: logits + noise > 0, and the gradient of `sigmoid((logits + noise)/temperature)`
    (straight-through Gumbel-sigmoid, sheet A, 5.1).
    """
    if noise is None:
        return (logits > 0).to(logits.dtype)
    soft = torch.sigmoid((logits + noise) / temperature)
    # soft - soft is exactly 0: the values stay exactly 0 and 1.
    return (logits + noise > 0).to(logits.dtype) + (soft - soft.detach())


class TokenRouter(nn.Module):
    """One logit per token from its features after attention: is it worth the MLP?"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, router_hidden(width))
        self.fc2 = nn.Linear(router_hidden(width), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N)."""
        logits: Tensor = self.fc2(F.relu(self.fc1(x)))
        return logits.squeeze(-1)


def router_hidden(width: int) -> int:
    """Hidden features of a token router."""
    return max(1, width // 16)


class TimeRouter(nn.Module):
    """Logits of all but the first head (or group) of every block, from the time embedding. The first is always on."""

    def __init__(self, width: int, depth: int, parts: int, bias: float) -> None:
        super().__init__()
        self.depth = depth
        self.linear = nn.Linear(width, depth * (parts - 1))
        for rows in self.linear.weight.data.chunk(depth):  # as `depth` separate linears
            nn.init.xavier_uniform_(rows)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, t: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
        """(B, D) -> what is on, (B, L, parts)."""
        on = switch(self.linear(t).view(len(t), self.depth, -1), noise, temperature)
        return torch.cat([torch.ones_like(on[..., :1]), on], dim=-1)


class Routers(nn.Module):
    """Everything that routing adds to a DiT."""

    def __init__(self, config: DiTConfig, spec: WidthSpec) -> None:
        super().__init__()
        width, depth, groups = config.width, config.depth, spec.groups_of(config)
        heads = "heads" in spec.routes and config.heads > 1
        self.heads = TimeRouter(width, depth, config.heads, spec.time_bias) if heads else None
        hidden = "groups" in spec.routes and groups > 1
        self.groups = TimeRouter(width, depth, groups, spec.time_bias) if hidden else None
        self.tokens = nn.ModuleList()
        if "tokens" in spec.routes:
            for _ in range(depth):
                router = TokenRouter(width)
                for layer in (router.fc1, router.fc2):
                    nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(router.fc1.bias)
                nn.init.constant_(router.fc2.bias, spec.token_bias)
                self.tokens.append(router)


class DynamicDiT(nn.Module):
    """A DiT with routers. Build with `pliant.route_width`, or from a stored spec.

    As long as every router says "on", which is how they start, results are bit-identical to the base's.
    """

    def __init__(self, base: DiT, spec: WidthSpec) -> None:
        super().__init__()
        if base.config.block_heads is not None or base.config.block_hidden is not None:
            raise ConfigError("this network has been cut already; route the width of its original")
        self.base = base
        self.spec = spec
        self.config: DiTConfig = base.config
        self.groups = spec.groups_of(base.config)
        self.routers = Routers(base.config, spec).to(base.head.weight)
        if spec.base == "frozen":
            self.base.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As `DiT.forward`, with the routers' decisions."""
        return self.routed(x, t, y)[0]

    def routed(self, x: Tensor, t: Tensor, y: Tensor, noise: RouterNoise | None = None) -> tuple[Tensor, Masks]:
        """The output (B, out_channels, H, W) and the decisions it was made with.

        x (B, C, H, W), t (B,) network times, y (B,) labels; `noise` makes decisions random and differentiable.
        """
        modulations = self.base.modulations(t, y)
        heads, groups = self.time_masks(t, noise)
        tokens = self.base.embed(x)
        # Without noise nobody differentiates the decisions; a mask that keeps everything need not be applied.
        some_heads, some_groups = (
            [noise is not None or not bool(part.all()) for part in mask.unbind(1)] for mask in (heads, groups)
        )
        kept = []
        for i, module in enumerate(self.base.blocks):
            block = cast(Block, module)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulations[:, 6 * i : 6 * i + 6].unbind(1)
            h = modulated_norm(tokens, shift1, scale1, 1e-6)
            h = _attention(block, h, heads[:, i] if some_heads[i] else None)
            tokens = torch.addcmul(tokens, per_token(gate1), h)
            mask = self._token_mask(i, tokens, noise)
            h = modulated_norm(tokens, shift2, scale2, block.norm2_eps)
            h = _mlp(block, h, groups[:, i] if some_groups[i] else None)
            skips = noise is not None or not bool(mask.all())
            tokens = torch.addcmul(tokens, per_token(gate2) * mask[..., None] if skips else per_token(gate2), h)
            kept.append(mask)
        return self.base.read(tokens, modulations), Masks(heads, groups, torch.stack(kept, dim=1))

    def time_masks(self, t: Tensor, noise: RouterNoise | None = None) -> tuple[Tensor, Tensor]:
        """Heads (B, L, H) and groups (B, L, G) that are on at network times t (B,)."""
        embedded, routers, temperature = self.base.embed_time(t), self.routers, self.spec.temperature
        b, depth = len(t), self.config.depth
        heads, groups = embedded.new_ones(b, depth, self.config.heads), embedded.new_ones(b, depth, self.groups)
        if routers.heads is not None:
            heads = routers.heads(embedded, noise.heads if noise else None, temperature)
        if routers.groups is not None:
            groups = routers.groups(embedded, noise.groups if noise else None, temperature)
        return heads, groups

    def _token_mask(self, i: int, tokens: Tensor, noise: RouterNoise | None) -> Tensor:
        """(B, N): which tokens go through block i's MLP."""
        if not self.routers.tokens:
            return tokens.new_ones(tokens.shape[:2])
        random = noise.tokens[:, i] if noise is not None and noise.tokens is not None else None
        return switch(self.routers.tokens[i](tokens), random, self.spec.temperature)

    def noise_shapes(self) -> dict[str, tuple[int, int] | None]:
        """Shapes of one sample's `RouterNoise` fields."""
        depth, (rows, columns) = self.config.depth, self.config.grid()
        return {
            "heads": (depth, self.config.heads - 1) if self.routers.heads is not None else None,
            "groups": (depth, self.groups - 1) if self.routers.groups is not None else None,
            "tokens": (depth, rows * columns) if self.routers.tokens else None,
        }

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Only the routers' tensors; all that differs from the base as long as that is frozen."""
        if self.spec.base != "frozen":
            raise ConfigError("this model's own weights were trained with its routers; there is no adapter to save")
        return {f"routers.{k}": v for k, v in self.routers.state_dict().items()}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `adapter_state_dict`. Raises ConfigError naming tensors that are missing or do not belong."""
        expected = self.adapter_state_dict()
        wrong = sorted(set(expected) ^ set(state)) or [k for k in expected if expected[k].shape != state[k].shape]
        if wrong:
            raise ConfigError(f"these routers were made for another model: tensor {wrong[0]!r} does not match")
        self.routers.load_state_dict({k.removeprefix("routers."): v for k, v in state.items()})


def _attention(block: Block, x: Tensor, heads: Tensor | None) -> Tensor:
    """The block's attention of (B, N, D) with each sample's heads (B, H) multiplied by 0 or 1; None: all on."""
    if heads is None:
        out: Tensor = block.attention(x, lambda _: None, None)
        return out
    b, n, _ = x.shape
    q, k, v = linear(x, block.qkv, None).view(b, n, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = kernels.attention(q, k, v) * heads[:, :, None, None]
    return linear(mixed.transpose(1, 2).reshape(b, n, -1), block.proj, None)


def _mlp(block: Block, x: Tensor, groups: Tensor | None) -> Tensor:
    """The block's MLP of (B, N, D) with each sample's groups (B, G) of hidden features multiplied by 0 or 1."""
    if groups is None:
        return linear(linear_gelu(x, block.fc1, None), block.fc2, None)
    features = groups.repeat_interleave(block.fc1.out_features // groups.shape[1], dim=1)
    hidden = linear(x, block.fc1, None) * features[:, None]  # before GELU, which leaves a zero at zero
    return linear(kernels.gelu(hidden), block.fc2, None)


def token_shares(masks: Sequence[Masks]) -> tuple[float, ...]:
    """Mean share of the tokens that went through each block's MLP, over calls of equal size."""
    return tuple(torch.stack([m.tokens.float().mean((0, 2)) for m in masks]).mean(0).tolist())
