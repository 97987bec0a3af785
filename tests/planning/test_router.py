"""The planner that gives every class a plan: those that gain most get the dear one, and a measure decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.compute import Compute
from pliant.errors import PlanError
from pliant.evaluation import extract, to_uint8
from pliant.planning import PlanResult, Score, get_planner, search
from pliant.planning.defaults import default_extractor
from pliant.plans import AnyPlan, Plan, RoutedPlans

MODEL = pliant.load("digits")
CHEAP = Plan.uniform(MODEL, 2, compute=Compute.of(2, precision="fp32"))
DEAR = Plan.uniform(MODEL, 3, compute=Compute(precision="fp32"))
BETWEEN = (CHEAP.cost(MODEL).flops + DEAR.cost(MODEL).flops) / 2
OPTIONS: dict[str, Any] = {"plans": (DEAR, CHEAP, DEAR), "num": 3, "shrink": 0.0, "steps": 6}


class Likes:
    """An objective that is fond of one kind of plan."""

    name = "fondness"

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def describe(self) -> dict[str, Any]:
        return {"objective": "fondness", "of": self.kind.__name__}

    def __call__(self, plan: AnyPlan) -> Score:
        value = 0.1 if isinstance(plan, self.kind) else 0.2
        return Score(value, value, value, 1)


def gains(num: int) -> torch.Tensor:
    """(10,) by how much the dear plan's images are nearer to full compute's, in the mean of `num` seeds per class."""
    extractor = default_extractor(MODEL)
    assert extractor is not None
    labels, seeds = [k % 10 for k in range(10 * num)], list(range(10 * num))
    plans = (Plan.uniform(MODEL, 6), CHEAP, DEAR)
    full, cheap, dear = (extract(extractor, [to_uint8(pliant.sample(MODEL, p, labels, seeds))]) for p in plans)
    gain = (cheap - full).square().mean(1) - (dear - full).square().mean(1)
    return torch.stack([gain[c::10].mean() for c in range(10)])


def test_classes_that_gain_most_get_the_dear_plan(tmp_path: Path) -> None:
    found = search(MODEL, f"{BETWEEN / 1e9} GFLOP", "router", objective=Likes(RoutedPlans), **OPTIONS)
    routed = found.plan
    assert isinstance(routed, RoutedPlans) and len(routed.table) == 11  # ten classes, and none
    assert {p.digest() for p in routed.plans} == {CHEAP.digest(), DEAR.digest()}
    dear = torch.tensor([routed.plans[p].digest() == DEAR.digest() for p in routed.table[:10]])
    gain = gains(3)
    assert 0 < int(dear.sum()) <= 5 and float(gain[dear].min()) >= float(gain[~dear].max())
    assert found.cost.flops == routed.cost(MODEL).flops <= BETWEEN * 1.001
    assert routed.provenance["planner"] == "router" and routed.provenance["baseline"]["steps"] == 6
    assert found.settings["single"] == CHEAP.digest() and found.settings["routed"] == routed.digest()
    found.save(tmp_path / "found.json")
    again = PlanResult.load(tmp_path / "found.json")
    assert isinstance(again.plan, RoutedPlans) and again.plan.digest() == routed.digest()
    assert again.plan.provenance == routed.provenance
    with pytest.raises(PlanError, match="2 plans, one per class"):
        _ = again.single


def test_where_routing_does_not_pay_one_plan_is_for_all() -> None:
    found = get_planner("router")(MODEL, f"{BETWEEN / 1e9} GFLOP", objective=Likes(Plan), **OPTIONS)
    assert found.single.digest() == CHEAP.digest()
    assert [f["score"]["value"] for f in found.settings["finalists"]] == [0.1, 0.2]


def test_with_room_for_all_every_class_has_its_best() -> None:
    budget = f"{DEAR.cost(MODEL).flops * 1.01 / 1e9} GFLOP"
    found = search(MODEL, budget, "router", objective=Likes(RoutedPlans), **OPTIONS)
    assert isinstance(found.plan, RoutedPlans) and found.settings["price"] == 0.0
    best = (gains(3) > 0.0).tolist()
    assert [found.plan.plans[p].digest() == DEAR.digest() for p in found.plan.table[:10]] == best


def test_ready_plans_are_known_ones_and_a_distance_decides() -> None:
    from pliant.planning import RelativeObjective

    judge = RelativeObjective(MODEL, Plan.uniform(MODEL, 6), None, 20)
    found = search(MODEL, "60%", "router", steps=6, num=2, objective=judge)
    assert len(found.settings["plans"]) >= 3 and found.quality is not None and found.quality.samples == 20
    full = Plan.uniform(MODEL, 6).cost(MODEL).flops
    assert found.cost.flops <= 0.601 * full
    assert min(p["flops"] for p in found.settings["plans"]) < 0.3 * full


def test_latents_are_compared_whole_whatever_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective without features of its own: those of the default one, which does not cut latents at 1."""
    from pliant.planning import distribution
    from pliant.planning.relative import REACH
    from support.networks import tiny_denoiser

    seen: list[float] = []
    real = distribution.to_uint8

    def noting(images: torch.Tensor) -> torch.Tensor:
        seen.append(float(images.abs().max()))
        return real(images)

    monkeypatch.setattr(distribution, "to_uint8", noting)
    model = tiny_denoiser(in_channels=4)
    plans = (Plan.uniform(model, 1), Plan.uniform(model, 2))
    search(model, "60%", "router", steps=4, num=1, plans=plans, objective=Likes(Plan))
    whole = pliant.sample(model, Plan.uniform(model, 4), [k % model.num_classes for k in range(model.num_classes)])
    assert seen[0] == pytest.approx(float(whole.abs().max()) / REACH, rel=0.05)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="budget of FLOPs"):
        search(MODEL, "2 s", "router")
    with pytest.raises(PlanError, match=r"no ready plan within the budget; the cheapest: .* GFLOP"):
        search(MODEL, "1 MFLOP", "router", plans=(DEAR,))
    with pytest.raises(PlanError, match="num of 1 or more"):
        search(MODEL, "50%", "router", num=0)
    with pytest.raises(PlanError, match="2 plans, one per class, where a single one is needed"):
        pliant.plan(MODEL, f"{BETWEEN / 1e9} GFLOP", search="router", objective=Likes(RoutedPlans), **OPTIONS)
    routed = RoutedPlans((CHEAP, DEAR), (0, 1))
    with pytest.raises(PlanError, match="class 9 is not in it"):
        routed.cost(MODEL)
    with pytest.raises(PlanError, match="no seconds before a batch"):
        pliant.plans.parse_budget("2 s").spent(routed, MODEL)
    from pliant.planning import TrajectoryError

    with pytest.raises(PlanError, match="those of one plan"):
        TrajectoryError(MODEL, seeds=range(2))(routed)


def test_the_cost_is_that_of_the_classes() -> None:
    routed = RoutedPlans((CHEAP, DEAR), (0, 1, *[0] * 8))
    cheap, dear = CHEAP.cost(MODEL).flops, DEAR.cost(MODEL).flops
    assert routed.cost(MODEL).flops == round((9 * cheap + dear) / 10)
    assert routed.cost(MODEL, [1, 1]).flops == dear
    assert "0 2-9" in routed.describe(MODEL) and DEAR.digest() in routed.describe(MODEL)
