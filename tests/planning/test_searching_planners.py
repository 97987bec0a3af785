"""S3, AutoDiffusion, Flexiffusion and auto: what they may choose, what they keep to, and that they find the best."""

import json
import random
from copy import deepcopy
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

import pliant
from pliant.compute import Compute
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.paths import get_path
from pliant.planning import Score
from pliant.planning.auto import auto
from pliant.planning.autodiffusion import autodiffusion
from pliant.planning.distribution import FRESH
from pliant.planning.flexiffusion import Segments, flexiffusion, segment_plan
from pliant.planning.openings import openings
from pliant.planning.plan_space import Menu, PlanSpace
from pliant.planning.predictor import fit_ranker
from pliant.planning.racing import cheaper
from pliant.planning.registry import get_planner
from pliant.planning.relative import PooledFeatures, RelativeObjective
from pliant.planning.s3 import NAMED, features_of, s3, schedule
from pliant.planning.task import Task
from pliant.plans import Budget, Plan, sample
from pliant.plans.budget import SLACK
from pliant.plans.timing.table import Throughput, network_kind
from pliant.solvers import compile_program, get_solver, normal_form
from support.planning import FlowError
from support.throughput import line, synthetic_table

MODEL = pliant.load("digits")
FEW = {"solvers": ["dpmpp-2m", "unipc-3"], "caches": False, "fit": False}
VP = get_path("vp-discrete", betas="scaled-linear")
FULL = Plan.uniform(MODEL, 50, guidance=1.5).cost(MODEL).flops


class Judge:
    """A stand-in for a measure: any function of a plan, counted."""

    name = "made up"

    def __init__(self, value):
        self.value, self.asked = value, []

    def describe(self):
        return {"objective": self.name}

    def __call__(self, plan):
        self.asked.append(plan)
        value = float(self.value(plan))
        return Score(value, value, value, 1)


def share(plan: Plan) -> float:
    return plan.cost(MODEL).flops / FULL


def weak(step) -> bool:
    return step.compute.patch == (2, 2)


def wants_weak_first(plan: Plan) -> float:
    """Least for seven steps, the first three weak, unguided before t = 0.6 and guided after, of order three."""
    n = len(plan.steps)
    wrong = sum(weak(s) != (k < 3) for k, s in enumerate(plan.steps))
    unguided = sum((s.guidance is None) != (s.t > 0.6) for s in plan.steps)
    solver = sum(s.solver.name != "dpmpp-3m" for s in plan.steps)
    return abs(n - 7) + wrong + unguided + 0.5 * solver / n


# auto -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_finds_a_planted_plan_that_no_single_technique_has():
    judge = Judge(wants_weak_first)
    found = auto(MODEL, "10%", objective=judge, guidance=1.5, evaluations=300, seed=0, fit=False)
    task = Task.begin("auto", MODEL, "10%", judge, 50, 1.5, 0, None)
    singles = min(wants_weak_first(p) for p in openings(task, Menu.of(MODEL, Guidance.cfg(1.5))))
    assert singles > 2.0
    assert found.quality.value <= 1.5
    assert all(share(p) <= 0.1 + 1e-3 for p in judge.asked), "every plan that was measured keeps to the budget"
    assert found.planner == "auto" and found.plan.provenance["planner"] == "auto"
    assert 225 <= found.settings["search"]["measured"] <= 300, "a quarter is for knobs, which stop when nothing helps"
    flops = [c.cost.flops for c in found.frontier]
    assert flops == sorted(flops)


def test_auto_is_never_worse_than_what_it_starts_from():
    """A plan that no change improves, in a landscape that is flat elsewhere."""
    winner = Plan.uniform(MODEL, 4, "unipc-3", guidance=1.5)
    judge = Judge(lambda plan: 0.0 if plan.digest() == winner.digest() else 1.0)
    found = auto(MODEL, "10%", objective=judge, guidance=1.5, evaluations=20, starts=[winner], **FEW)
    assert found.plan.digest() == winner.digest() and found.quality.value == 0.0
    # One that costs more than the budget is not taken.
    dear = Plan.uniform(MODEL, 40, guidance=1.5)
    judge = Judge(lambda plan: -len(plan.steps))
    found = auto(MODEL, "10%", objective=judge, guidance=1.5, evaluations=20, starts=[dear], **FEW)
    assert share(found.plan) <= 0.1 + 1e-3


def misleading() -> Throughput:
    """A table in which FLOPs mislead: coarse patches take as long as fine ones, further terms of a sum as long as half
    a call."""
    table = synthetic_table(MODEL, (None,), faster=0.9)
    half = 0.5 * table.networks[network_kind(MODEL, Compute())]["call"].at(1)
    return replace(table, outside={**table.outside, "term": line(half)})


@pytest.mark.parametrize("fit", [False, True])
def test_auto_keeps_to_seconds(fit):
    """What is measured, what comes out and all finalists keep to the seconds."""
    table = misleading()
    full = Budget(seconds=1.0, batch=2, throughput=table).spent(Plan.uniform(MODEL, 12, guidance=1.5), MODEL)
    budget = Budget(seconds=0.3 * full, batch=2, throughput=table)
    judge = Judge(lambda plan: 100 - len(plan.steps) + 0.01 * len({s.solver.name for s in plan.steps}))
    options = {"evaluations": 12, "solvers": ["dpmpp-2m", "dpmpp-3m"], "seed": 0, "finalists": 2}
    found = auto(MODEL, budget, objective=judge, steps=12, guidance=1.5, fit=fit, **options)
    spent = [budget.spent(plan, MODEL) for plan in [*judge.asked, found.plan, *(c.plan for c in found.frontier)]]
    assert max(spent) <= (0.3 + SLACK) * full * (1 + 1e-9) and budget.spent(found.plan, MODEL) > 0.2 * full
    # The same share of FLOPs would have bought plans that take longer.
    flops = auto(MODEL, "30%", objective=Judge(judge.value), steps=12, guidance=1.5, fit=False, **options)
    assert budget.spent(flops.plan, MODEL) > max(spent)


def test_auto_repeats_itself_and_resumes(tmp_path):
    options = {"guidance": 1.5, "evaluations": 60, "seed": 2, **FEW}
    whole = auto(MODEL, "10%", objective=Judge(wants_weak_first), **options)
    again = auto(MODEL, "10%", objective=Judge(wants_weak_first), **options)
    assert again.plan.digest() == whole.plan.digest()
    file = tmp_path / "auto.jsonl"

    class Killed(BaseException):
        pass

    def dies(plan):
        if len(broken.asked) > 47:
            raise Killed
        return wants_weak_first(plan)

    broken = Judge(dies)
    with pytest.raises(Killed):
        auto(MODEL, "10%", objective=broken, journal=file, **options)
    rest = Judge(wants_weak_first)
    resumed = auto(MODEL, "10%", objective=rest, journal=file, **options)
    assert resumed.plan.to_dict()["steps"] == whole.plan.to_dict()["steps"]
    assert resumed.quality == whole.quality
    assert len(rest.asked) < 25
    done = Judge(wants_weak_first)
    assert auto(MODEL, "10%", objective=done, journal=file, **options).plan.digest() == whole.plan.digest()
    assert not done.asked, "a finished search is only read"
    with pytest.raises(PlanError, match="another search"):
        auto(MODEL, "20%", objective=Judge(wants_weak_first), journal=file, **options)
    trained = replace(MODEL, network=deepcopy(MODEL.network))  # the same architecture, and another model
    with torch.no_grad():
        next(trained.network.parameters()).mul_(1.01)
    assert trained.fingerprint() == MODEL.fingerprint()
    with pytest.raises(PlanError, match="differs in weights"):
        auto(trained, "10%", objective=Judge(wants_weak_first), journal=file, **options)
    with pytest.raises(PlanError, match="differs in options"):  # other solvers would end elsewhere
        auto(MODEL, "10%", objective=Judge(wants_weak_first), journal=file, **{**options, "solvers": ["ddim"]})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("auto", {"evaluations": 20, "num": 30, "knobs": False, **FEW}),
        ("s3", {"evaluations": 9, "finalists": 2, "predictor": False}),
        ("dc-solver", {"samples": 8, "trials": 3, "orders": (2,)}),
    ],
)
def test_settings_are_enough_to_repeat_a_search(name, given):
    """Everything that decides stands in the result's settings, defaults too."""
    judge = Judge(lambda plan: abs(plan.steps[-1].t - 0.31) + 0.01 * len(plan.steps))
    found = get_planner(name)(MODEL, "8%", objective=judge, steps=40, guidance=1.5, seed=3, **given)
    kept = json.loads(json.dumps(found.settings))
    for key, value in given.items():
        there = {**kept["options"], **kept.get("effort", {})}[key]
        assert there == (list(value) if isinstance(value, tuple) else value)
    same = {key: kept[key] for key in ("steps", "guidance", "seed")}
    again = get_planner(name)(
        MODEL, kept["budget"], objective=Judge(judge.value), **same, **kept["options"], **kept.get("effort", {})
    )
    assert again.plan.digest() == found.plan.digest() and again.settings["options"] == kept["options"]
    assert again.evaluations == found.evaluations


@pytest.mark.parametrize(("name", "options"), [("s3", {"evaluations": 4}), ("auto", {"evaluations": 8, **FEW})])
def test_searches_are_confirmed_on_images_that_they_did_not_search_on(name, options):
    objective = RelativeObjective(MODEL, Plan.uniform(MODEL, 8), num=30)
    found = get_planner(name)(MODEL, "40%", objective=objective, steps=8, num=20, **options)
    assert found.settings["confirmed_by"]["seeds"] == f"{FRESH}..{FRESH + 29}"
    assert found.settings["search"]["objective"]["seeds"] == "0..19"
    assert found.quality == objective.on_fresh_seeds()(found.plan) != objective(found.plan)
    assert 2 <= len(found.settings["finalists"]) <= 4


def test_autodiffusion_counts_both_stages():
    judge = Judge(lambda plan: abs(plan.steps[-1].t - 0.31))
    found = autodiffusion(MODEL, "10%", objective=judge, guidance=1.5, steps=40, evaluations=30)
    assert found.settings["search"]["measured"] == len({p.digest() for p in judge.asked})


def test_auto_runs_other_planners_first():
    judge = Judge(lambda plan: 0.0 if plan.provenance.get("preset") == "weak-to-powerful" else 1.0)
    found = auto(MODEL, "10%", objective=judge, guidance=1.5, evaluations=20, planners=["weak-split"], **FEW)
    assert found.plan.provenance["preset"] == "weak-to-powerful"
    with pytest.raises(PlanError, match="did you mean 'weak-split'"):
        auto(MODEL, "10%", objective=judge, guidance=1.5, evaluations=20, planners=["weak-splits"], **FEW)


def test_auto_with_too_little_says_what_the_least_is():
    with pytest.raises(PlanError, match=r"below the cheapest plan of planner 'auto', which costs 0\.2% of full"):
        auto(MODEL, "0.01%", objective=Judge(len), guidance=1.5, **FEW)
    with pytest.raises(PlanError, match="at least 1 evaluation"):
        auto(MODEL, "10%", objective=Judge(len), evaluations=0)


def test_openings_spend_the_budget_in_many_ways():
    task = Task.begin("auto", MODEL, "10%", None, 50, 1.5, 0, None)
    plans = openings(task, Menu.of(MODEL, Guidance.cfg(1.5)))
    spent = [share(p) for p in plans]
    assert len({p.digest() for p in plans}) == len(plans) > 30
    assert max(spent) <= 0.1 + 1e-3 and sorted(spent)[len(spent) // 2] > 0.08
    assert any("caching" in p.provenance for p in plans)
    assert any(all(map(weak, p.steps)) for p in plans)
    assert any(s.guidance is not None and s.guidance.against == "weak" for p in plans for s in p.steps)


def test_variations_always_run_and_keep_to_the_budget():
    task = Task.begin("auto", MODEL, "10%", None, 50, 1.5, 0, None)
    menu = Menu.of(MODEL, task.cfg)
    space = PlanSpace(task, menu, [])
    space.starts = [space.encode(p) for p in openings(task, menu)]
    rng = random.Random(0)
    values = space.starts[:4]
    seen = set()
    dropped = 0
    for k in range(60):
        if k % 3 == 0:
            value = space.sample(rng)
        else:
            value = space.mutate(rng.choice(values), rng) if k % 3 == 1 else space.cross(*values[:2], rng)
        value = space.repair(value, rng)
        if value is None:
            dropped += 1
            continue
        assert json.loads(json.dumps(value)) == value
        plan = space.decode(value)
        assert task.fits(plan)
        times = plan.times
        assert all(a > b for a, b in pairwise(times)) and times[0] == 1.0
        seen.add(plan.digest())
        values = [value, *values[:5]]
    assert len(seen) > 40 and dropped < 10


def test_fitted_coefficients_of_any_plan():
    """At the same cost nearer to the teacher that it names; caches and remembered references cannot be fitted."""
    from pliant.planning.refit import refitted, teacher_of

    plan = Plan.weak_to_powerful(MODEL, 5, weak_steps=2, guidance=1.5)
    plan = plan.with_steps([replace(s, guidance=None) if s.t < 0.3 else s for s in plan.steps])
    fitted = refitted(MODEL, plan, samples=12)
    assert fitted.cost(MODEL).flops == plan.cost(MODEL).flops and fitted.times == plan.times
    teacher = teacher_of(MODEL, plan)
    assert all((s.guidance is None) == (s.t <= 0.2 + 1e-9) and s.compute == Compute() for s in teacher.steps)
    labels, seeds = list(range(10)), list(range(10))
    target = sample(MODEL, teacher, labels, seeds)
    error = [float((sample(MODEL, p, labels, seeds) - target).square().mean()) for p in (plan, fitted)]
    assert error[1] < 0.6 * error[0]
    assert refitted(MODEL, Plan.uniform(MODEL, 6).cached(MODEL, "fora", interval=2)) is None
    assert refitted(MODEL, Plan.uniform(MODEL, 4, "heun")) is None


@pytest.mark.slow
def test_auto_takes_fitted_coefficients_where_they_are_better():
    judge = Judge(lambda plan: 0.0 if plan.steps[0].solver.name == "rows" else 1.0 + len(plan.steps))
    found = auto(MODEL, "4%", objective=judge, guidance=1.5, evaluations=12, **{**FEW, "fit": True})
    assert found.plan.steps[0].solver.name == "rows" and found.quality.value == 0.0
    assert found.plan.provenance["fitted"]["seed"] == 0
    judge = Judge(judge.value)
    found = auto(MODEL, "4%", objective=judge, guidance=1.5, evaluations=12, **FEW)
    assert found.quality.value > 0.0


def test_a_cached_plan_is_a_plan_and_a_preset():
    task = Task.begin("auto", MODEL, "50%", None, 50, 1.5, 0, None)
    space = PlanSpace(task, Menu.of(MODEL, task.cfg), [])
    cached = Plan.uniform(MODEL, 12, guidance=1.5).cached(MODEL, "fora", interval=3)
    value = space.encode(cached)
    assert value["cache"] == {"name": "fora", "interval": 3}
    assert all(s.compute == Compute() for s in Plan.from_dict(value["plan"]).steps)
    assert space.decode(value).digest() == cached.digest()


# S3 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "dpm-2m", "dpmpp-3m", "deis-3"])
def test_schedules_of_named_solvers_are_those_solvers(name):
    times = Plan.uniform(MODEL, 6).times
    known = {"name": "dpm-3m" if name == "deis-3" else name}
    if name != "ddim":  # the named ones lower their order at the end
        known["lower_order_final"] = False
    schedules = (schedule(MODEL.path, [{"t": t, **NAMED[name]} for t in times[:-1]]), [get_solver(known)] * 6)
    a, b = (normal_form(compile_program(MODEL.path, times, s, "velocity", False, [])).rows() for s in schedules)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_s3_improves_on_its_named_solvers():
    """By the error to the teacher, 40 evaluations of 5 steps (24 of them the named schedules)."""
    from pliant.planning import SampleError, TeacherSettings

    objective = SampleError(MODEL, TeacherSettings(40), range(8))
    found = s3(MODEL, "10%", objective=objective, evaluations=40, finalists=1, seed=0)
    solvers = ("ddim", "dpmpp-2m", "unipc-3", "dpmpp-3m", "deis-3")
    named = [objective(Plan.uniform(MODEL, 5, solver)).value for solver in solvers]
    assert len(found.plan.steps) == 5 and share(found.plan) <= 0.1
    assert found.quality.value < 0.9 * min(named)


@pytest.mark.parametrize("predictor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_s3_beats_named_solvers_on_the_mixture(predictor):
    """Sheet D, 4, (3): gmm2d, 6 calls, 300 evaluations, at least 1.3 times better than the best of four, on other
    starts too. Measured, 6 and 4 seeds: PLMS .0177, S3 .00019 to .00046, with the predictor .00016 to .00025."""
    model = replace(MODEL, path=VP)
    judge, fresh = FlowError(model), FlowError(model, 256, seed=1)
    found = s3(model, "12.4%", objective=judge, evaluations=300, finalists=1, seed=0, predictor=predictor)
    named = [Plan.uniform(model, 6, solver) for solver in ("ddim", "dpmpp-2m", "unipc-3")]
    named.append(Plan.uniform(model, 5, "plms"))
    assert {p.cost(model).evaluations for p in (found.plan, *named)} == {6}
    for measure in (judge, fresh):
        assert 1.3 * measure(found.plan).value < min(measure(p).value for p in named)


def test_s3_keeps_to_seconds():
    """Also by a measure that wants terms which take longer than the budget has."""
    table = misleading()
    full = Budget(seconds=1.0, throughput=table).spent(Plan.uniform(MODEL, 10), MODEL)
    budget = Budget(seconds=0.4 * full, throughput=table)
    judge = Judge(lambda plan: -sum(s.solver.order for s in plan.steps))
    found = s3(MODEL, budget, objective=judge, steps=10, evaluations=40, finalists=2, predictor=False)
    assert max(budget.spent(plan, MODEL) for plan in judge.asked) <= (0.4 + SLACK) * full * (1 + 1e-9)
    assert len(found.plan.steps) == 4 and found.quality.value < -4.0, "what is left of the time is used"


def test_the_predictor_ranks_schedules_it_has_not_seen():
    rng = random.Random(0)

    def drawn():
        return [{"t": t, "order": rng.randint(1, 4), "form": rng.choice(["sample", "epsilon"]), "nodes": 1,
                 "scale": "none", "kappa": 0.0, "corrector": rng.choice(["none", "pseudo"])}
                for t in sorted((rng.random() for _ in range(6)), reverse=True)]  # fmt: skip

    def worth(rows):
        return sum((r["form"] == "epsilon") + 0.3 * r["order"] - (r["corrector"] == "pseudo") for r in rows)

    known, new = [drawn() for _ in range(80)], [drawn() for _ in range(60)]
    encode = lambda rows: features_of(MODEL.path, rows)  # noqa: E731
    predict = fit_ranker([encode(k) for k in known], [worth(k) for k in known], seed=0)
    order = torch.tensor(predict([encode(k) for k in new])).argsort().argsort().double()
    truth = torch.tensor([worth(k) for k in new]).argsort().argsort().double()
    spearman = float(torch.corrcoef(torch.stack([order, truth]))[0, 1])
    assert spearman > 0.8
    again = fit_ranker([encode(k) for k in known], [worth(k) for k in known], seed=0)
    assert again([encode(new[0])]) == predict([encode(new[0])])


# AutoDiffusion --------------------------------------------------------------------------------------------------------


def test_autodiffusion_trades_layers_for_steps_within_the_budget():
    """A measure that wants many steps, and a little that the last ones are whole: 6 or 7 steps for all of 16 seeds."""

    def value(plan):
        return -len(plan.steps) + 0.1 * sum((s.compute.sites or "").count("K") for s in plan.steps[-2:])

    judge = Judge(value)
    found = autodiffusion(MODEL, "10%", objective=judge, guidance=1.5, evaluations=120, most_skipped=0.4, seed=1)
    assert all(share(p) <= 0.1 + 1e-3 for p in judge.asked)
    assert len(found.plan.steps) >= 6, "five full steps fit; six and more only with skipped layers"
    assert found.quality.value < -5.5
    whole = autodiffusion(MODEL, "10%", objective=Judge(value), guidance=1.5, evaluations=20, most_skipped=0.0)
    assert len(whole.plan.steps) == 5 and all(s.compute == Compute() for s in whole.plan.steps)
    with pytest.raises(PlanError, match="most_skipped"):
        autodiffusion(MODEL, "10%", most_skipped=1.5)


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 10), marks=pytest.mark.slow)])
def test_autodiffusion_finds_the_best_times_of_the_mixture(seeds):
    """Sheet D, 6, (1): 4 steps on gmm2d, ten seeds: no worse than even times in nine, and within 1.3 of the best of all
    969 choices from a grid of 20. Measured: 1.03 to 1.20 of that best, even times 2.47."""
    model = replace(MODEL, path=VP)
    judge = FlowError(model, 32)
    even = Plan.uniform(model, 4, "ddim")
    grid = [even.times[0] * k / 20 for k in range(20, -1, -1)]
    chosen = (Plan.uniform(model, 4, "ddim", times=[grid[0], *inner, 0.0]) for inner in combinations(grid[1:-1], 3))
    best = min(judge(plan).value for plan in chosen)
    options = {"objective": judge, "solver": "ddim", "most_skipped": 0.0, "finalists": 1, "evaluations": 120}
    for seed in seeds:
        found = autodiffusion(model, "8.4%", seed=seed, **options)
        assert len(found.plan.steps) == 4
        assert found.quality.value <= min(1.3 * best, judge(even).value)


# Flexiffusion ---------------------------------------------------------------------------------------------------------


def test_segments_of_one_step_are_the_fine_grid_and_costs_add_up():
    task = Task.begin("flexiffusion", MODEL, "100%", None, 12, 1.5, 0, None)
    whole = segment_plan(task, {"segments": 12, "branch": [1] * 12, "partial": [3] * 12})
    assert whole.digest() == task.full().digest(), "no room for partial steps: the fine sampler itself"
    value = {"segments": 3, "branch": [1, 2, 1], "partial": [2, 0, 3]}
    plan = segment_plan(task, value)
    assert len(plan.steps) == 3 + 2 + 0 + 3
    full, partial = [2 * MODEL.flops(Compute())], []
    for s, flops in zip(plan.steps, plan.cost(MODEL).step_flops, strict=True):
        (partial if s.compute.sites else full).append(flops)
    assert len(set(full)) == 1 and len(partial) == 5 and len(set(partial)) == 1 and partial[0] < 0.7 * full[0]
    # A change of one segment changes that segment's steps only.
    other = segment_plan(task, {**value, "partial": [2, 3, 3]})
    outside = [s for s in plan.steps if not 1 / 3 + 1e-9 < s.t <= 2 / 3 + 1e-9]
    assert outside == [s for s in other.steps if not 1 / 3 + 1e-9 < s.t <= 2 / 3 + 1e-9]
    assert len(other.steps) == len(plan.steps) + 3


def test_segments_cross_one_by_one():
    space = Segments(2, 5, 2, 4)
    a, b = ({"segments": n, "branch": [n] * 5, "partial": [n] * 5} for n in (1, 2))
    child = space.cross(a, b, random.Random(0))
    assert child["branch"] == child["partial"] and set(child["branch"]) == {1, 2}


def test_flexiffusion_by_its_relative_measure():
    full = Plan.uniform(MODEL, 12)
    objective = RelativeObjective(MODEL, full, num=30)
    assert objective(full).value < 1e-4, "the teacher is at no distance from itself"
    found = flexiffusion(MODEL, "50%", objective=objective, steps=12, evaluations=8, finalists=1, seed=0)
    assert share(found.plan) * FULL <= 0.5 * full.cost(MODEL).flops * 1.001
    rough = objective(Plan.uniform(MODEL, 2)).value
    assert found.plan.provenance["planner"] == "flexiffusion" and found.quality.value < rough


def test_relative_distance_ranks_as_the_paired_error_does():
    """Sheet D, 7, (3): ten plans, Spearman at least .7."""
    from pliant.planning import SampleError, TeacherSettings

    task = Task.begin("flexiffusion", MODEL, "100%", None, 12, None, 0, None)
    rows = ((2, "ddim"), (3, "ddim"), (6, "ddim"), (4, "dpmpp-2m"), (8, "dpmpp-2m"))
    plans = [Plan.uniform(MODEL, n, solver) for n, solver in rows]
    plans += [segment_plan(task, {"segments": 3, "branch": [1] * 3, "partial": [p] * 3}) for p in (0, 1, 2)]
    plans += [Plan.weak_to_powerful(MODEL, 6, weak_steps=k) for k in (3, 6)]
    assert len({p.digest() for p in plans}) == 10
    relative = RelativeObjective(MODEL, Plan.uniform(MODEL, 20), num=30)
    paired = SampleError(MODEL, TeacherSettings(20), range(8))
    ranks = [torch.tensor([f(p).value for p in plans]).argsort().argsort().double() for f in (relative, paired)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) >= 0.7


def test_pooled_features_see_sharpness_and_layout():
    features = PooledFeatures(3)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    assert features(x).shape == (4, features.dim)
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert bool((features(smooth)[:, -1] < features(x)[:, -1]).all()), "less power in the highest ring"
    latents = PooledFeatures(5)(torch.randn(2, 5, 4, 6))
    assert latents.shape == (2, 5 * 22) and bool(latents.isfinite().all())


def test_the_cheap_measure_uses_the_first_of_the_same_samples():
    objective = RelativeObjective(MODEL, Plan.uniform(MODEL, 1, compute=Compute.of(2)), num=200)
    cheap = cheaper(objective)
    assert cheap.num == 50 and list(cheap.seeds) == list(objective.seeds)[:50] and cheap.name == objective.name
    assert cheap(objective.full).value < 1e-4
    judge = Judge(len)
    assert cheaper(judge) is judge
    images = sample(MODEL, Plan.uniform(MODEL, 1), [0, 1], [0, 1])
    assert images.shape == (2, 1, 8, 8)
