"""Token routers learn which tokens every site can leave out (Infor-Coef, arXiv 2305.12458; sheet E, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pliant.adapters.token_router import TokenRoutedDiT
from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import TimeDensity, VPDiscrete
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.flow_matching import _uniform

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class TokenDistillation:
    """`E ||F_m - F||^2 + norm * mean size + entropy * mean(p ln p + (1-p) ln(1-p)) + budget * (mean m - keep)^2`.

    F is the network's output with all tokens, F_m with the mask m that the routers draw; size is the root mean square
    of a kept token before its site, p the probability of keeping; means are over samples, sites and tokens, so that no
    weight depends on the batch. (The paper's norm is of the whole batch.) Minimising negative entropy keeps decisions
    undecided, which explores.
    """

    keep: float | None = None
    """None: no budget."""
    budget: float = 1.0
    norm: float = 4e-4
    entropy: float = 5e-4
    time: TimeDensity | None = None
    """None: uniform, over the table's entries when the path is a table."""
    class_dropout: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        network, path = _routed(denoiser), denoiser.path
        if self.time is None and isinstance(path, VPDiscrete):
            t = path.time_of_timestep(draws.integers(path.num_timesteps))
        else:
            t = draws.each((self.time or _uniform()).sample)
        noise = draws.noise(path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = path.mix(batch.images, noise, t)
        a = denoiser.align(Compute(), t)
        fed = x if a is None else a.input_scale.to(x).view(-1, 1, 1, 1) * x
        steps = denoiser.encode(t if a is None else a.time).float().expand(len(x))
        rows, columns = network.config.grid()
        shape = len(network.routers), rows * columns, 2
        uniform = draws.each(lambda n, generator: torch.rand(n, *shape, generator=generator))
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
        with torch.no_grad():
            teacher = network.plain(fed, steps, labels).float()
        out, found = network.routed(fed, steps, labels, gumbel)
        gap = (out.float() - teacher).square().mean()
        p = found.probability.float().clamp(1e-6, 1 - 1e-6)
        order = (p * p.log() + (1 - p) * (1 - p).log()).mean()
        size, share = found.size.float().mean(), found.keep.float().mean()
        loss = gap + self.norm * size + self.entropy * order
        logs = {"gap": gap.detach(), "keep": share.detach(), "size": size.detach(), "entropy": -order.detach()}
        if self.keep is not None:
            budget = (share - self.keep).square()
            loss, logs["budget"] = loss + self.budget * budget, budget.detach()
        return Loss(loss, logs)

    def check(self, denoiser: Denoiser) -> None:
        _routed(denoiser)

    def flops(self, denoiser: Denoiser) -> float:
        """The teacher forwards, the masked network forwards and back to its inputs."""
        return 3.0 * denoiser.flops()


def _routed(denoiser: Denoiser) -> TokenRoutedDiT:
    network = denoiser.network
    if not isinstance(network, TokenRoutedDiT):
        raise ConfigError("objective 'token-routers' needs a model with routers; add `routers: {}` to `model`")
    return network
