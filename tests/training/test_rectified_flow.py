"""Sheet C, section 1, on the mixture of two modes: diagnostics, solvers, couplings, reflow and distillation."""

from __future__ import annotations

import math

import pytest
import torch

from pliant.compute import Compute
from pliant.evaluation.straightness import crossing, curvature, straightness_of, trajectory, transport_cost
from pliant.paths import get_path, uniform_times
from pliant.solvers import Output, compile_program, get_solver, run
from pliant.training.couplings import Independent, OptimalTransport, Stored, assignment
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, FlowMatching, StepDistillation
from support.flows import (
    MLP,
    exact_map,
    exact_velocity,
    fit,
    modes_batches,
    one_step_error,
    pair_batches,
    pairs,
    quantiles,
    velocity_of,
)

# ------------------------------------------------------------------------------------------------------ diagnostics


def test_the_exact_flow() -> None:
    assert float(exact_map(torch.tensor([[1.0]]))) == pytest.approx(1.69009, abs=1e-4)
    # The sheet's v is in the paper's time, s = 1 - t.
    assert float(-exact_velocity(torch.tensor([[0.5]], dtype=torch.float64), 0.5)) == pytest.approx(1.499838, abs=1e-6)


def test_straightness_crossing_and_the_identity() -> None:
    path = trajectory(lambda x, t: exact_velocity(x, t), quantiles(), 256)
    s, cost = float(straightness_of(path).sum()), transport_cost(path)
    assert s == pytest.approx(0.74634, abs=2e-3)
    assert cost == pytest.approx(0.55206, abs=2e-3)
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    sign = 2.0 * torch.randint(2, (n, 1), generator=generator, dtype=torch.float64) - 1.0
    x0 = 1.5 * sign + 0.4 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x1 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    v = crossing(lambda x, t: exact_velocity(x, t), x0, x1, 64)
    assert v == pytest.approx(2.11160, abs=0.02)  # Monte Carlo: its standard error is 0.006
    assert float((x1 - x0).square().mean()) == pytest.approx(3.41, abs=0.02)
    # S is also E int |v|^2 - cost, so the identity ties numbers that were computed apart.
    energy = sum(float(v.square().mean()) for v in path.velocities[:-1]) / 256
    assert energy - cost == pytest.approx(s, abs=5e-3)
    assert 3.41 - cost == pytest.approx(s + 2.11160, abs=3e-3)


def test_crossing_by_quadrature() -> None:
    """V = int E Var(x1 - x0 | x_t): the same number without Monte Carlo in the noise."""
    x0 = torch.cat([1.5 + 0.4 * quantiles(401), -1.5 + 0.4 * quantiles(401)])
    x1 = quantiles(401)
    both = torch.cartesian_prod(x0[:, 0], x1[:, 0])
    v = crossing(lambda x, t: exact_velocity(x, t), both[:, :1], both[:, 1:], 64)
    assert v == pytest.approx(2.11160, abs=5e-3)


def test_a_straight_flow_has_no_straightness_and_no_curvature() -> None:
    """x0 = 2 + 3 z along lines: v(x, t) = z - x0 with z solved from x."""

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        z = (x - 2.0 * (1.0 - t)) / (3.0 * (1.0 - t) + t)
        return z - (2.0 + 3.0 * z)

    path = trajectory(velocity, quantiles(51), 20)
    assert float(straightness_of(path).sum()) < 1e-20
    assert float(curvature(path).max()) < 1e-9
    bent = trajectory(lambda x, t: exact_velocity(x, t), quantiles(51), 20)
    turns = curvature(bent)
    assert len(turns) == 20 and float(turns.max()) > 0.5


# ------------------------------------------------------------------------------------------------------ solvers


def rmse(solver: object, steps: int, z: torch.Tensor, exact: torch.Tensor) -> float:
    program = compile_program(get_path("linear"), uniform_times(steps), solver, "velocity")  # type: ignore[arg-type]
    for result in run(program, z, lambda x, ev: Output(exact_velocity(x, ev.node.t)), None):
        end = result.x
    return float((end - exact).square().mean().sqrt())


def test_euler_and_heun_on_the_exact_flow() -> None:
    z = quantiles(2001)
    exact = exact_map(z)
    for steps, expected in ((1, 1.5524), (8, 0.1299), (16, 0.0661), (32, 0.0334)):
        assert rmse("euler", steps, z, exact) == pytest.approx(expected, rel=0.02)
    full = get_solver({"name": "heun", "last": "full"})
    for steps, expected in ((16, 0.00463), (32, 0.00138)):
        assert rmse(full, steps, z, exact) == pytest.approx(expected, rel=0.02)
    one, end = torch.ones(1, 1, dtype=torch.float64), exact_map(torch.ones(1, 1))
    errors = [rmse(full, steps, one, end) for steps in (10, 20, 40)]
    assert errors == pytest.approx([1.42e-3, 3.58e-4, 9.09e-5], rel=0.02)
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


def test_renoising_from_the_start_does_not_converge() -> None:
    """Sheet C, 3 (3)."""
    z = quantiles(2001)
    exact = exact_map(z)
    found = [rmse("renoise", steps, z, exact) for steps in (1, 2, 4, 8, 16)]
    assert found == pytest.approx([1.5524, 0.5854, 0.1014, 0.2828, 0.4685], rel=0.05)


# ------------------------------------------------------------------------------------------------------ couplings


def test_optimal_transport_in_one_dimension_sorts() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(40, 1, generator=generator), torch.randn(40, 1, generator=generator)
    order = assignment(x0, x1)
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(x0[:, 0].argsort().argsort(), x1[order][:, 0].argsort().argsort())


def test_optimal_transport_stays_within_classes_and_lowers_the_cost() -> None:
    images = torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.arange(60) % 3)
    path = get_path("linear")
    plain = Independent()(batch, path, Draws.single(60))
    inside = OptimalTransport()(batch, path, Draws.single(60))
    across = OptimalTransport(within_classes=False)(batch, path, Draws.single(60))
    costs = [float((e.x1 - e.x0).square().sum()) for e in (plain, inside, across)]
    assert costs[0] > costs[1] > costs[2]
    for label in range(3):  # each class keeps its own noise
        rows = batch.labels == label
        assert torch.equal(plain.x1[rows].flatten(1).sum(1).sort()[0], inside.x1[rows].flatten(1).sum(1).sort()[0])


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
def test_reflow_and_distillation_straighten() -> None:
    """Sheet C, 1 (3, 4). Measured values: docs/distillation-checks.md."""
    z, x0 = pairs()
    first = fit(FlowMatching(class_dropout=0.0), MLP(), modes_batches, steps=4000)
    second = fit(FlowMatching(class_dropout=0.0, coupling=Stored()), MLP(), pair_batches(z, x0), steps=4000)
    found = {}
    for name, toy in (("1-RF", first), ("2-RF", second)):
        s = float(straightness_of(trajectory(velocity_of(toy), quantiles(1001), 64)).sum())
        found[name] = (one_step_error(toy), s)
    steps = ((1.0, Compute()),)
    distilled = fit(StepDistillation(steps), MLP(), pair_batches(z, x0), steps=4000)
    shuffled = x0[torch.randperm(len(x0), generator=torch.Generator().manual_seed(1))]
    hopeless = fit(StepDistillation(steps), MLP(), pair_batches(z, shuffled), steps=1000)
    found["distilled"] = (one_step_error(distilled), math.nan)
    found["distilled from independent pairs"] = (one_step_error(hopeless), math.nan)
    print(found)
    assert found["1-RF"][0] > 1.4 and found["1-RF"][1] == pytest.approx(0.746, rel=0.1)
    assert found["2-RF"][0] < 0.15 and found["2-RF"][1] < 0.01
    assert found["distilled"][0] < 0.08
    assert found["distilled from independent pairs"][0] > 1.0
