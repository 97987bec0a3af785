"""`pliant.plan`: found in advance, closed forms, searches, and what it refuses."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import pliant
from pliant.errors import PlanError
from pliant.planning import PlanResult, SampleError, Score, TeacherSettings, default_objective, known, ready, search
from pliant.planning.distribution import FRESH
from pliant.planning.journal import Journal
from pliant.planning.planner import read_time
from pliant.planning.racing import Effort, finalists, within
from pliant.planning.task import Task
from pliant.planning.teacher import weights_of
from pliant.plans import Budget, Plan
from support.throughput import synthetic_table

MODEL = pliant.load("digits")
FULL = Plan.uniform(MODEL, 50, guidance=1.5).cost(MODEL).flops


class FewSteps:
    """Likes few steps."""

    name = "number of steps"

    def describe(self):
        return {"objective": self.name}

    def __call__(self, plan):
        value = float(len(plan.steps))
        return Score(value, value, value)


def test_a_plan_within_the_budget_without_sampling():
    plan = pliant.plan(MODEL, "30%", guidance=2.5)
    assert plan.cost(MODEL).flops <= 0.3005 * FULL
    assert isinstance(plan, Plan)


def test_a_model_of_one_patch_size_gets_fewer_steps():
    plain = replace(MODEL, network=MODEL.network.base, metadata={})
    found = known(plain, "10%", guidance=1.5)
    assert len(found.plan.steps) == 5 and found.planner == "closed-form" and found.quality is None
    with pytest.raises(PlanError, match=r"the budget 1% is below the cheapest plan .* costs 2\.0% of full compute"):
        pliant.plan(plain, "1%", guidance=1.5)


@pytest.mark.parametrize("budget", ["30 GFLOP", Budget(seconds=1e6, throughput=synthetic_table(MODEL))])
def test_more_than_full_compute_is_full_compute(budget):
    """And not a teacher of a thousand steps."""
    plain = replace(MODEL, network=MODEL.network.base, metadata={})
    assert Task.begin("boss", MODEL, budget, None, 50, 1.5, 0, None).most_steps() == 50
    assert pliant.plan(MODEL, budget, guidance=1.5).steps == Plan.uniform(MODEL, 50, guidance=1.5).steps
    if isinstance(budget, str):  # the table is of the other model
        assert len(pliant.plan(plain, budget, steps=20).steps) == 20


@pytest.mark.parametrize(("name", "options"), [("s3", {"evaluations": 3}), ("gits", {"nodes": 8, "samples": 4})])
def test_what_was_chosen_by_a_given_proxy_is_confirmed_by_a_distribution(name, options):
    proxy = SampleError(MODEL, TeacherSettings(20), range(6))
    found = search(MODEL, "30%", name, steps=8, objective=proxy, **options)
    assert found.objective == "relative Fréchet distance (digits-classifier)"
    assert found.settings["believed"]["objective"] == proxy.name
    assert found.settings["confirmed_by"]["seeds"] == f"{FRESH}..{FRESH + 255}"


def test_what_a_planner_chose_is_confirmed_on_fresh_seeds():
    """By full compute's own samples where a proxy chose, else by what chose; closed forms measured nothing."""
    quick = {"steps": 6, "nodes": 6, "samples": 2}
    found = search(MODEL, "35%", "boss", **quick)
    assert found.objective == "relative Fréchet distance (digits-classifier)"
    assert found.settings["believed"]["objective"] == "error to the teacher's samples"
    assert found.settings["confirmed_by"]["seeds"] == f"{FRESH}..{FRESH + 255}"
    judge = default_objective(MODEL, 6, num=40)
    found = search(MODEL, "35%", "boss", objective=judge, **quick)
    assert found.settings["confirmed_by"]["seeds"] == f"{FRESH}..{FRESH + 39}"
    assert found.settings["believed"]["quality"] == judge(found.plan).to_dict()
    assert search(MODEL, "35%", "weak-split", steps=6).quality is None
    assert search(MODEL, "35%", "weak-split", steps=6, objective=FewSteps()).quality.value == 2.0


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path):
    for file in ("/proc/nowhere/search.jsonl", tmp_path):
        with pytest.raises(PlanError, match="journal"):
            Journal(file, {"seed": 0})


def test_a_search_by_name_with_its_evidence():
    found = search(MODEL, "10%", "s3", guidance=1.5, objective=FewSteps(), evaluations=10, seed=3)
    assert found.planner == "s3" and found.quality.value == 5.0 and found.objective == "number of steps"
    assert found.settings["seed"] == 3 and found.settings["budget"] == "10%"
    same = pliant.plan(MODEL, "10%", search="s3", guidance=1.5, objective=FewSteps(), evaluations=10, seed=3)
    assert same.digest() == found.plan.digest()
    back = PlanResult.from_dict(json.loads(json.dumps(found.to_dict())))
    assert back.plan.digest() == found.plan.digest() and len(back.frontier) == len(found.frontier)


def test_a_search_keeps_its_time():
    found = search(MODEL, "10%", "s3", objective=FewSteps(), time="0.5s", predictor=False)
    assert found.settings["search"]["stopped"] == "time"
    assert found.settings["search"]["seconds"] < 5


def test_sampling_full_compute_is_counted_in_the_time():
    """Once before the search, once for fresh seeds; a quarter of the time is left; resumed, it is what it was."""
    judge = default_objective(MODEL, 2, num=20)
    assert 0.0 < judge.seconds < 30.0
    judge.seconds = 7.0
    journal = Journal()
    assert within(Effort(seconds=60.0), judge, journal).seconds == 46.0
    assert within(Effort(seconds=12.0), judge, journal).seconds == 3.0
    assert within(Effort(seconds=12.0), FewSteps(), journal).seconds == 12.0
    assert within(Effort(), judge, journal).seconds is None
    judge.seconds = 1.0
    assert within(Effort(seconds=60.0), judge, journal).seconds == 46.0


def test_finalists_become_fewer_where_time_is_short():
    from pliant.planning.evolution import Evaluated, Evolved
    from pliant.planning.relative import RelativeObjective

    score = Score(1.0, 1.0, 1.0)
    plans = [Plan.uniform(MODEL, n) for n in range(1, 9)]
    evolved = Evolved(tuple(Evaluated(k, score) for k in range(8)), 8.0, "time")
    big = RelativeObjective.__new__(RelativeObjective)
    small = RelativeObjective.__new__(RelativeObjective)
    big.num, small.num = 400, 100
    count = lambda seconds: len(  # noqa: E731 (each finalist takes 4 s)
        finalists(evolved, plans.__getitem__, Effort(seconds=seconds, finalists=6), small, big, ())
    )
    assert count(None) == 6 and count(1000.0) == 6 and count(100.0) == 4 and count(10.0) == 2


def test_the_default_measure_keeps_what_was_asked_for():
    objective = default_objective(MODEL, 6, 1.5, num=20)
    assert objective.full == Plan.uniform(MODEL, 6, guidance=1.5)
    assert objective.extractor.name == "digits-classifier"
    assert objective(objective.full).value < 1e-4
    assert objective(Plan.uniform(MODEL, 6)).value > 0.05, "without guidance it is another distribution"


def test_plans_found_in_advance(tmp_path, monkeypatch):
    """The best of the stored ones that fits, for the same guidance, on the model it was made for."""
    from pliant.planning import ready as module

    folder = tmp_path / "digits" / "plans"
    folder.mkdir(parents=True)
    task = Task.begin("auto", MODEL, "50%", FewSteps(), 50, 1.5, 0, None)
    for steps, quality in ((3, 0.9), (5, 0.4), (20, 0.2)):
        plan = Plan.uniform(MODEL, steps, guidance=1.5)
        facts = {**task.settings, "weights_sha256": weights_of(MODEL)}
        result = PlanResult(plan, plan.cost(MODEL), Score(quality, 0, 1), "made up", "auto", facts)
        result.save(folder / f"{steps}.json")
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    assert len(pliant.plan(MODEL, "10%", guidance=1.5).steps) == 5
    assert len(pliant.plan(MODEL, "9%", guidance=1.5).steps) == 3
    assert len(pliant.plan(MODEL, "45%", guidance=1.5).steps) == 20
    assert pliant.plan(MODEL, "100%", guidance=1.5).provenance["planner"] == "weak-split", "for a far smaller budget"
    assert pliant.plan(MODEL, "10%", guidance=2.0).provenance["planner"] == "weak-split"
    assert known(MODEL, "10%", guidance=1.5).quality == Score(0.4, 0, 1)
    tuned = replace(MODEL, network=deepcopy(MODEL.network))
    with torch.no_grad():
        next(tuned.network.parameters()).mul_(1.01)
    assert known(tuned, "10%", guidance=1.5).plan.digest() == known(MODEL, "10%", guidance=1.5).plan.digest()
    assert known(tuned, "10%", guidance=1.5).quality is None, "what was measured of other weights"
    stranger = replace(MODEL, metadata={"name": "other"})
    assert ready.ready_results(stranger) == []


def test_stored_plans_run_and_keep_to_what_they_say():
    for result in ready.ready_results(MODEL):
        limit = float(result.settings["budget"].rstrip("%")) / 100
        full = Plan.uniform(MODEL, result.settings["steps"], guidance=result.settings["guidance"])
        assert result.plan.cost(MODEL).flops <= (limit + 1e-3) * full.cost(MODEL).flops
        assert result.cost == result.plan.cost(MODEL)
        assert result.quality is not None and "confirmed_by" in result.settings
        assert result.settings["weights_sha256"] == weights_of(MODEL)
        closed = result.settings.get("closed_form")
        if closed is not None:
            assert closed["against"]["low"] <= 0.0 and closed["score"]["samples"] == result.quality.samples
            chosen, judged = (result.settings[k]["seeds"] for k in ("objective", "confirmed_by"))
            assert chosen not in judged, "judged on seeds that did not choose it"


@pytest.mark.parametrize(("budget", "least"), [("5%", 0.9), ("10%", 0.9), ("20%", 0.9), ("40%", 0.9)])
def test_digits_come_with_plans_for_small_budgets(budget, least):
    """Without guidance they are taken before the closed form, and spend most of what they may."""
    result = known(MODEL, budget)
    full = Plan.uniform(MODEL, 50).cost(MODEL).flops
    spent = result.plan.cost(MODEL).flops / full / (float(budget.rstrip("%")) / 100)
    assert result.planner == "auto" and least < spent <= 1.01
    assert result.quality.value < result.settings["closed_form"]["score"]["value"]


def test_what_is_refused():
    with pytest.raises(PlanError, match="did you mean 'auto'"):
        pliant.plan(MODEL, "10%", search="autoo")
    with pytest.raises(PlanError, match="belongs to a search"):
        pliant.plan(MODEL, "10%", time="2min")
    with pytest.raises(PlanError, match=r"takes no limit of time; those that search do: .*auto"):
        pliant.plan(MODEL, "10%", search="boss", time=5)
    with pytest.raises(PlanError, match=r"has no option 'evaluation'.*evaluations"):
        pliant.plan(MODEL, "10%", search="auto", evaluation=5)
    with pytest.raises(PlanError, match="cannot read the budget"):
        pliant.plan(MODEL, "ten")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), (90, 90), ("90 s", 90), ("2min", 120), ("1.5h", 5400)])
def test_times(text, seconds):
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-5", "0", "5 parsecs", ""])
def test_times_that_are_none(text):
    with pytest.raises(PlanError, match="cannot read the time"):
        read_time(text)
