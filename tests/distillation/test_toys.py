"""What recipes promise, on one-dimensional flows with exact answers (sheet C, 2 to 6). What the slow ones measure:
docs/distillation-checks.md."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.distillation.boss import euler_costs
from pliant.evaluation.straightness import straightness_of, trajectory
from pliant.paths import get_path
from pliant.planning.dynamic_programming import shortest_path
from pliant.training.couplings import Ends, Stored, blended, stored_sources
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, FlowMatching, StepDistillation
from pliant.training.objectives.consistency import ddim_step
from support.flows import (
    MLP,
    MODES,
    Toy,
    exact_map,
    exact_velocity,
    fit,
    one_step_error,
    pair_batches,
    pairs,
    quantiles,
    velocity_of,
)

# --------------------------------------------------------------------------------------------------------------- BOSS


def euler_states(z: Tensor, steps: int, times: list[float] | None = None) -> Tensor:
    """(steps+1, N, 1): the exact velocity's Euler trajectory."""
    grid = times or [1.0 - k / steps for k in range(steps + 1)]
    states = [z]
    for t, s in pairwise(grid):
        states.append(states[-1] + (s - t) * exact_velocity(states[-1], t))
    return torch.stack(states)


def test_schedules_on_the_mixture() -> None:
    """Sheet C, 6 (4): the shortest paths of 20 anchors, and their errors end to end against the uniform grids'."""
    z = quantiles(2001)
    costs = euler_costs(euler_states(z, 20))
    expected = {
        4: ([0, 5, 9, 13, 20], 0.0294, 0.2354, 0.2534),
        6: ([0, 4, 7, 10, 13, 17, 20], None, 0.1707, 0.1716),
        8: ([0, 3, 6, 8, 10, 12, 14, 17, 20], 0.00272, 0.1214, 0.1299),
        2: (None, None, 0.621, 0.585),
        3: (None, None, 0.358, 0.336),
    }
    exact = exact_map(z)

    def error(times: list[float]) -> float:
        return float((euler_states(z, len(times) - 1, times)[-1] - exact).square().mean().sqrt())

    for steps, (places, value, shortest, uniform) in expected.items():
        route = shortest_path(costs, steps)
        if places is not None:
            assert list(route.places) == places
        if value is not None:
            assert route.value == pytest.approx(value, rel=0.02)
        assert error([1.0 - k / 20 for k in route.places]) == pytest.approx(shortest, rel=0.03)
        assert error([1.0 - k / steps for k in range(steps + 1)]) == pytest.approx(uniform, rel=0.03)
    assert list(shortest_path(costs, 20).places) == list(range(21))
    assert shortest_path(costs, 20).value == pytest.approx(0.0, abs=1e-20)


# ----------------------------------------------------------------------------------------------------------- InstaFlow


def guided_velocity(x: Tensor, t: float, mean: float, scale: float) -> Tensor:
    """CFG of a class N(mean, 0.5^2) against an unconditional model of N(0, 1.5^2): linear in x."""

    def velocity(m: float, sd: float) -> Tensor:
        variance = (1.0 - t) ** 2 * sd**2 + t**2
        return -m + (t - (1.0 - t) * sd**2) / variance * (x - (1.0 - t) * m)

    null = velocity(0.0, 1.5)
    return null + scale * (velocity(mean, 0.5) - null)


def guided_map(z: Tensor, mean: float, scale: float, steps: int = 400) -> Tensor:
    """RK4 on the linear flow."""
    x, h = z, -1.0 / steps
    for k in range(steps):
        t = 1.0 - k / steps
        a = guided_velocity(x, t, mean, scale)
        b = guided_velocity(x + 0.5 * h * a, t + 0.5 * h, mean, scale)
        c = guided_velocity(x + 0.5 * h * b, t + 0.5 * h, mean, scale)
        d = guided_velocity(x + h * c, t + h, mean, scale)
        x = x + h / 6.0 * (a + 2.0 * b + 2.0 * c + d)
    return x


@pytest.mark.slow
def test_a_single_branch_student_learns_guided_pairs() -> None:
    """Sheet C, 2 (1): one unguided step has the guided mean within 5 %."""
    scale, means = 2.0, (1.5, -1.0)
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = [guided_map(z, m, scale) for m in means]
    guided = [float(guided_map(torch.zeros(1, 1, dtype=torch.float64), m, scale)) for m in means]
    plain = [float(guided_map(torch.zeros(1, 1, dtype=torch.float64), m, 1.0)) for m in means]
    assert all(abs(g - p) > 0.1 for g, p in zip(guided, plain, strict=True))  # guidance moved something

    def serve(n: int, draws: Draws) -> Batch:
        g = torch.Generator().manual_seed(draws.step)
        rows, labels = torch.randint(len(z), (n,), generator=g), torch.randint(2, (n,), generator=g)
        x0 = torch.where(labels[:, None] == 0, maps[0][rows], maps[1][rows])
        return Batch(x0.float().reshape(n, 1, 1, 1), labels, sources=z[rows].float().reshape(n, 1, 1, 1))

    toy = fit(StepDistillation(((1.0, Compute()),)), MLP(classes=2), serve, steps=2000)
    start, found = quantiles(2001).float().reshape(-1, 1, 1, 1), []
    for label in (0, 1):
        with torch.no_grad():
            v = toy(start, 1.0, torch.full((2001,), label)).to("velocity")
        found.append(float((start - v).mean()))
    print("guided means", guided, "student", found, "unguided", plain)
    assert found == pytest.approx(guided, rel=0.05)


# ------------------------------------------------------------------------------------------------------------ SlimFlow


@dataclass(frozen=True)
class FixedBlend:
    """The annealed coupling stopped at b."""

    b: float

    def __call__(self, batch: Batch, path: Any, draws: Draws) -> Ends:
        fresh = draws.noise(path, batch.images.shape[1:])
        return Ends(batch.images, blended(stored_sources(batch), fresh, self.b))


@pytest.mark.slow
def test_annealing_straightens_step_by_step() -> None:
    """Sheet C, 4 (3): S falls with b, from that of flow matching to that of reflow."""
    z, x0 = pairs()
    found = {}
    for b in (1.0, 0.7, 0.3, 0.0):
        toy = fit(
            FlowMatching(class_dropout=0.0, coupling=FixedBlend(b)), MLP(), pair_batches(z, x0), steps=2000,
            batch_size=256,
        )  # fmt: skip
        found[b] = float(straightness_of(trajectory(velocity_of(toy), quantiles(501), 48)).sum())
    print("S", found)
    values = list(found.values())
    assert all(later < 1.1 * earlier for earlier, later in pairwise(values))
    assert values[0] == pytest.approx(0.746, rel=0.15) and values[-1] < 0.02


# ------------------------------------------------------------------------------------------------- Rectified Diffusion


def first_order_gap(toy: Toy, steps: int = 64, count: int = 501) -> tuple[float, float]:
    """(FO, RMSE of a single DDIM step) of an epsilon model on VP, started from pure noise."""
    z = quantiles(count).float().reshape(-1, 1, 1, 1)
    labels, gaps, x = torch.zeros(count, dtype=torch.int64), [], z
    with torch.no_grad():
        for k in range(steps):
            t, s = 1.0 - k / steps, 1.0 - (k + 1) / steps
            prediction = toy(x, torch.full((count,), t, dtype=torch.float64), labels)
            gaps.append(float((prediction.to("epsilon") - z).square().mean()))
            x = ddim_step(prediction, torch.full((count,), s, dtype=torch.float64))
        one = torch.ones(count, dtype=torch.float64)
        once = ddim_step(toy(z, one, labels), 0.0 * one)
    error = once.flatten(1).double() - exact_map(quantiles(count))
    return sum(gaps) / steps, float(error.square().mean().sqrt())


@pytest.mark.slow
def test_rectified_diffusion_needs_no_linear_path() -> None:
    """Sheet C, 5 (3): on VP, pairs cut the first-order gap more than fivefold and one DDIM step is nearly exact."""
    path = get_path("vp")

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = path.alpha_sigma(float(t[0]))
        clean, _ = MODES.pair(x.double(), float(s.alpha), float(s.sigma))
        return clean.to(x)

    before = first_order_gap(Toy(exact, path, "sample"))
    z, x0 = pairs()
    after = first_order_gap(
        fit(
            # v-predictions determine both clean data and noise at both ends of the path.
            FlowMatching(class_dropout=0.0, coupling=Stored(), space="v_prediction"), MLP(), pair_batches(z, x0),
            steps=3000, path="vp", prediction="v_prediction",
        )
    )  # fmt: skip
    print("first-order gap, one-step error: exact diffusion", before, "rectified", after)
    assert before[0] > 5.0 * after[0]
    assert after[1] < 0.2 < before[1]


@pytest.mark.slow
def test_two_steps_of_a_distilled_model() -> None:
    """Direct distillation to two steps: both are trained, and two are no worse than one."""
    z, x0 = pairs()
    steps = ((1.0, Compute()), (0.5, Compute()))
    toy = fit(StepDistillation(steps), MLP(), pair_batches(z, x0), steps=3000)
    q = quantiles(1001)
    velocity = velocity_of(toy)
    half = q - 0.5 * velocity(q, 1.0)
    two = half - 0.5 * velocity(half, 0.5)
    error = float((two - exact_map(q)).square().mean().sqrt())
    print("one step", one_step_error(toy), "two steps", error)
    assert error < 0.1 and one_step_error(toy) < 0.1
