"""Times and modes together: the search keeps its budget, comes near brute force, and beats times alone."""

from itertools import combinations, product

import pytest
import torch

import pliant
from analytic import gaussian
from pliant.errors import PlanError
from pliant.planning import SampleError, TeacherSettings, get_planner
from pliant.planning.dynamic_programming import Route
from pliant.planning.field import FunctionField
from pliant.planning.joint import modes_of
from pliant.planning.joint_search import JointSearch, weak_first
from pliant.planning.polish import Walker, neighbours, polished
from pliant.planning.propagation import growth, optimal_steps
from pliant.planning.stepping import mean_square, trajectories_of, walk
from pliant.planning.task import Task
from pliant.plans import Plan
from support.planning import TWO_BUMPS, end_error, field_of, starts

WEAK = gaussian(1.04**0.5)  # the mean and spread of the two bumps, and nothing else
PRICE = [1.0, 0.25]


def brute(field: FunctionField, teacher_end: torch.Tensor, start: torch.Tensor, limit: float, order: int) -> float:
    last = len(field.nodes) - 1
    best = float("inf")
    for k in range(last):
        for inner in combinations(range(1, last), k):
            for modes in product((0, 1), repeat=k + 1):
                if sum(PRICE[m] for m in modes) <= limit:
                    end = walk(field, start, (0, *inner, last), modes, order)
                    best = min(best, mean_square(end, teacher_end))
    return best


@pytest.mark.parametrize(("order", "limit"), [(1, 1.0), (1, 1.5), (1, 2.0), (2, 1.5), (2, 2.0)])
def test_the_search_comes_near_brute_force(order: int, limit: float) -> None:
    """6 intervals, 2 modes. Not exact (one way per node survives), so within 30 % in mean square, 15 % after polish."""
    field = field_of(TWO_BUMPS, WEAK, nodes=6)
    teacher = trajectories_of(field, starts(40))
    best = brute(field, teacher.states[-1], teacher.states[0], limit, order)
    search = JointSearch(field, teacher, PRICE, order, weight=growth(field, teacher))
    found = search.within(limit)
    assert all(search.money(r) <= limit for r in found)
    assert found[0].value == min(r.value for r in found)
    end = walk(field, teacher.states[0], found[0].places, found[0].modes, order)
    assert found[0].value == pytest.approx(mean_square(end, teacher.states[-1]), rel=1e-9)
    assert best * (1 - 1e-9) <= found[0].value <= 1.3 * best
    better = polished(Walker(field, teacher, order), found[0], PRICE, limit, (0, 0), trials=300)
    assert best * (1 - 1e-9) <= better.value <= min(found[0].value, 1.15 * best)


def test_one_mode_and_no_price_is_the_teacher_itself() -> None:
    field = field_of(TWO_BUMPS, nodes=8)
    teacher = trajectories_of(field, starts(20))
    found = JointSearch(field, teacher, [1.0]).within(8.0)
    assert found[0].places == tuple(range(9)) and found[0].value < 1e-28
    with pytest.raises(PlanError, match=r"at least 1, more than the limit of 0\.5"):
        JointSearch(field, teacher, [1.0]).within(0.5)
    with pytest.raises(PlanError, match="prices above 0"):
        JointSearch(field, teacher, [0.0])


def test_joint_beats_times_alone_at_the_price_of_three_steps() -> None:
    """Measured on other starts: .055 against OptimalSteps' .175 (order 2, weak steps at a quarter of the price)."""
    field = field_of(TWO_BUMPS, WEAK, nodes=40)
    teacher = trajectories_of(field, starts(200))
    fresh = trajectories_of(field, starts(400, seed=1))
    search = JointSearch(field, teacher, PRICE, 2, weight=growth(field, teacher))
    route = search.within(3.0)[0]
    alone = optimal_steps(field, teacher, 3, 2)
    joint = mean_square(walk(field, fresh.states[0], route.places, route.modes, 2), fresh.states[-1]) ** 0.5
    assert joint < 0.5 * end_error(field, fresh, list(alone.places), 2)
    assert 1 in route.modes and 0 in route.modes


def test_weak_modes_come_first_where_that_is_asked() -> None:
    field = field_of(TWO_BUMPS, WEAK, nodes=12)
    teacher = trajectories_of(field, starts(40))
    phases = weak_first([10.0, 3.0])
    assert phases == (1, 0)
    for route in JointSearch(field, teacher, PRICE, 2, phases).within(2.5):
        levels = [phases[m] for m in route.modes]
        assert levels == sorted(levels)
    some = Route((0, 4, 8, 12), (1, 1, 0), 0.0)
    around = list(neighbours(some, 2, phases))
    assert all([phases[m] for m in r.modes] == sorted(phases[m] for m in r.modes) for r in around)
    assert all(list(r.places) == sorted(set(r.places)) and (r.places[0], r.places[-1]) == (0, 12) for r in around)
    assert {len(r.modes) for r in around} == {2, 3, 4}
    assert len(around) < len(list(neighbours(some, 2, (0, 0))))


def test_calls_are_remembered_between_sweeps() -> None:
    field = field_of(TWO_BUMPS, WEAK, nodes=10)
    search = JointSearch(field, trajectories_of(field, starts(5)), PRICE)
    search.sweep(0.1)
    calls = search.calls
    assert calls <= 2 * 10
    search.sweep(0.1)
    assert search.calls == calls


def test_the_planner_on_a_model() -> None:
    model = pliant.load("digits")
    proxy = SampleError(model, TeacherSettings(20, guidance=1.5), range(8))
    options = {"steps": 10, "guidance": 1.5, "nodes": 5, "samples": 2, "sweeps": 2, "trials": 2, "objective": proxy}
    found = get_planner("joint")(model, "25%", **options)
    full = Plan.uniform(model, 10, guidance=1.5).cost(model).flops
    assert found.cost.flops <= 0.2501 * full
    assert found.quality == proxy(found.plan)
    assert found.quality.value <= proxy(Plan.uniform(model, 2, guidance=1.5)).value
    assert get_planner("joint")(model, "25%", **options).plan.digest() == found.plan.digest()
    task = Task.begin("joint", model, "25%", None, 10, 1.5, 0, None)
    assert modes_of(task)[0].describe().endswith("cfg 1.5")
    assert len(modes_of(task)) == 5
    with pytest.raises(PlanError, match="below the cheapest plan of planner 'joint'"):
        get_planner("joint")(model, "0.5%", **options)
