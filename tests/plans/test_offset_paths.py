"""Plans along paths that drift to a known image (image restoration): mu reaches the start and every update."""

from __future__ import annotations

import pytest
import torch

from pliant import Denoiser, DiT, DiTConfig
from pliant.errors import PlanError
from pliant.paths import MeanReverting, NetworkTime
from pliant.plans import Plan, Sampler, sample, sample_steps
from pliant.plans.gradients import sample_with_gradients
from pliant.plans.noise import batch_noise
from pliant.solvers import Output, run
from support.networks import TINY, tiny_denoiser, tiny_dit

PATH = MeanReverting()
MU = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(5))
COND, SEEDS = [0, 1, 2], [7, 8, 9]


def restorer(blank: bool = False) -> Denoiser:
    """A network on the mean-reverting path; `blank`: as initialised, which answers eps = 0."""
    network = DiT(DiTConfig(**TINY)).eval() if blank else tiny_dit()
    return Denoiser(network, PATH, "epsilon", NetworkTime(scale=100.0))


def start(mu: torch.Tensor) -> torch.Tensor:
    """IR-SDE: the degraded image plus noise."""
    return mu + float(PATH.alpha_sigma(1.0).sigma) * batch_noise(SEEDS, -1, (2, 8, 8), torch.device("cpu"))


@pytest.mark.parametrize("solver", ["ddim", "mrs-1", "mrs-2", "mrs-3", "mrs-eps-2"])
def test_no_noise_means_a_straight_way_from_the_image(solver: str) -> None:
    """Where eps = 0, `x - beta*mu` only grows by 1/alpha (closed form), whatever the solver."""
    model = restorer(blank=True)
    plan = Plan.uniform(model, 5, solver)
    found = sample(model, plan, COND, SEEDS, mu=MU)
    s = PATH.alpha_sigma(1.0)
    expected = (start(MU) - (1.0 - float(s.alpha)) * MU) / float(s.alpha)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # 1/alpha = 200


@pytest.mark.parametrize("solver", ["mrs-1", "mrs-2", "mrs-3", "mrs-eps-3", "mrs-sde-1", "mrs-sde-2"])
def test_equals_the_interpreter(solver: str) -> None:
    model = restorer()
    plan = Plan.uniform(model, 5, solver)
    found = sample(model, plan, COND, SEEDS, batch_size=2, mu=MU)
    with torch.no_grad():
        for result in run(
            plan.program(model),
            start(MU),
            lambda x, ev: Output(model(x, ev.node.t, torch.tensor(COND), plan.steps[ev.step].compute).value),
            lambda slot: batch_noise(SEEDS, slot, (2, 8, 8), torch.device("cpu")),
            MU,
        ):
            expected = result.x
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((found - sample(model, plan, COND, SEEDS, mu=MU + 1.0)).abs().max()) > 0.1
    *_, last = sample_steps(model, plan, COND, SEEDS, mu=MU)
    torch.testing.assert_close(last.x, found, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_gradients_start_where_sampling_starts() -> None:
    model = restorer()
    plan = Plan.uniform(model, 3, "mrs-2")
    found = sample_with_gradients(model, plan, COND, lambda x: x.square().mean(), SEEDS, mu=MU)
    expected = sample(model, plan, COND, SEEDS, mu=MU)
    torch.testing.assert_close(found.sample, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_is_missing_is_named() -> None:
    model, plain = restorer(), tiny_denoiser()
    plan = Plan.uniform(model, 2, "mrs-2")
    with pytest.raises(PlanError, match=r"'mean-reverting' drifts to a known image: pass mu=.*\(3, 2, 8, 8\)"):
        sample(model, plan, COND)
    with pytest.raises(PlanError, match="pass mu="):
        next(Sampler(model, plan).steps(COND, SEEDS, x=MU))
    with pytest.raises(PlanError, match=r"mu must be a floating-point tensor \(3, 2, 8, 8\)"):
        sample(model, plan, COND, mu=MU[:1])
    with pytest.raises(PlanError, match="paths with an offset, which 'linear' has not"):
        sample(plain, Plan.uniform(plain, 2), COND, mu=MU)
