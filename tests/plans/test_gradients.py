"""Gradients of sampled images through plans, against finite differences and plain autograd."""

import pytest
import torch

from pliant import Compute, Guidance, Plan, sample
from pliant.errors import PlanError
from pliant.plans.gradients import differentiable_sample, sample_with_gradients
from support.memory import watching
from support.networks import tiny_denoiser

LABELS = [0, 2]


def double_model(**options):
    model = tiny_denoiser(**options)
    model.network.double()
    return model


def loss(images):
    return (images**2).sum() + images[:, 0, 1, 2].sum()


def start(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(LABELS), *model.sample_shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun"])
def test_sample_is_that_of_the_loop(solver):
    model = tiny_denoiser()
    plan = Plan.uniform(model, 4, solver, guidance=2.0)
    ours = sample_with_gradients(model, plan, LABELS, loss, seeds=[3, 4])
    torch.testing.assert_close(ours.sample, sample(model, plan, LABELS, [3, 4]), rtol=1e-4, atol=1e-5)
    assert ours.x.shape == ours.sample.shape and ours.cond is None and not ours.parameters


@pytest.mark.parametrize("guidance", [None, 2.0, Guidance.cfg(1.7, channels=1)])
def test_against_finite_differences(guidance):
    """Noise, conditioning embedding and one weight."""
    model = double_model()
    plan = Plan.uniform(model, 3, "dpmpp-2m", guidance=guidance)
    x = start(model)
    found = sample_with_gradients(model, plan, LABELS, loss, x=x, wrt=("x", "cond", "parameters"))

    def value(x=x, embedding=None):
        with torch.no_grad():
            return float(loss(differentiable_sample(model, plan, LABELS, x, embedding=embedding)))

    assert float(found.loss) == pytest.approx(value(), rel=1e-12)
    g = torch.Generator().manual_seed(1)
    direction, h = torch.randn(x.shape, generator=g, dtype=torch.float64), 1e-5
    numeric = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert float((found.x * direction).sum()) == pytest.approx(numeric, rel=1e-6)

    rows = model.network.label_embed.weight.detach()[LABELS]
    direction = torch.randn(rows.shape, generator=g, dtype=torch.float64)
    numeric = (value(embedding=rows + h * direction) - value(embedding=rows - h * direction)) / (2 * h)
    assert float((found.cond * direction).sum()) == pytest.approx(numeric, rel=1e-5)

    name, weight = "blocks.0.qkv.weight", dict(model.network.named_parameters())["blocks.0.qkv.weight"]
    direction = torch.randn(weight.shape, generator=g, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        weight.data.add_(direction, alpha=sign * h)
        values.append(value())
        weight.data.add_(direction, alpha=-sign * h)
    numeric = (values[0] - values[1]) / (2 * h)
    assert float((found.parameters[name] * direction).sum()) == pytest.approx(numeric, rel=1e-5)


def test_stochastic_plans_need_seeds():
    model = tiny_denoiser(path="vp-discrete", prediction="epsilon")
    plan = Plan.uniform(model, 3, {"name": "ddim", "eta": 1.0})
    found = sample_with_gradients(model, plan, LABELS, loss, seeds=[0, 1])
    assert bool(torch.isfinite(found.x).all())
    with pytest.raises(PlanError, match="draws noise"):
        differentiable_sample(model, plan, LABELS, found.sample)


def test_memory_does_not_grow_with_steps():
    model = tiny_denoiser()
    peaks = []
    for steps in (2, 16):
        plan = Plan.uniform(model, steps, "euler")
        with watching() as held:
            sample_with_gradients(model, plan, LABELS, loss, wrt=("x", "parameters"))
        peaks.append(held.peak)
    assert peaks[1] == peaks[0] > 0


def test_gradients_improve_a_loss():
    """A few steps of descent on the start noise bring the mean of the images to a target."""
    model = tiny_denoiser()
    plan = Plan.uniform(model, 3, "euler", compute=Compute())

    def target(images):
        return (images.mean((1, 2, 3)) - 0.5).square().sum()

    x, values = start(model).float(), []
    for _ in range(4):
        found = sample_with_gradients(model, plan, LABELS, target, x=x)
        values.append(float(found.loss))
        x = x - 20.0 * found.x
    assert values[-1] < 0.2 * values[0]


def test_bad_input():
    model = tiny_denoiser()
    plan = Plan.uniform(model, 2, "euler")
    with pytest.raises(PlanError, match="did you mean 'parameters'"):
        sample_with_gradients(model, plan, LABELS, loss, wrt=("parameter",))
    with pytest.raises(PlanError, match="one number"):
        sample_with_gradients(model, plan, LABELS, lambda x: x)
    with pytest.raises(PlanError, match="empty"):
        sample_with_gradients(model, plan, LABELS, loss, wrt=())
