"""Fitted coefficients, ratios and learned times: known answers come back, and fits help on samples they never saw."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

import pliant
from analytic import GMM2D
from pliant.errors import PlanError
from pliant.paths import Path, get_path
from pliant.planning import SampleError, TeacherSettings, get_planner
from pliant.planning.cascade import CascadeRegression
from pliant.planning.learned_times import grid_of, learn_times, sampled, theta_of
from pliant.planning.least_squares import constrained_fit, fit_rows, straight, subspace_path
from pliant.planning.propagation import optimal_steps
from pliant.planning.stepping import mean_square, walk
from pliant.planning.teacher import Trajectories, ddim
from pliant.plans import Plan
from pliant.plans.compensation import fit_compensation, teacher_states
from pliant.solvers import DCSolver, Output, Program, compile_program, nodes_of, run
from support.planning import TWO_BUMPS, problem, starts

LINEAR = get_path("linear")
VP = get_path("vp-discrete", betas="scaled-linear")


def states_of(program: Program, x: torch.Tensor) -> list[torch.Tensor]:
    return [result.x for result in run(program, x, GMM2D.evaluate(program))]


@pytest.mark.parametrize(
    ("path", "stored", "solver"),
    [
        (LINEAR, "velocity", "dpmpp-2m"),
        (LINEAR, "sample", "ddim"),
        (VP, "epsilon", "ddim"),
        (VP, "v_prediction", "deis-rho-ab-2"),
    ],
)
def test_a_fit_to_a_teacher_of_as_many_steps_is_the_teacher(path: Path, stored: str, solver: str) -> None:
    """Rows equal the teacher's in normal form: the same map for every network (sheet D, 14.5), also without ridge."""
    times = torch.linspace(0.999, 0.02, 6, dtype=torch.float64).tolist()
    teacher = compile_program(path, times, solver, stored)
    nodes = nodes_of(path, times)
    x = starts(64, 2)
    outputs = lambda s, k: GMM2D.predict(stored, s, nodes[k])  # noqa: E731
    found = fit_rows(outputs, nodes, range(6), x, states_of(teacher, x), stored, ridge=0.0)
    assert max(found.errors) < 1e-24
    fitted = compile_program(path, times, found.steps, stored)
    a, b = teacher.normal_form(), fitted.normal_form()
    for k in range(5):  # what every call sees, and the end
        rows = [(f.a[i], f.c[i]) for f, i in ((a, (*a.evaluated, a.final)[k + 1]), (b, (*b.evaluated, b.final)[k + 1]))]
        assert torch.allclose(rows[0][0], rows[1][0], rtol=0, atol=1e-8)
        assert torch.allclose(rows[0][1], rows[1][1], rtol=0, atol=1e-8)


def vp_teacher(count: int, seed: int) -> tuple[Trajectories, torch.Tensor, Callable[..., torch.Tensor]]:
    """DDIM-100 on gmm2d and the scaled-linear path, its outputs, and what gives them."""
    nodes = nodes_of(VP, torch.linspace(1, 0, 101, dtype=torch.float64).tolist())
    states, noise, clean = [starts(count, 2, seed)], [], []
    for here, there in pairwise(nodes):
        x0, eps = GMM2D.pair(states[-1], here.alpha, here.sigma)
        noise.append(eps)
        clean.append(x0)
        states.append(ddim(states[-1], x0, here, there))
    trajectories = Trajectories(tuple(nodes), torch.stack(states), torch.stack(clean))
    return trajectories, torch.stack(noise), lambda s, k: GMM2D.predict("epsilon", s, nodes[k])


def test_fitted_steps_on_samples_they_never_saw() -> None:
    """Sheet D, 5, (2): at 5 steps at most a tenth of DDIM's error, its path better than an even one; and no explosion
    at 10 even steps. Measured: 5 steps 8.8e-4 (path), 3.0e-3 (even), DDIM 4.0e-2; 10 even steps 8.8e-4, DDIM 1.0e-2.
    """
    teacher, outputs_there, outputs = vp_teacher(128, 0)
    fresh, _, _ = vp_teacher(128, 1)

    def held_out(places: tuple[int, ...]) -> tuple[float, float]:
        targets = [teacher.states[j] for j in places[1:]]
        rows = fit_rows(outputs, teacher.nodes, places, teacher.states[0], targets, "epsilon", 1e-4)
        times = [teacher.nodes[k].t for k in places]
        ends = [states_of(compile_program(VP, times, s, "epsilon"), fresh.states[0])[-1] for s in (rows.steps, "ddim")]
        return mean_square(ends[0], fresh.states[-1]), mean_square(ends[1], fresh.states[-1])

    even, plain = held_out((0, 20, 40, 60, 80, 100))
    path = subspace_path(teacher, outputs_there, 5)
    found, _ = held_out(path.places)
    assert found <= 0.1 * plain and found < 0.6 * even
    late, plain = held_out(tuple(range(0, 101, 10)))
    assert late < 0.3 * plain


def test_fits_keep_straight_trajectories_exact() -> None:
    """Whatever is fitted, constant data and constant noise come out right: the constraints of sheet D, 14.5."""
    generator = torch.Generator().manual_seed(0)
    columns, target = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((50, 5), (50,)))
    equalities = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    values, near = torch.tensor([0.7, -0.2], dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    c = constrained_fit(columns, target, equalities, values, near, 0.0)
    assert torch.allclose(equalities @ c, values, atol=1e-12)
    gradient = columns.T @ (columns @ c - target)  # a combination of the constraints at the optimum (KKT)
    rest = gradient - equalities.T @ torch.linalg.lstsq(equalities.T, gradient[:, None]).solution[:, 0]
    assert float(rest.abs().max()) < 1e-10
    # Far too strong a ridge gives the reference back.
    reference = torch.linalg.lstsq(equalities, values[:, None], driver="gelsd").solution[:, 0]
    reference = reference + torch.linalg.svd(equalities)[2][-1]  # not the shortest, which a pull to 0 would give too
    assert torch.allclose(constrained_fit(columns, target, equalities, values, reference, 1e12), reference, atol=1e-6)
    node = nodes_of(VP, [0.5])[0]
    assert straight("epsilon", node) == (0.0, 1.0)
    assert straight("velocity", node) == pytest.approx((node.dalpha, node.dsigma))
    assert straight("v_prediction", node) == pytest.approx((-node.sigma, node.alpha))


def test_the_path_of_as_many_steps_as_nodes_is_all_of_them() -> None:
    teacher, outputs, _ = vp_teacher(8, 0)
    short = Trajectories(teacher.nodes[:7], teacher.states[:7], teacher.clean[:6])
    assert subspace_path(short, outputs[:6], 6).places == tuple(range(7))
    two = subspace_path(short, outputs[:6], 2)
    assert len(two.places) == 3 and two.places[0] == 0 and two.places[-1] == 6
    with pytest.raises(PlanError, match="between 1 and 6"):
        subspace_path(short, outputs, 7)


def test_ratios_of_a_linear_problem_are_one() -> None:
    """Clean data that move linearly in log-SNR, whatever the state: UniPC is exact, any other ratio is not."""
    times = torch.linspace(0.95, 0.1, 7, dtype=torch.float64)
    solver = DCSolver(order=2, B="exact")
    moving = lambda x, e: Output(torch.full_like(x, 0.3 + 0.2 * e.node.log_snr))  # noqa: E731
    x = starts(4)
    fine = teacher_states(LINEAR, times, moving, x, "sample", 6000)
    targets = [r.x for r in run(compile_program(LINEAR, times, solver, "sample"), x, moving)]
    assert float((targets[-1] - fine[-1]).abs().max()) < 1e-3, "exact, up to the first-order teacher's steps"
    found = fit_compensation(LINEAR, times, moving, x, targets, "sample", solver)
    assert found.ratios == (1.0,) * 6
    off = compile_program(LINEAR, times, DCSolver(order=2, B="exact", ratios=(1, 1, 1, 1.6)), "sample")
    assert float(([r.x for r in run(off, x, moving)][-1] - targets[-1]).abs().max()) > 1e-3


def test_the_cascade_recovers_ratios_of_its_own_kind() -> None:
    """Sheet D, 3, (4): synthetic cubic and quadratic ratios come back to 1e-8, also where nothing was searched."""
    c = torch.randn(36, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    true = CascadeRegression(tuple(c))
    searched = {(n, g): true.predict(n, g) for n in (5, 8, 12, 20) for g in (1.5, 4.0, 7.5, 10.0)}
    found = CascadeRegression.fit(searched)
    for steps, guidance in ((5, 1.5), (10, 6.0), (17, 3.0)):
        assert found.predict(steps, guidance) == pytest.approx(true.predict(steps, guidance), abs=1e-8)
    assert found.predict(2, 3.0) == (1.0, 1.0) and found.predict(1, 3.0) == (1.0,)
    with pytest.raises(PlanError, match="5 steps need 5 ratios"):
        CascadeRegression.fit({(5, 1.0): [1.0]})
    with pytest.raises(PlanError, match="nothing to fit"):
        CascadeRegression.fit({(2, 1.0): [1.0, 1.0]})


def two_bumps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return TWO_BUMPS.pair(x, 1 - t, t)[0]  # type: ignore[arg-type,operator]


def test_grids_of_parameters() -> None:
    times = [1.0, 0.7, 0.3, 0.1, 0.0]
    assert grid_of(theta_of(times), 1.0, 0.0).tolist() == pytest.approx(times, abs=1e-12)
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    grid = grid_of(theta, 0.9, 0.2)
    assert bool((grid.diff() < 0).all()) and grid[0] == 0.9 and grid[-1] == 0.2
    for end in (grid[0], grid[-1]):  # the ends are fixed
        assert not bool(torch.autograd.grad(end, theta, retain_graph=True)[0].any())


@pytest.mark.parametrize("order", [1, 2])
def test_differentiable_sampling_is_sampling_and_its_gradient_is_right(order: int) -> None:
    field, teacher = problem(nodes=20, count=30)
    places = (0, 6, 11, 16, 20)
    times = torch.tensor([field.nodes[k].t for k in places], dtype=torch.float64, requires_grad=True)
    end = sampled(two_bumps, LINEAR, times, teacher.states[0], order)
    assert torch.allclose(end, walk(field, teacher.states[0], places, order=order), atol=1e-12)
    (gradient,) = torch.autograd.grad(end.square().mean(), times)
    for k in (1, 2, 3):
        values = []
        for nudge in (-1e-6, 1e-6):
            moved = times.detach().clone()
            moved[k] += nudge
            values.append(float(sampled(two_bumps, LINEAR, moved, teacher.states[0], order).square().mean()))
        assert float(gradient[k]) == pytest.approx((values[1] - values[0]) / 2e-6, rel=1e-4, abs=1e-9)


def test_learned_times_are_no_worse_than_optimal_steps() -> None:
    """Sheet H, 8: after the updates the loss is at most OSS's; also from the even grid (measured .0728 and .0768)."""
    field, teacher = problem(nodes=50, count=200)
    fresh = problem(nodes=50, count=200, seed=1)[1]
    route = optimal_steps(field, teacher, 4, 2)
    searched = [field.nodes[k].t for k in route.places]

    def error(times: list[float]) -> float:
        grid = torch.tensor(times, dtype=torch.float64)
        return mean_square(sampled(two_bumps, LINEAR, grid, fresh.states[0], 2, False), fresh.states[-1])

    even = [1.0, 0.75, 0.5, 0.25, 0.0]
    for first in (even, searched):
        learned = learn_times(
            lambda rows: two_bumps, LINEAR, first, teacher.states[0], teacher.states[-1], 2, 100, 150, rate=0.03
        )
        assert learned.after <= learned.before
        assert error(list(learned.times)) < 1.02 * error(searched)
    assert error(even) > 1.5 * error(searched)
    with pytest.raises(PlanError, match="at least 4 samples"):
        learn_times(lambda rows: two_bumps, LINEAR, even, teacher.states[0][:3], teacher.states[-1][:3])


@pytest.fixture(scope="module")
def proxy() -> SampleError:
    return SampleError(pliant.load("digits"), TeacherSettings(20, guidance=1.5), range(8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("olss", {"nodes": 8, "samples": 4}),
        ("dc-solver", {"samples": 2, "trials": 3, "orders": (2,)}),
        ("ld3", {"nodes": 5, "samples": 4, "updates": 2, "batch": 2}),
    ],
)
def test_planners_of_coefficients_keep_the_budget(name: str, options: dict[str, object], proxy: SampleError) -> None:
    model = proxy.model
    found = get_planner(name)(model, "41%", objective=proxy, steps=10, guidance=1.5, **options)
    assert len(found.plan.steps) == 4
    assert found.cost.flops <= 0.411 * Plan.uniform(model, 10, guidance=1.5).cost(model).flops
    assert found.quality == proxy(found.plan)
    assert found.evaluations >= 2 and found.plan.provenance["planner"] == name
    assert found.quality.value <= min(c.score.value for c in found.frontier if c.score)


def test_a_regression_needs_no_fitting(proxy: SampleError) -> None:
    regression = CascadeRegression((1.05, *([0.0] * 35)))
    found = get_planner("dc-solver")(
        proxy.model, "41%", objective=proxy, steps=10, guidance=1.5, orders=(2,), regression=regression
    )
    assert found.settings["ratios"] == [pytest.approx([1.0, 1.0, 1.05, 1.05])]
