"""DiT's loss against an independent implementation: plain numpy, one sample at a time, scipy's normal law."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import VPDiscrete
from pliant.training.draws import Draws
from pliant.training.objectives import DDPM, Batch
from pliant.training.objectives.ddpm import posterior_table, variational_bound
from support.training import formula_denoiser

BETAS = np.linspace(1e-4, 2e-2, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)


def reference_bound(x0: np.ndarray, x: np.ndarray, k: int, eps: np.ndarray, code: np.ndarray) -> float:
    """Bits per dimension of one term of the bound, straight from DDPM's and Improved DDPM's formulas."""
    before = ALPHA_BAR[k - 1] if k > 0 else 1.0
    posterior = BETAS[k] * (1 - before) / (1 - ALPHA_BAR[k])
    first = BETAS[1] * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1])
    log_posterior = math.log(posterior if k > 0 else first)
    f = (code + 1) / 2
    log_var = f * math.log(BETAS[k]) + (1 - f) * log_posterior
    guess = (x - math.sqrt(1 - ALPHA_BAR[k]) * eps) / math.sqrt(ALPHA_BAR[k])

    def mean(clean: np.ndarray) -> np.ndarray:
        a = math.sqrt(before) * BETAS[k] / (1 - ALPHA_BAR[k])
        b = math.sqrt(1 - BETAS[k]) * (1 - before) / (1 - ALPHA_BAR[k])
        return a * clean + b * x

    if k > 0:
        gap = (mean(x0) - mean(guess)) ** 2
        nats = 0.5 * (log_var - log_posterior + (math.exp(log_posterior) + gap) / np.exp(log_var) - 1)
    else:
        law = norm(mean(guess), np.exp(0.5 * log_var))
        upper = np.where(x0 > 0.999, 1.0, law.cdf(x0 + 1 / 255))
        lower = np.where(x0 < -0.999, 0.0, law.cdf(x0 - 1 / 255))
        nats = -np.log(np.maximum(upper - lower, 1e-12))
    return float(nats.mean() / math.log(2))


@pytest.mark.parametrize("k", [0, 1, 2, 50, 500, 999])
def test_bound_equals_the_reference(k: int) -> None:
    rng = np.random.default_rng(k)
    x0 = np.clip(rng.normal(size=(1, 4, 4)), -1, 1)
    noise = rng.normal(size=x0.shape)
    x = math.sqrt(ALPHA_BAR[k]) * x0 + math.sqrt(1 - ALPHA_BAR[k]) * noise
    eps, code = noise + 0.1 * rng.normal(size=x0.shape), rng.uniform(-1.2, 1.2, size=x0.shape)
    tensors = [torch.from_numpy(a)[None] for a in (x0, x, eps, code)]
    bound = variational_bound(tensors[0], tensors[1], torch.tensor([k]), tensors[2], tensors[3], VPDiscrete())
    assert float(bound) == pytest.approx(reference_bound(x0, x, k, eps, code), rel=1e-6, abs=1e-9)


def test_perfect_prediction_costs_nothing_above_step_0() -> None:
    x0, noise, k = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double(), torch.tensor([1, 300, 999])
    x = VPDiscrete().mix(x0, noise, VPDiscrete().time_of_timestep(k))
    bound = variational_bound(x0, x, k, noise, torch.full_like(x0, -1.0), VPDiscrete())
    assert float(bound.abs().max()) < 1e-9


def test_table_edges() -> None:
    table = posterior_table(VPDiscrete())
    assert float(table.alpha_bar[0]) == pytest.approx(0.9999, abs=1e-12)
    assert float(table.alpha_bar[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert torch.equal(table.log_variance[0], table.log_variance[1])
    assert float(table.x0_coefficient[0]) == pytest.approx(1.0)
    assert float(table.x_coefficient[0]) == 0.0


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([0.9 * x, 0.5 * torch.sin(x)], dim=1)


def test_loss_is_mse_plus_bound_over_uniform_integers() -> None:
    """Recomputed from what the network saw."""
    seen: dict[str, Any] = {}

    def spy(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.update(x=x, t=t)
        return network(x, t, y)

    denoiser = formula_denoiser(spy, "vp-discrete", "epsilon", learn_sigma=True)
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = DDPM()(denoiser, Batch(images, torch.zeros(64, dtype=torch.int64)), Draws.single(64))
    k = (seen["t"] * 1000 - 1).round().long().numpy()
    assert k.min() >= 0
    assert k.max() <= 999
    x, x0 = seen["x"].double().numpy(), images.double().numpy()
    noise = [(x[i] - math.sqrt(ALPHA_BAR[k[i]]) * x0[i]) / math.sqrt(1 - ALPHA_BAR[k[i]]) for i in range(64)]
    mse = np.mean([(0.9 * x[i] - noise[i]) ** 2 for i in range(64)])
    bound = np.mean([reference_bound(x0[i], x[i], int(k[i]), 0.9 * x[i], 0.5 * np.sin(x[i])) for i in range(64)])
    assert float(result.logs["mse"]) == pytest.approx(mse, rel=1e-4)
    assert float(result.logs["vlb_bits"]) == pytest.approx(bound, rel=1e-4)
    assert float(result.loss) == pytest.approx(mse + bound, rel=1e-4)


def test_bound_does_not_train_the_mean() -> None:
    scale = torch.tensor(0.9, requires_grad=True)
    code = torch.tensor(0.5, requires_grad=True)
    denoiser = formula_denoiser(
        lambda x, t, y: torch.cat([scale * x, code * x], dim=1), "vp-discrete", "epsilon", learn_sigma=True
    )
    batch = Batch(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    result = DDPM()(denoiser, batch, Draws.single(4))
    (total,) = torch.autograd.grad(result.loss, scale, retain_graph=True)
    plain = formula_denoiser(lambda x, t, y: scale * x, "vp-discrete", "epsilon")
    (mse_only,) = torch.autograd.grad(DDPM()(plain, batch, Draws.single(4)).loss, scale)
    assert float(total) == pytest.approx(float(mse_only), rel=1e-6)
    assert float(torch.autograd.grad(result.loss, code)[0]) != 0.0


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="vp-discrete"):
        DDPM().check(formula_denoiser(network))
    with pytest.raises(ConfigError, match="epsilon"):
        DDPM().check(formula_denoiser(network, "vp-discrete", "velocity"))
