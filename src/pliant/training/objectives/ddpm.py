"""DDPM's noise regression, with learned variance if the network has it: DiT's loss (sheet A, 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import VPDiscrete, like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


class PosteriorTable(NamedTuple):
    """Per timestep k = 0..T-1, float64: the law of x_{k-1} given x_k and x0 (arXiv 2006.11239, eqs. 6-7)."""

    x0_coefficient: Tensor
    x_coefficient: Tensor
    log_variance: Tensor  # clipped: entry 0 repeats entry 1, its true value is log 0
    log_beta: Tensor
    alpha_bar: Tensor


@lru_cache(maxsize=8)
def posterior_table(path: VPDiscrete) -> PosteriorTable:
    """The table of a discrete path."""
    alpha_bar = path.alphas_cumprod
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1.0 - alpha_bar / previous
    variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    return PosteriorTable(
        x0_coefficient=beta * previous.sqrt() / (1.0 - alpha_bar),
        x_coefficient=(1.0 - previous) * (1.0 - beta).sqrt() / (1.0 - alpha_bar),
        log_variance=torch.log(torch.cat([variance[1:2], variance[1:]])),
        log_beta=torch.log(beta),
        alpha_bar=alpha_bar,
    )


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, element-wise."""
    ratio = log_var1 - log_var2
    return 0.5 * (torch.exp(ratio) - 1.0 - ratio + (mean1 - mean2).square() * torch.exp(-log_var2))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log P(pixel) in nats when 256 levels in [-1, 1] are bins of a Gaussian; the outer bins are open.

    Exact normal CDF (the official code uses a tanh approximation of it, off by less than 1e-3).
    """
    inverse = torch.exp(-log_std)
    upper, lower = (x - mean + 1.0 / 255.0) * inverse, (x - mean - 1.0 / 255.0) * inverse
    inside = torch.log((torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12))
    log_p = torch.where(
        x < -0.999,
        torch.special.log_ndtr(upper),
        torch.where(x > 0.999, torch.special.log_ndtr(-lower), inside),
    )
    return -log_p.clamp(min=math.log(1e-12))


def variational_bound(x0: Tensor, x: Tensor, k: Tensor, eps: Tensor, code: Tensor, path: VPDiscrete) -> Tensor:
    """(B,) terms of the variational bound in bits per dimension (arXiv 2102.09672, section 3.1).

    k: (B,) integer timesteps; eps, code: the network's noise and variance code u, with
    `log sigma^2 = f log beta + (1-f) log posterior variance`, f = (u+1)/2, not clamped.
    """
    table = posterior_table(path)

    def entry(values: Tensor) -> Tensor:
        return like(values.to(k.device)[k], x)

    fraction = (code + 1.0) / 2.0
    log_var = fraction * entry(table.log_beta) + (1.0 - fraction) * entry(table.log_variance)
    inverse_alpha = entry(table.alpha_bar.rsqrt())
    x0_guess = inverse_alpha * x - entry((1.0 / table.alpha_bar - 1.0).sqrt()) * eps
    mean = entry(table.x0_coefficient) * x0_guess + entry(table.x_coefficient) * x
    true_mean = entry(table.x0_coefficient) * x0 + entry(table.x_coefficient) * x
    kl = gaussian_kl(true_mean, entry(table.log_variance).expand_as(mean), mean, log_var)
    nll = discretized_gaussian_nll(x0, mean, 0.5 * log_var)
    nats = torch.where(like(k == 0, x).bool(), nll, kl)
    return nats.flatten(1).mean(1) / math.log(2.0)


@dataclass(frozen=True)
class DDPM:
    """MSE on the noise; with a variance code also the variational bound, its mean detached.

    Timesteps uniform over the table's integers; no weights (official DiT: plain "MSE" loss type).
    """

    class_dropout: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws, compute: Compute | None = None) -> Loss:
        path = denoiser.path
        if not isinstance(path, VPDiscrete):
            raise ConfigError(f"ddpm trains on the path 'vp-discrete', not {path.name!r}; use flow_matching")
        k = draws.integers(path.num_timesteps)
        noise = draws.normal(batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        t = path.time_of_timestep(k)
        x = path.mix(batch.images, noise, t)
        prediction = denoiser(x, t, labels, compute or Compute())
        eps = prediction.to("epsilon").float()
        mse = (eps - noise).square().mean()
        if prediction.variance is None:
            return Loss(mse)
        bound = variational_bound(batch.images, x, k, eps.detach(), prediction.variance.float(), path).mean()
        return Loss(mse + bound, {"mse": mse.detach(), "vlb_bits": bound.detach()})

    def check(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser.path, VPDiscrete):
            raise ConfigError(
                f"objective 'ddpm' needs path 'vp-discrete', this model has {denoiser.path.name!r}; use 'flow_matching'"
            )
        if denoiser.prediction != "epsilon":
            raise ConfigError(f"objective 'ddpm' needs prediction 'epsilon', this model has {denoiser.prediction!r}")

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops(Compute())
