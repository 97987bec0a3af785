"""Flow maps: networks that are told where a step lands, and the plans that jump."""

import math

import pytest
import torch

from pliant import Compute, Plan, flexify, load, sample, save
from pliant.adapters.flow_map import flow_map
from pliant.compute import counted_flops
from pliant.errors import ConfigError, PlanError, ShapeError
from pliant.paths import get_path
from pliant.plans import Sampler
from pliant.solvers import Output, Program, compile_program, get_solver, run
from support.networks import batch, randomize, tiny_denoiser

SEEDS = [0, 1, 2]


def told():
    """A flow map whose answer depends on where it lands."""
    model = flow_map(tiny_denoiser())
    randomize(model.network.jump_embed, 5)
    return model


def test_a_new_flow_map_is_the_network_it_was_made_of_wherever_it_lands():
    model = tiny_denoiser()
    x, _, y = batch(model.network)
    made = flow_map(model)
    plain = model(x, 0.7, y).value
    assert torch.equal(made(x, 0.7, y).value, plain)
    assert torch.equal(made(x, 0.7, y, lands=0.1).value, plain)
    assert not torch.equal(told()(x, 0.7, y, lands=0.1).value, plain)
    assert not model.config.flow_map  # the given one is untouched
    assert "flow_map" not in model.identity()["network"]["dit"]


def test_a_plan_of_jumps_is_the_hand_written_loop():
    model = told()
    plan = Plan.uniform(model, 3, solver="jump")
    found = sample(model, plan, cond=[0, 1, 2], seeds=SEEDS)
    request = Sampler(model, plan).begin([0, 1, 2], SEEDS)
    x = request.x
    with torch.no_grad():
        for t, s in zip(plan.times, plan.times[1:], strict=False):
            x = x - (t - s) * model(x, t, torch.tensor([0, 1, 2]), lands=s).value
    assert torch.allclose(found, x, atol=2e-5)
    wrong = sample(model, Plan.uniform(model, 3, solver="ddim"), cond=[0, 1, 2], seeds=SEEDS)
    assert float((wrong - x).abs().max()) > 1e-3  # a solver that lands nowhere asks for the velocity at t itself


def test_a_solver_that_lands_nowhere_asks_for_the_prediction_at_its_own_time():
    model = told()
    request = Sampler(model, Plan.uniform(model, 2, solver="ddim")).begin([0], [0])
    x = request.x
    with torch.no_grad():
        for t, s in ((1.0, 0.5), (0.5, 0.0)):
            x = x - (t - s) * model(x, t, torch.tensor([0]), lands=t).value
    assert torch.allclose(sample(model, Plan.uniform(model, 2, solver="ddim"), [0], [0]), x, atol=2e-5)


def test_guided_and_weak_jumps_run_and_cost_what_is_counted():
    model = flow_map(flexify(tiny_denoiser(), [4]))
    randomize(model.network.base.jump_embed, 3)
    plan = Plan.weak_to_powerful(model, 2, weak_steps=1, solver="jump", guidance=1.5)
    out = sample(model, plan, cond=[0, 1], seeds=[4, 5])
    alone = sample(model, plan, cond=[1], seeds=[5])
    assert torch.allclose(out[1:], alone, atol=1e-5)
    x, _, y = batch(model.network)
    for patch in ((2, 2), (4, 4)):
        compute = Compute(patch=patch, merged=False)  # what a call on the bare network runs
        counted = counted_flops(lambda c=compute: model(x[:1], 0.6, y[:1], c, lands=0.2))
        assert counted == pytest.approx(model.flops(compute), rel=0.01)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_sampling_keeps_the_variance_of_the_data_with_the_exact_flow_map(gamma):
    """Sheet C 8 (2): data N(mu, sd^2), exact jumps; the final law is the data's for every gamma and grid."""
    mu, sd, path = 0.4, 0.5, get_path("linear")

    def exact(x, call):
        t, s = call.node.t, call.lands

        def std(time):
            return math.sqrt(((1 - time) * sd) ** 2 + time**2)

        landed = (1 - s) * mu + (x - (1 - t) * mu) * std(s) / std(t)
        return Output((x - landed) / (t - s))  # the mean velocity of the jump

    program = compile_program(path, [1.0, 0.8, 0.45, 0.2, 0.0], {"name": "jump", "gamma": gamma}, "velocity")
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    start = torch.randn(n, generator=generator, dtype=torch.float64)
    noise = {k: torch.randn(n, generator=generator, dtype=torch.float64) for k in range(8)}
    final = start
    for step in run(program, start, exact, noise=lambda slot: noise[slot]):
        final = step.x
    assert float(final.mean()) == pytest.approx(mu, abs=0.006)
    assert float(final.var()) == pytest.approx(sd**2, rel=0.015)
    assert get_solver({"name": "jump", "gamma": gamma}).stochastic == (gamma > 0)


def test_programs_of_jumps_are_read_back():
    program = compile_program(get_path("linear"), [1.0, 0.5, 0.0], {"name": "jump", "gamma": 0.5}, "velocity")
    again = Program.from_dict(program.to_dict())
    assert again == program
    landings = [e.lands for e in program.evaluations]
    assert landings[1] == 0.0 and 0.4 < landings[0] < 0.5


def test_a_flow_map_is_stored_and_read(tmp_path):
    model = told()
    save(model, tmp_path / "map")
    again = load(tmp_path / "map")
    x, _, y = batch(model.network)
    assert torch.equal(again(x, 0.9, y, lands=0.3).value, model(x, 0.9, y, lands=0.3).value)
    assert again.fingerprint() == model.fingerprint() != tiny_denoiser().fingerprint()


def test_what_is_refused():
    model = tiny_denoiser()
    x, t, y = batch(model.network)
    with pytest.raises(PlanError, match=r"step 0 .*flow maps"):
        Plan.uniform(model, 2, solver="jump")
    with pytest.raises(ConfigError, match="not told where a step lands"):
        model(x, 0.5, y, lands=0.2)
    with pytest.raises(ShapeError, match="two times"):
        told().network(x, t, y)
    with pytest.raises(ConfigError, match="already"):
        flow_map(told())
    with pytest.raises(ConfigError, match="do not go together"):
        told()(x, 0.5, y, Compute.from_dict({"scale": {"ratio": 2}}))
    with pytest.raises(PlanError, match="between 0"):
        get_solver({"name": "jump", "gamma": 1.5})
