"""Training a network whose width is routed (DyDiT, arXiv 2410.03456; sheet A, 5.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.adapters.width import DynamicDiT, Masks, RouterNoise
from pliant.errors import ConfigError
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss
from pliant.training.objectives.ddpm import DDPM
from pliant.training.objectives.flow_matching import FlowMatching

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class FlopsTarget:
    """What share of the blocks' multiply-adds training aims at, step by step."""

    share: float
    """lambda: of all attention and MLP work, in (0, 1]."""
    hold: int = 100
    """First steps that aim at everything."""
    warmup: int = 1000
    """From here on the aim is `share`; between `hold` and here it falls linearly as if it had from step 0."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"the FLOPs target is a share in (0, 1], got {self.share}")
        if not 0 <= self.hold <= self.warmup:
            raise ConfigError(f"the FLOPs target needs 0 <= hold <= warmup, got {self.hold} and {self.warmup}")

    def at(self, step: int) -> float:
        """The aim at an optimizer step."""
        if step < self.hold:
            return 1.0
        return 1.0 - (1.0 - self.share) * step / self.warmup if step < self.warmup else self.share

    def loss(self, shares: Tensor, step: int) -> Tensor:
        """`(mean over the batch - aim)^2` of the shares (B,): samples may differ as long as their mean fits."""
        return (shares.mean() - self.at(step)).square()


@dataclass(frozen=True)
class DynamicWidth:
    """The model's own loss with randomly routed width, plus `weight` times the FLOPs loss.

    In the first `complete_steps` steps (stage 1) the loss of the complete network, nothing switched off, on the same
    noised batch is added. One trained model serves one target. The official script skips updates of large gradients;
    here the trainer clips them.
    """

    own: FlowMatching | DDPM
    target: FlopsTarget
    weight: float = 2.0
    complete_steps: int = 30_000

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        network = _dynamic(denoiser)
        noise = router_noise(network, draws)
        again = copy.copy(draws)  # the complete network sees the same times, noise and labels
        made: list[Masks] = []

        def routed(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out, masks = network.routed(x, t, y, noise)
            made.append(masks)
            return out

        own = self.own(denoiser.through(routed), batch, draws)
        shares = made[0].share(network.config).float()
        flops = self.target.loss(shares, draws.step)
        loss = own.loss + self.weight * flops
        logs = {"own": own.loss.detach(), "share": shares.mean().detach(), "flops": flops.detach()}
        if draws.step < self.complete_steps:
            complete = self.own(denoiser.through(network.base.forward), batch, again).loss
            loss = loss + complete
            logs["complete"] = complete.detach()
        return Loss(loss, logs)

    def check(self, denoiser: Denoiser) -> None:
        least = _least_share(_dynamic(denoiser))
        if self.target.share < least:
            raise ConfigError(
                f"target {self.target.share} is out of reach: one head and one group per block always run, "
                f"{least:.3f} of the work; ask for more, or route tokens too"
            )
        self.own.check(denoiser)

    def flops(self, denoiser: Denoiser) -> float:
        """Of stage 2; in training masked width is computed in full."""
        return self.own.flops(denoiser)


def router_noise(network: DynamicDiT, draws: Draws) -> RouterNoise:
    """Logistic noise for a batch's routers, the difference of two Gumbel variables."""

    def logistic(shape: Sequence[int] | None) -> Tensor | None:
        if shape is None:
            return None
        uniform = draws.each(lambda n, generator: torch.rand(n, *shape, generator=generator))
        return torch.logit(uniform, eps=1e-7)

    return RouterNoise(**{name: logistic(shape) for name, shape in network.noise_shapes().items()})


def _least_share(network: DynamicDiT) -> float:
    """The share of work when the routers switch off everything they can."""
    config, routers = network.config, network.routers
    rows, columns = config.grid()
    heads, groups = torch.ones(1, config.depth, config.heads), torch.ones(1, config.depth, network.groups)
    tokens = torch.ones(1, config.depth, rows * columns)
    if routers.heads is not None:
        heads[..., 1:] = 0
    if routers.groups is not None:
        groups[..., 1:] = 0
    if routers.tokens:
        tokens[:] = 0
    return float(Masks(heads, groups, tokens).share(config))


def _dynamic(denoiser: Denoiser) -> DynamicDiT:
    network = denoiser.network
    if not isinstance(network, DynamicDiT):
        raise ConfigError("objective 'dydit' needs a network with routers: add `model.width: {}` to the config")
    return network
