"""Plans as data: round trips, validation that names the step, costs that match the papers and the counter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pliant.adapters.flexify import flexify
from pliant.compute import WITHOUT_CONDITIONING, Compute, counted_flops
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path
from pliant.plans import Plan, Sampler, Step, parse_budget
from pliant.plans.cost import plan_cost
from pliant.plans.schema import plan_schema
from pliant.solvers import get_solver


def xl_on_meta(*sizes: int) -> Denoiser:
    with torch.device("meta"):
        network = DiT(DiTConfig.named("DiT-XL/2"))
    return flexify(Denoiser(network, get_path("vp-discrete"), "epsilon", NetworkTime.timesteps()), sizes)


@pytest.mark.parametrize(("weak", "published"), [(50, 84.9), (100, 69.7), (150, 54.6)])
def test_relative_compute_of_dit_xl_as_published(weak: int, published: float) -> None:
    # FlexiDiT's 250-step schedules; their ratio leaves conditioning out (sheet A, 1.7).
    plan = Plan.weak_to_powerful(xl_on_meta(4), 250, weak_steps=weak, solver="ddim", guidance=1.5)
    share = plan_cost(plan, xl_on_meta(4), WITHOUT_CONDITIONING).share
    assert 100 * share == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize(("x", "y", "published"), [(130, 130, 64), (70, 70, 46), (30, 0, 29), (90, 50, 46)])
def test_relative_compute_in_the_papers_xy_notation(x: int, y: int, published: int) -> None:
    plan = Plan.weak_to_powerful(
        xl_on_meta(4), 250, weak_steps=250 - x, weak_guidance_steps=x - y, solver="ddim", guidance=1.5
    )
    share = 100 * plan_cost(plan, xl_on_meta(4), WITHOUT_CONDITIONING).share
    r = 0.2434
    assert share == pytest.approx(100 * ((x + y) + (500 - x - y) * r) / 500, abs=0.05)
    assert round(share) in (published, published - 1)  # the paper rounds 45.5 up and 28.9 up


@pytest.mark.parametrize("budget", [0.849, 0.697, 0.546])
def test_budget_inverts_the_closed_form(budget: float) -> None:
    model = xl_on_meta(4)
    plan = Plan.weak_to_powerful(model, 250, budget, solver="ddim")
    r = model.flops(Compute.of(4)) / model.flops()
    weak = sum(s.compute.patch == (4, 4) for s in plan.steps)
    assert abs(weak - 250 * (1 - budget) / (1 - r)) <= 1  # within one step of sheet A 1.7's inverse
    assert plan.cost(model).share <= budget + 5e-4
    fewer = Plan.weak_to_powerful(model, 250, weak_steps=weak - 1, solver="ddim")
    assert fewer.cost(model).share > budget + 5e-4  # it is the most expensive split that fits


def test_cost_equals_the_counted_flops(make) -> None:
    model = make("flow")
    plan = Plan.weak_to_powerful(model, 6, 0.6, solver="heun", guidance=2.0, weak_guidance_steps=1)
    plan = plan.with_steps(replace(s, compute=replace(s.compute, precision="fp32")) for s in plan.steps)
    sampler = Sampler(model, plan)
    counted = counted_flops(lambda: sampler([1, 2, 3], [0, 1, 2]))
    # Tables compute the modulations once per distinct label instead of once per image: the run may only be cheaper.
    stated = 3 * plan.cost(model).flops
    modulations = 3 * plan_cost(plan, model, WITHOUT_CONDITIONING).flops
    assert modulations <= counted <= stated
    assert counted == pytest.approx(stated, rel=0.05)


def test_heun_counts_its_evaluations(make) -> None:
    model = make("flow", flexible=False)
    cost = Plan.uniform(model, 10, "heun", guidance=3.0).cost(model)
    assert (cost.evaluations, cost.calls) == (19, 38)  # two per step, one on the last step to clean data
    assert cost.flops == 38 * model.flops() == cost.full_flops


def test_json_round_trip_is_exact(make, tmp_path: Path) -> None:
    model = make("ddpm")
    plan = Plan.weak_to_powerful(model, 13, 0.7, solver={"name": "ddim", "eta": 0.3}, guidance=1.7)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.digest() == plan.digest()
    assert torch.equal(Sampler(model, again)([1], [3]), Sampler(model, plan)([1], [3]))


def test_every_field_of_a_plan_is_in_the_schema(make) -> None:
    plan = Plan.weak_to_powerful(make("flow"), 5, 0.8, guidance=2.0, weak_guidance_steps=1)

    def keys(data: object, schema: dict) -> None:  # type: ignore[type-arg]
        schema = schema.get("anyOf", [schema])[0]
        if isinstance(data, dict) and "properties" in schema:
            for key, value in data.items():
                if schema["additionalProperties"] is False:
                    assert key in schema["properties"], key
                keys(value, schema["properties"].get(key, {}))
        elif isinstance(data, list) and "items" in schema:
            for value in data:
                keys(value, schema["items"])

    keys(json.loads(json.dumps(plan.to_dict())), plan_schema())


def broken(plan: Plan, **changes: object) -> dict:  # type: ignore[type-arg]
    return {**plan.to_dict(), **changes}


def test_files_that_are_not_plans_get_one_clear_line(make, tmp_path: Path) -> None:
    plan = Plan.uniform(make("flow"), 3)
    for data, words in [
        ([], "not a plan"),
        (broken(plan, format="other"), "not a plan"),
        (broken(plan, version=99), "version 99"),
        (broken(plan, stepps=[]), "unknown field 'stepps': did you mean 'steps'"),
        (broken(plan, steps=[{"t": 1.0, "solver": {"name": "heunn"}}]), "step 0 of the plan: unknown solver 'heunn'"),
        (broken(plan, steps=[*plan.to_dict()["steps"], {"t": 0.1, "solvr": "a"}]), "step 3 of the plan: unknown field"),
        (broken(plan, steps=[{"solver": "ddim"}]), "step 0 of the plan lacks the field 't'"),
        (broken(plan, steps=[]), "at least one step"),
    ]:  # fmt: skip
        with pytest.raises(PlanError, match=words):
            Plan.from_dict(data)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(PlanError, match="not readable JSON"):
        Plan.load(tmp_path / "x.json")
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "y.json")


def test_a_plan_for_another_model_is_refused(make) -> None:
    plan = Plan.uniform(make("flow"), 3)
    with pytest.raises(PlanError, match="made for"):
        plan.check(make("sit"))
    plan.check(make("flow", flexible=False))  # the same network without its added sizes runs full-compute plans


def test_validation_names_the_step(make) -> None:
    model, heun = make("flow"), get_solver("heun")
    base = Plan.uniform(model, 4, heun)

    def with_step(i: int, **changes: object) -> Plan:
        steps = list(base.steps)
        steps[i] = replace(steps[i], **changes)  # type: ignore[arg-type]
        return base.with_steps(steps)

    for plan, words in [
        (with_step(2, compute=Compute.of(3)), r"step 2 .*patch sizes 1x1, 2x2, 4x4, not 3x3"),
        (with_step(1, compute=Compute.of(4), guidance=Guidance.cfg(2.0, Compute.of(2))), "step 1 .*finer"),
        (with_step(3, guidance=Guidance.weak_model(1.2, Compute())), "step 3 .*nowhere"),
        (with_step(0, guidance=Guidance.cfg(2.0, channels=3)), "step 0 .*3 channels, the model has 2"),
    ]:
        with pytest.raises(PlanError, match=words):
            plan.check(model)


def test_budgets_as_people_write_them() -> None:
    assert parse_budget("60%").share == parse_budget(0.6).share == parse_budget("0.6").share == 0.6
    assert parse_budget("30 TFLOP").flops == 30e12
    assert parse_budget("1.5e9flops").flops == 1.5e9
    for bad, words in [("fast", "cannot read"), ("60", "did you mean 60%"), ("0", "cannot read"), ("1.2.3", "cannot")]:
        with pytest.raises(PlanError, match=words):
            parse_budget(bad)


def test_a_budget_below_the_cheapest_schedule_says_what_the_least_is(make) -> None:
    model = make("flow")
    least = Plan.weak_to_powerful(model, 10, weak_steps=10).cost(model).share
    with pytest.raises(PlanError, match=f"{least:.1%}"):
        Plan.weak_to_powerful(model, 10, least - 0.01)
    assert Plan.weak_to_powerful(model, 10, least + 0.001).cost(model).share == pytest.approx(least)


def test_flops_budget(make) -> None:
    model = make("flow")
    full = Plan.uniform(model, 10).cost(model).flops
    plan = Plan.weak_to_powerful(model, 10, f"{0.5 * full / 1e6} MFLOP")
    assert 0.35 * full < plan.cost(model).flops <= 0.501 * full


def test_weak_last_is_the_mirrored_schedule(make) -> None:
    model = make("flow")
    first = Plan.weak_to_powerful(model, 10, weak_steps=4, solver="ddim")
    last = Plan.weak_to_powerful(model, 10, weak_steps=4, solver="ddim", weak_last=True)
    assert [s.compute for s in last.steps] == [s.compute for s in first.steps][::-1]
    assert first.cost(model).flops == last.cost(model).flops


def test_describe_totals(make) -> None:
    model = make("flow")
    text = Plan.weak_to_powerful(model, 10, weak_steps=4, solver="ddim", guidance=1.5).describe(model)
    lines = text.splitlines()
    assert lines[2].startswith("0-3") and "4x4" in lines[2] and lines[3].startswith("4-9")
    assert "20 network calls" in lines[-1]


def test_step_defaults_read_back() -> None:
    assert Step.from_dict({"t": 0.5, "solver": "ddim"}) == Step(0.5, get_solver("ddim"))


def test_budget_asks_the_same_of_every_plan(make) -> None:
    model = make()
    full = Plan.uniform(model, 10)
    half = Plan.uniform(model, 5)
    share, flops = parse_budget("50%"), parse_budget(f"{full.cost(model).flops // 2} FLOP")
    for budget in (share, flops):
        assert budget.spent(half, model) == half.cost(model).flops
        assert budget.limit(full, model) == pytest.approx((0.5 + 5e-4) * full.cost(model).flops)
        assert budget.fits(half, full, model) and not budget.fits(Plan.uniform(model, 6), full, model)
    assert share.describe(share.spent(half, model), full, model).startswith("50.0% of full compute")
