"""Planners of times: shortest paths are shortest, published toys come out as published, steps are the solvers'."""

from itertools import combinations, pairwise, product

import pytest
import torch

import pliant
from analytic import gaussian
from pliant.compute import Compute
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.paths import get_path
from pliant.planning import SampleError, TeacherSettings, get_planner
from pliant.planning.dynamic_programming import budgeted_path, shortest_path
from pliant.planning.edges import edge_costs
from pliant.planning.field import FunctionField, Mode, ModelField
from pliant.planning.propagation import growth, optimal_steps
from pliant.planning.searching import planner_seeds, with_proxy
from pliant.planning.stepping import mean_square, trajectories_of, walk
from pliant.planning.task import Task
from pliant.planning.teacher import labels_of
from pliant.plans import Plan, Sampler
from pliant.solvers import Output, compile_program, run
from support.planning import TWO_BUMPS, end_error, evenly, field_of, problem, starts


def cubic(nodes: int) -> torch.Tensor:
    """BOSS costs of the curve x = s^3: sheet C, 6, (1)."""
    s = torch.arange(nodes + 1, dtype=torch.float64) / nodes
    step = s[None] - s[:, None]
    return (s[None] ** 3 - s[:, None] ** 3 - 3 * s[:, None] ** 2 * step).square()


@pytest.mark.parametrize(
    ("edges", "places", "value"),
    [(2, (0, 5, 8), 0.1597176), (3, (0, 4, 6, 8), 0.0520020), (4, (0, 3, 5, 7, 8), 0.0296516)],
)
def test_boss_on_a_cubic(edges: int, places: tuple[int, ...], value: float) -> None:
    found = shortest_path(cubic(8), edges)
    assert found.places == places
    assert found.value == pytest.approx(value, abs=5e-8)


def test_all_nodes_are_the_identity_schedule() -> None:
    found = shortest_path(cubic(8), 8)
    assert found.places == tuple(range(9)) and found.value == pytest.approx(0.0054779, abs=5e-8)


@pytest.mark.parametrize("discount", [1.0, 1.15])
def test_paths_equal_brute_force(discount: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        m = 2 + trial % 7
        cost = torch.rand(m + 1, m + 1, generator=generator, dtype=torch.float64)
        edges = 1 + trial % m
        best = min(
            (sum(discount**k * float(cost[a, b]) for k, (a, b) in enumerate(pairwise(way))), way)
            for way in ((0, *inner, m) for inner in combinations(range(1, m), edges - 1))
        )
        found = shortest_path(cost, edges, discount)
        assert found.value == pytest.approx(best[0], rel=1e-12)
        assert found.places == best[1]


def brute(cost: torch.Tensor, price: list[float], limit: float) -> float:
    """The least sum of errors of all paths and modes within a limit."""
    m = cost.shape[1] - 1
    best = float("inf")
    for k in range(m):
        for inner in combinations(range(1, m), k):
            way = (0, *inner, m)
            for modes in product(range(len(price)), repeat=k + 1):
                money = sum(price[c] for c in modes)
                if money <= limit + 1e-9:
                    error = sum(float(cost[c, a, b]) for c, a, b in zip(modes, way, way[1:], strict=False))
                    best = min(best, error)
    return best


def test_money_and_modes_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(1)
    for trial in range(20):
        m = 3 + trial % 3
        # Longer edges cost more, the weak mode twice as much error again: as real tables are.
        length = (torch.arange(m + 1)[None] - torch.arange(m + 1)[:, None]).double().clamp(min=0) ** 2
        cost = torch.rand(2, m + 1, m + 1, generator=generator, dtype=torch.float64) * length
        cost[1] *= 2
        price = [1.0, 0.3]
        for limit in (0.3, 0.9, 1.6, 2.5, 9.0):
            found = budgeted_path(cost, price, limit)
            assert found.value == pytest.approx(brute(cost, price, limit), rel=1e-12)
            assert sum(price[k] for k in found.modes) <= limit + 1e-9
            assert len(found.modes) == len(found.places) - 1


def test_impossible_paths_are_refused() -> None:
    with pytest.raises(PlanError, match="between 1 and 8 steps, not 9"):
        shortest_path(cubic(8), 9)
    with pytest.raises(PlanError, match="square table"):
        shortest_path(torch.zeros(2, 3), 1)
    with pytest.raises(PlanError, match=r"at most 0\.2: the cheapest step alone costs 0\.3"):
        budgeted_path(cubic(8)[None], [0.3], 0.2)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("order", "solver"), [(1, "ddim"), (2, "dpmpp-2m")])
def test_steps_are_those_of_the_named_solvers(path: str, order: int, solver: str) -> None:
    curve = get_path(path)
    times = [0.98, 0.8, 0.7, 0.45, 0.2, 0.1, 0.0]
    field = FunctionField(curve, times, lambda x, n: TWO_BUMPS.pair(x, n.alpha, n.sigma)[0])
    x = starts(5)
    program = compile_program(curve, times, solver, "sample")
    for result in run(program, x, lambda s, e: Output(TWO_BUMPS.pair(s, e.node.alpha, e.node.sigma)[0])):
        last = result.x
    assert torch.allclose(walk(field, x, range(7), order=order), last, rtol=0, atol=1e-12)


def test_trajectory_costs_are_zero_between_neighbours() -> None:
    field, teacher = problem(nodes=20, count=50)
    cost = edge_costs(field, teacher)
    assert float(cost.diagonal(1).max()) < 1e-28
    assert bool(torch.isinf(cost.tril()[cost.tril() != 0]).all())
    assert shortest_path(cost, 20).places == tuple(range(21))


def test_optimal_steps_beat_the_uniform_grid_as_published() -> None:
    """Sheet H, 8: uniform .139/.085/.063, OSS .119/.077/.058 at 4, 6, 8 steps; GITS worse at 4. Draws differ by 5 %."""
    field, teacher = problem(count=1000)
    fresh = trajectories_of(field, starts(1000, seed=1))
    cost = edge_costs(field, teacher)
    for steps, uniform, best in ((4, 0.139, 0.119), (6, 0.085, 0.077), (8, 0.063, 0.058)):
        route = optimal_steps(field, teacher, steps)
        found = end_error(field, fresh, list(route.places))
        assert found == pytest.approx(best, rel=0.08)
        assert end_error(field, fresh, evenly(steps)) == pytest.approx(uniform, rel=0.08)
        assert found < 0.95 * end_error(field, fresh, evenly(steps))
        assert route.value**0.5 == pytest.approx(end_error(field, teacher, list(route.places)), rel=1e-9)
        if steps == 4:
            assert all(abs(a - b) <= 2 for a, b in zip(route.places, (0, 40, 63, 79, 100), strict=True))
            gits = shortest_path(cost, 4, 1.15)
            assert end_error(field, fresh, list(gits.places)) > end_error(field, fresh, evenly(4))


def test_carrying_the_last_output_finds_the_times_of_second_order() -> None:
    field, teacher = problem(nodes=50, count=500)
    fresh = trajectories_of(field, starts(500, seed=1))
    first, second = (list(optimal_steps(field, teacher, 8, order).places) for order in (1, 2))
    # Measured: .051 at the times of order 1, .008 at its own.
    assert end_error(field, fresh, second, 2) < 0.4 * end_error(field, fresh, first, 2)


def test_optimal_steps_are_exact_where_every_way_is_tried() -> None:
    """With two steps there is one inner node: the recursion tries them all."""
    field, teacher = problem(nodes=12, count=200)
    best = min(end_error(field, teacher, [0, k, 12]) for k in range(1, 12))
    assert optimal_steps(field, teacher, 2).value ** 0.5 == pytest.approx(best, rel=1e-12)
    with pytest.raises(PlanError, match="between 1 and 12"):
        optimal_steps(field, teacher, 13)


def test_growth_of_a_linear_problem() -> None:
    """One Gaussian: an error at t is multiplied by std / sqrt(alpha^2 std^2 + sigma^2) on the way to the end."""
    field = field_of(gaussian(0.7), nodes=400)
    teacher = trajectories_of(field, starts(16))
    found = growth(field, teacher)
    for k in (0, 100, 200, 300, 400):
        node = field.nodes[k]
        exact = 0.49 / (node.alpha**2 * 0.49 + node.sigma**2)
        assert float(found[k]) == pytest.approx(exact, rel=0.02)


def test_a_model_field_is_the_model() -> None:
    """Walking a model's field at its own nodes is sampling with that solver, guidance and compute included."""
    model = pliant.load("digits")
    seeds = list(range(6))
    weak = Compute.of(patch=2)
    modes = [Mode(Compute(), Guidance.cfg(1.5)), Mode(weak), Mode(Compute(), Guidance.weak_model(1.5, weak))]
    times = [1.0, 0.7, 0.4, 0.2, 0.0]
    field = ModelField(model, times, labels_of(model, seeds).tolist(), modes)
    for k, mode in enumerate(modes):
        plan = Plan.uniform(model, 4, "dpmpp-2m", mode.compute, mode.guidance, times)
        request = Sampler(model, plan).begin(labels_of(model, seeds), seeds)
        wanted = Sampler(model, plan)(labels_of(model, seeds), seeds)
        assert torch.allclose(walk(field, request.x, range(5), [k] * 4, order=2), wanted, atol=2e-5)
    with pytest.raises(PlanError, match="earlier calls"):
        ModelField(model, times, [0], [Mode(Compute(), Guidance(2.0, "difference"))])


@pytest.fixture(scope="module")
def proxy() -> SampleError:
    return SampleError(pliant.load("digits"), TeacherSettings(20, guidance=1.5), range(8))


@pytest.mark.parametrize("name", ["boss", "gits", "oss"])
def test_planners_of_times_keep_the_budget_and_beat_the_default_grid(name: str, proxy: SampleError) -> None:
    model = proxy.model
    seen: list[tuple[int, int]] = []
    found = get_planner(name)(
        model, "31%", objective=proxy, steps=10, guidance=1.5, nodes=8, samples=4,
        progress=lambda i, n, _: seen.append((i, n)),
    )  # fmt: skip
    assert len(found.plan.steps) == 3
    assert found.cost.flops <= 0.31 * Plan.uniform(model, 10, guidance=1.5).cost(model).flops
    assert found.quality == proxy(found.plan)
    defaults = [proxy(Plan.uniform(model, 3, solver, guidance=1.5)).value for solver in ("ddim", "dpmpp-2m")]
    assert found.quality.value <= min(defaults)
    assert found.settings["searched"] and seen and found.settings["objective"]["teacher"]["steps"] == 20
    words = f"'{name}', which costs 10.0%.*: 1 step, own patch, cfg 1.5; raise .* such as 'weak-split'"
    with pytest.raises(PlanError, match=words):
        get_planner(name)(model, "5%", steps=10, guidance=1.5)


def test_a_planner_without_an_objective_brings_a_proxy_on_seeds_of_its_own() -> None:
    task = Task.begin("boss", pliant.load("digits"), 0.5, None, 10, 1.5, 0, None)
    with_proxy(task, seed=3, samples=4)
    assert isinstance(task.objective, SampleError)
    assert not set(task.objective.seeds) & set(planner_seeds(3, 4))
    assert task.settings["objective"]["teacher"] == {"steps": 100, "solver": "dpmpp-2m", "guidance": 1.5}


@pytest.mark.parametrize("order", [1, 2])
def test_the_value_of_optimal_steps_is_the_error_of_walking_them(order: int) -> None:
    """With the last of few steps of first order, as "dpmpp-2m" takes it."""
    field, teacher = problem(30, 200)
    route = optimal_steps(field, teacher, 4, order)
    end = walk(field, teacher.states[0], route.places, order=order)
    assert route.value == pytest.approx(mean_square(end, teacher.states[-1]), rel=1e-9)
