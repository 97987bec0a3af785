"""Learned token routing on a frozen DiT: at every site a small network says which tokens are worth its branch.

Infor-Coef's sampler (arXiv 2305.12458) as sheet E, section 7 maps it to image tokens: a token that is left out keeps
its residual stream and merely skips the branch; its keys and values are still seen. Here the network is *masked*, which
is what training needs; sampling gathers the chosen rows (`pliant.compute.routed`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.errors import ConfigError
from pliant.mappings import from_mapping, to_mapping
from pliant.models.dit import DiT, DiTConfig
from pliant.models.dit_tokens import DiTTokens

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class RouterSpec:
    """What `route_tokens` adds to a network. Frozen and serialisable."""

    hidden: int | None = None
    """Hidden features of each router; None: a quarter of the width (the paper: all of it)."""
    bias: float = 5.0
    """First logits are (-bias, bias): everything is kept."""

    def __post_init__(self) -> None:
        if self.hidden is not None and (not isinstance(self.hidden, int) or self.hidden < 1):
            raise ConfigError(f"routers have {self.hidden!r} hidden features; expected a whole number >= 1")

    def features(self, config: DiTConfig) -> int:
        """Hidden features of each router of a network."""
        return self.hidden or max(1, config.width // 4)

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> RouterSpec:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field."""
        return from_mapping(RouterSpec, config, "option of token routers")


class SiteRouter(nn.Module):
    """LayerNorm, Linear, LayerNorm, GELU, Linear to two logits, of which the second says keep.

    It reads a site's normalised, modulated input and, as what the site knows of time and label, its adaLN gate. (The
    paper's classifier has no time to read; the gate says how much the branch will count.)
    """

    def __init__(self, width: int, hidden: int, bias: float) -> None:
        super().__init__()
        self.norm1, self.fc1 = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.condition = nn.Linear(width, hidden, bias=False)
        self.norm2, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, 2)
        nn.init.zeros_(self.condition.weight)
        nn.init.normal_(self.fc2.weight, std=0.02)
        self.fc2.bias.data.copy_(torch.tensor([-bias, bias]))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x (B, N, D), gate (B or 1, D) -> logits (B, N, 2): drop, keep."""
        kind = self.fc1.weight.dtype
        hidden = self.fc1(self.norm1(x.to(kind))) + self.condition(gate.to(kind))[:, None]
        logits: Tensor = self.fc2(F.gelu(self.norm2(hidden)))
        return logits


def straight_through(logits: Tensor, noise: Tensor | None) -> Tensor:
    """(..., 2) logits -> keep (...), exactly 0 or 1; with Gumbel noise (..., 2) random, and with softmax's gradient.

    Without noise it is the larger logit: decisions outside training are not drawn.
    """
    if noise is None:
        return (logits[..., 1] >= logits[..., 0]).to(logits.dtype)
    soft = torch.softmax(logits + noise, dim=-1)[..., 1]
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


@dataclass(frozen=True)
class Routed:
    """What the routers decided in a masked pass over M sites."""

    keep: Tensor
    """(B, M, N): 0 or 1, with gradient in training."""
    probability: Tensor
    """(B, M, N): of keeping."""
    size: Tensor
    """(B, M, N): root mean square of each token before the site, zero where it is left out."""


class TokenRoutedDiT(nn.Module):
    """A frozen network and its token routers. Called plainly it is the network itself, to the bit.

    Build with `pliant.adapters.token_router.route_tokens`, or from a stored spec.
    """

    def __init__(self, base: DiT | FlexiDiT, spec: RouterSpec) -> None:
        """`base` is shared and frozen. Raises ConfigError for a base of recipe "shared" or with cut blocks."""
        super().__init__()
        if isinstance(base, FlexiDiT) and base.spec.recipe != "lora":
            raise ConfigError("token routers need a network with blocks of its own, not one of recipe 'shared'")
        self.base, self.spec = base, spec
        self.config: DiTConfig = base.config
        features = spec.features(self.config)
        self.routers = nn.ModuleList(
            SiteRouter(self.config.width, features, spec.bias) for _ in range(2 * self.config.depth)
        )
        self.base.requires_grad_(False)

    @property
    def plain(self) -> DiT:
        """The DiT at the original patch size, which is what is routed."""
        return self.base.base if isinstance(self.base, FlexiDiT) else self.base

    def forward(self, x: Tensor, t: Tensor, y: Tensor, patch: tuple[int, int] | None = None) -> Tensor:
        """All tokens everywhere, as the base."""
        out: Tensor = self.base(x, t, y, patch) if isinstance(self.base, FlexiDiT) else self.base(x, t, y)
        return out

    def routed(
        self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None, ratio: float | None = None
    ) -> tuple[Tensor, Routed]:
        """The masked output (B, out_channels, H, W) and the decisions.

        noise (B, M, N, 2): Gumbel, makes decisions random and differentiable. ratio: keep that share of the tokens of
        every site, those of largest keep logit, as sampling does.
        """
        sites = DiTTokens(self.plain)
        state, context = sites.begin(x, self.plain.modulations(t, y))
        keeps, probabilities, sizes = [], [], []
        for s, router in enumerate(self.routers):
            seen = sites.norm(s, state, context)
            logits = router(seen[0], context[:, 3 * s + 2])
            if ratio is None:
                keep = straight_through(logits, None if noise is None else noise[:, s])
            else:
                count = max(1, round(ratio * logits.shape[1]))
                top = (logits[..., 1] - logits[..., 0]).topk(count, dim=1).indices
                keep = torch.zeros_like(logits[..., 0]).scatter(1, top, 1.0)
            keeps.append(keep)
            probabilities.append(torch.softmax(logits, -1)[..., 1])
            sizes.append(keep * state[0].square().mean(-1).sqrt())
            (branch,) = sites.inner(s, seen, context)
            assert branch is not None
            state = sites.add(s, state, (keep[..., None].to(branch.dtype) * branch,), context)
        found = Routed(torch.stack(keeps, 1), torch.stack(probabilities, 1), torch.stack(sizes, 1))
        return sites.head(state, context), found

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Only the routers' tensors: small enough to share on their own."""
        return {f"routers.{name}": tensor for name, tensor in self.routers.state_dict().items()}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `adapter_state_dict`. Raises ConfigError naming tensors that are missing or do not belong."""
        expected = self.adapter_state_dict()
        wrong = sorted(set(expected) ^ set(state)) or [k for k in expected if expected[k].shape != state[k].shape]
        if wrong:
            raise ConfigError(f"these routers were made for another model: tensor {wrong[0]!r} does not match")
        self.routers.load_state_dict({k.removeprefix("routers."): v for k, v in state.items()})


def route_tokens(denoiser: Denoiser, *, seed: int = 0, **options: Any) -> Denoiser:
    """A denoiser whose sites can leave out tokens (`Compute(tokens=Subset(0.5, "router"))`); the given one stays.

    options: the fields of `RouterSpec`. Results without routing stay bit-identical, before and after training. Raises
    ConfigError for a model that has exits or routers already, or impossible options.
    """
    network: Any = denoiser.network
    if not isinstance(network, DiT | FlexiDiT):
        raise ConfigError("token routers go on a plain or flexible network, not one with exits or routers")
    try:
        spec = RouterSpec(**options)
    except TypeError as error:
        raise ConfigError(f"route_tokens: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        routed = TokenRoutedDiT(copy.deepcopy(network), spec)
    return replace(denoiser, network=routed.train(network.training), forward=None)
