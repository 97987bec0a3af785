"""FlowTurbo (sheet C, 7): pseudo correction, the refiner in plans, and its training."""

import math
from dataclasses import replace

import pytest
import torch

from pliant import Compute, Denoiser, DiT, DiTConfig, Plan, load, sample, save
from pliant.errors import ConfigError, PlanError
from pliant.paths import NetworkTime, get_path
from pliant.plans import Sampler, turbo
from pliant.solvers import Output, compile_program, run
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch
from pliant.training.objectives.refiner import VelocityRefiner
from support.flow_maps import LINEAR, Stub, mixture_velocity
from support.networks import TINY, batch, randomize, tiny_denoiser


def mixture_run(solver, n, x, end=0.0):
    """The exact velocity of the mixture along n equal steps, and how often it was asked for."""
    times = torch.linspace(1, end, n + 1, dtype=torch.float64)
    program = compile_program(LINEAR, times, solver, "velocity")

    def evaluate(state, call):
        t = torch.full((len(state),), call.node.t, dtype=torch.float64)
        return Output(mixture_velocity(state, t, 1.5, 0.4))  # the mixture of sheet C, section 1

    for step in run(program, x, evaluate):
        final = step.x
    return final, len(program.evaluations)


def model_with_refiner(seed=7):
    teacher = tiny_denoiser()
    network = DiT(DiTConfig(**{**TINY, "in_channels": 4, "depth": 1})).eval()
    if seed:
        randomize(network, seed)
    return replace(teacher, refiner=Denoiser(network, get_path("linear"), "velocity", NetworkTime(scale=1000.0)))


def test_pseudo_correction_has_the_published_errors():
    """Sheet C 7 (1): RMSE .3889, .0726, .02936, .01054, .00326 to the exact flow at N + 1 calls."""
    share = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    z = math.sqrt(2) * torch.erfinv(2 * share - 1)[:, None]  # quantiles of N(0, 1)
    reference, _ = mixture_run("rk4", 800, z)
    for n, published in {2: 0.3889, 4: 0.0726, 8: 0.02936, 16: 0.01054, 32: 0.00326}.items():
        final, calls = mixture_run("pec", n, z)
        assert float((final - reference).square().mean().sqrt()) == pytest.approx(published, rel=0.03)
        assert calls == n + 1
    one = torch.ones(1, 1, dtype=torch.float64)
    exact, _ = mixture_run("rk4", 800, one)
    for n, published in {10: 4.05e-3, 20: 9.78e-4, 40: 2.42e-4}.items():
        assert float((mixture_run("pec", n, one)[0] - exact).abs()) == pytest.approx(published, rel=0.02)


def test_full_steps_are_heun_and_calls_are_counted():
    """Sheet C 7 (1), (3): H is Heun's method; H2 P3 R2 calls the network 7 times and the refiner 4 times."""
    z = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, _ = mixture_run("pece", 8, z, end=0.1)
    heun, _ = mixture_run("heun", 8, z, end=0.1)
    assert torch.allclose(ours, heun, atol=1e-12)
    model = model_with_refiner()
    plan = turbo(model, 2, 3, 2)
    evaluations = plan.program(model).evaluations
    light = [plan.steps[e.step].compute.refine for e in evaluations]
    assert (light.count(False), light.count(True)) == (7, 4)
    assert plan.cost(model).flops == 7 * model.flops() + 4 * model.refiner.flops()
    published = turbo(model, 8, 9, 5).program(model)  # H8 P9 R5: 25 full calls, 10 of the refiner
    refined = sum(turbo(model, 8, 9, 5).steps[e.step].compute.refine for e in published.evaluations)
    assert (len(published.evaluations) - refined, refined) == (25, 10)
    pseudo_only = turbo(model, 0, 3, 0)
    assert pseudo_only.cost(model).evaluations == 4  # one extra without Heun steps


def test_an_untrained_refiner_freezes_the_velocity():
    """Sheet C 7 (2): a zero offset makes refined steps Euler steps with the last velocity."""
    model = model_with_refiner(seed=0)
    plan = turbo(model, 1, 0, 2)
    found = sample(model, plan, cond=[0, 1], seeds=[0, 1])
    x = Sampler(model, plan).begin([0, 1], [0, 1]).x
    y = torch.tensor([0, 1])
    t, s, u, _ = plan.times
    with torch.no_grad():
        d = model(x, t, y).value
        second = model(x + (s - t) * d, s, y).value
        x = x + 0.5 * (s - t) * (d + second)
        for a, b in ((s, u), (u, 0.0)):
            x = x + (b - a) * second
    assert torch.allclose(found, x, atol=2e-5)


@pytest.mark.parametrize("guidance", [None, 1.7])
def test_a_refined_step_is_the_published_one(guidance):
    model = model_with_refiner()
    plan = turbo(model, 1, 0, 2, guidance=guidance)
    found = sample(model, plan, cond=[0, 1], seeds=[0, 1])
    alone = sample(model, plan, cond=[1], seeds=[1])
    assert torch.allclose(found[1:], alone, atol=1e-5)
    x, y = Sampler(model, plan).begin([0, 1], [0, 1]).x, torch.tensor([0, 1])
    null = torch.full_like(y, model.null_label)

    def guided(call):
        if guidance is None:
            return call(y)
        c, u = call(y), call(null)
        return u + guidance * (c - u)

    def refined(x, v, t):
        return guided(lambda labels: model.refiner(torch.cat([x, v], 1), t, labels).value[:, :2])

    t, s, u, _ = plan.times
    with torch.no_grad():
        d = guided(lambda labels: model(x, t, labels).value)
        x1 = x + (s - t) * d
        v = guided(lambda labels: model(x1, s, labels).value)
        x = x + 0.5 * (s - t) * (d + v)
        for a, b in ((s, u), (u, 0.0)):
            first = v + refined(x, v, a)
            second = first + refined(x + (b - a) * first, v, b)
            x = x + 0.5 * (b - a) * (first + second)
            v = first
    assert torch.allclose(found, x, atol=5e-5)


def test_plans_and_models_with_refiners_are_stored(tmp_path):
    model = model_with_refiner()
    plan = turbo(model, 1, 1, 1)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").digest() == plan.digest()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    images = [sample(m, plan, cond=[0], seeds=[3]) for m in (model, again)]
    assert torch.equal(*images)
    save(tiny_denoiser(), tmp_path / "model")  # a replaced model takes its refiner along
    assert load(tmp_path / "model").refiner is None


def test_what_is_refused():
    model = model_with_refiner()
    plan = turbo(model, 1, 0, 1)
    with pytest.raises(PlanError, match=r"step 1 .*refiner.*flowturbo"):
        plan.check(tiny_denoiser())
    with pytest.raises(PlanError, match=r"step 0 .*before any full call"):
        plan.with_steps([replace(step, compute=Compute(refine=True)) for step in plan.steps]).check(model)
    with pytest.raises(PlanError, match="at least one full step"):
        turbo(model, 0, 0, 3)
    with pytest.raises(ConfigError, match="says nothing of"):
        Compute(refine=True, patch=(4, 4))
    with pytest.raises(ConfigError, match="sample with a plan"):
        x, _, y = batch(model.network)
        model(x, 0.5, y, Compute(refine=True))


def test_the_refiner_s_loss_is_the_published_one():
    model = model_with_refiner()
    x, _, y = batch(model.network, 8)
    objective = VelocityRefiner(tiny_denoiser(), 0.12, class_dropout=0.0)
    objective.check(model.refiner)
    with pytest.raises(ConfigError, match="in_channels 4"):
        objective.check(tiny_denoiser())
    draws = Draws.single(8)
    found = objective(model.refiner, Batch(x, y % 3), draws)
    again = Draws.single(8)
    dt = 0.12 * float(torch.rand(1, generator=again.shared(), dtype=torch.float64))
    t = dt + (1 - dt) * again.uniform().double()
    again.uniform()
    noisy = LINEAR.mix(x, again.noise(LINEAR, x.shape[1:]), t)
    teacher = objective.teacher
    with torch.no_grad():
        v = teacher(noisy, t, y % 3).value
        later = noisy - dt * v
        offset = model.refiner(torch.cat([later, v], 1), t - dt, y % 3).value[:, :2]
        expected = (v + offset - teacher(later, t - dt, y % 3).value).square().mean()
    assert float(found.loss.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_a_trained_refiner_beats_the_old_velocity_fivefold():
    """Sheet C 7 (4), on two mixtures at once (a state of two numbers)."""
    from torch import nn

    net = nn.Sequential(nn.Linear(8, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU(), nn.Linear(192, 2))
    nn.init.zeros_(net[-1].weight)

    def offset(x, t, s):
        times = torch.stack([t, (3 * t).sin(), (3 * t).cos(), t * t], 1).to(x.dtype)
        return nn.functional.pad(net(torch.cat([x.flatten(1), times], 1)), (0, 2))[:, :, None, None]

    refiner = Stub(offset, flow_map=False)
    teacher = Stub(lambda x, t, s: mixture_velocity(x, t, 1.5, 0.4), flow_map=False)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    objective = VelocityRefiner(teacher, 0.12, class_dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    before = after = 0.0
    for step in range(4000):
        side = 3.0 * torch.randint(2, (256, 2, 1, 1), generator=generator) - 1.5
        data = Batch(side + 0.4 * torch.randn(256, 2, 1, 1, generator=generator), torch.zeros(256, dtype=torch.int64))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 4000)
        optimizer.zero_grad()
        result = objective(refiner, data, Draws.single(256, step=step))
        result.loss.backward()
        optimizer.step()
        if step >= 3800:
            before, after = before + float(result.logs["unrefined"]), after + float(result.loss.detach())
    print(f"squared error of the old velocity {before / 200:.4f}, refined {after / 200:.5f}")
    assert after < before / 25  # five times smaller velocities' errors
