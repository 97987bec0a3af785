"""Weak steps first, in closed form: within the budget, as few weak ones as it allows, and where the spectrum says."""

import pytest
import torch

import pliant
from pliant.compute import Compute
from pliant.compute.spectra import PowerLaw
from pliant.errors import PlanError
from pliant.evaluation.spectrum import switch_time
from pliant.planning import Score, get_planner
from pliant.planning.spectral import spectrum_of, switched, weak_until
from pliant.planning.task import Task
from pliant.planning.weak_split import split
from pliant.plans import Budget, Plan
from support.throughput import synthetic_table

MODEL = pliant.load("digits")
WEAK = Compute.of(patch=2)


class MostWeakSteps:
    """An objective that costs nothing: the more weak steps, the better."""

    name = "weak steps"

    def describe(self) -> dict[str, object]:
        return {"objective": "weak-steps"}

    def __call__(self, plan: Plan) -> Score:
        count = -float(sum(step.compute == WEAK for step in plan.steps))
        return Score(count, count, count)


def task(budget: str, guidance: float | None = None) -> Task:
    return Task.begin("weak-split", MODEL, budget, None, 20, guidance, 0, None)


def test_the_closed_form_takes_the_fewest_weak_steps() -> None:
    full = Plan.uniform(MODEL, 20).cost(MODEL).flops
    for budget in (0.3, 0.5, 0.8):
        plan = split(task(f"{budget:.0%}"), 20, 0, "dpmpp-2m")
        assert plan is not None
        weak = [step.compute == WEAK for step in plan.steps]
        assert weak == sorted(weak, reverse=True), "weak first"
        price = MODEL.flops() - MODEL.flops(WEAK)
        assert plan.cost(MODEL).flops <= (budget + 5e-4) * full < plan.cost(MODEL).flops + price
    assert split(task("20%"), 20, 0, "dpmpp-2m") is None


def test_weak_guidance_buys_powerful_steps() -> None:
    plain, mixed = (split(task("50%", 1.5), 20, between, "ddim") for between in (0, 20))
    assert plain and mixed
    counts = [sum(step.compute == WEAK for step in p.steps) for p in (plain, mixed)]
    assert counts[1] < counts[0]
    assert all(s.guidance and s.guidance.against == "weak" for s in mixed.steps if s.compute != WEAK)


@pytest.mark.parametrize(
    ("budget", "steps", "weak"), [("50%", 25, 0), ("24%", 12, 0), ("12%", 11, 7), ("4%", 5, 4), ("2%", 4, 4)]
)
def test_without_a_measure_steps_are_weak_only_as_far_as_a_dozen_steps_ask_for(budget, steps, weak) -> None:
    """Half weak, as before, was several times further from full compute's samples at every one of these budgets."""
    found = get_planner("weak-split")(MODEL, budget)
    assert (len(found.single.steps), found.single.provenance["weak_steps"]) == (steps, weak)


def test_the_planner_without_and_with_an_objective() -> None:
    found = get_planner("weak-split")(MODEL, "20%", steps=20, guidance=1.5)
    assert found.quality is None and found.objective == "none" and found.evaluations == 0
    weak = sum(step.compute == WEAK for step in found.plan.steps)
    assert 4 <= len(found.plan.steps) <= 12 and weak / len(found.plan.steps) <= 0.8
    most = get_planner("weak-split")(MODEL, "20%", objective=MostWeakSteps(), steps=20, guidance=1.5)
    assert sum(step.compute == WEAK for step in most.plan.steps) > weak
    for result in (found, most):
        assert result.cost.flops <= 0.201 * Plan.uniform(MODEL, 20, guidance=1.5).cost(MODEL).flops
    with pytest.raises(PlanError, match=r"'weak-split', which costs 1\.2%.*: 1 step, patch 2x2; raise the budget$"):
        get_planner("weak-split")(MODEL, "1%", steps=20)


def test_the_spectrum_says_when_to_switch() -> None:
    """Patch 2 of an 8x8 image sees two cycles: t* is the formula at that frequency, and steps switch around it."""
    spectrum = PowerLaw(3.0, 2.0)
    for delta in (0.01, 0.1):
        switch = weak_until(MODEL, spectrum, delta)
        assert switch == pytest.approx(switch_time(3.0 / 4.0, delta), abs=1e-12)
        plan = switched(task("50%"), 20, switch, "ddim")
        for step in plan.steps:
            aligned = step.t / (2 - step.t)
            if step.t < 1.0:
                assert (step.compute == WEAK) == (aligned > switch)
    assert weak_until(MODEL, spectrum, 0.1) < weak_until(MODEL, spectrum, 0.01), "a larger tolerance stays weak longer"


def test_the_spectral_planner_spends_the_budget() -> None:
    found = get_planner("spectral")(MODEL, "30%", steps=20, guidance=1.5, spectrum=PowerLaw(3.0, 2.0))
    full = Plan.uniform(MODEL, 20, guidance=1.5).cost(MODEL).flops
    assert 0.24 * full < found.cost.flops <= 0.301 * full
    assert found.quality is None and found.settings["switch_times"].keys() == {"0.05"}
    chosen = get_planner("spectral")(
        MODEL, "30%", steps=20, objective=MostWeakSteps(), images=torch.randn(4, 1, 8, 8), deltas=(0.05, 0.5)
    )
    assert chosen.settings["spectrum"]["kind"] == "radial" and chosen.evaluations == 2
    with pytest.raises(PlanError, match="planner 'spectral'"):
        get_planner("spectral")(MODEL, "1%", steps=20, spectrum=PowerLaw(3.0, 2.0))


def test_a_model_measures_its_own_spectrum() -> None:
    measured = spectrum_of(Task.begin("spectral", MODEL, "50%", None, 2, None, 0, None), 0, count=16)
    assert measured.at(0.5) > measured.at(4.0) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("weak-split", {}),
        ("spectral", {"spectrum": PowerLaw(3.0, 2.0)}),
        ("joint", {"nodes": 4, "samples": 2, "trials": 1}),
    ],
)
def test_budgets_in_seconds(name: str, options: dict[str, object]) -> None:
    """A made-up table of times: plans keep to the seconds, also with what a plan spends besides its steps."""
    table = synthetic_table(MODEL)
    full = Budget(seconds=1.0, throughput=table).spent(Plan.uniform(MODEL, 10, guidance=1.5), MODEL)
    budget = Budget(seconds=0.45 * full, throughput=table)
    objective = MostWeakSteps() if name == "joint" else None
    found = get_planner(name)(MODEL, budget, objective=objective, steps=10, guidance=1.5, **options)
    least = 0.0 if name == "joint" else 0.25  # four nodes cannot spend it all on weak steps
    assert least * full < budget.spent(found.plan, MODEL) <= 0.4505 * full
    assert found.settings["budget"].endswith("s")
