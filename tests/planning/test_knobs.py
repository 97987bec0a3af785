"""Knobs of whole plans, the pattern search over them, fitted candidates, and what all searching planners take."""

import inspect
import math
import random
from dataclasses import replace

import pytest

import pliant
from pliant.errors import PlanError
from pliant.planning import PLANNERS, Score
from pliant.planning.auto import auto
from pliant.planning.fitted_space import FittedSpace, bare, fitted, has_rows, is_fitted
from pliant.planning.knobs import Knobs, names_for, pattern_search, turned
from pliant.planning.openings import openings
from pliant.planning.plan_space import SOLVERS, Menu, PlanSpace
from pliant.planning.refit import Fitter, Teachers
from pliant.planning.task import Task
from pliant.plans import Plan
from pliant.solvers import Rows

MODEL = pliant.load("digits")


def judged(value):
    def measure(plan):
        measure.asked.append(plan.digest())
        found = float(value(plan))
        return Score(found, found, found, 1)

    measure.asked = []
    return measure


def test_knobs_turn_guidance_and_times_and_nothing_else():
    plan = Plan.uniform(MODEL, 4, guidance=1.5)
    assert turned(plan, Knobs()).digest() == plan.digest()
    plan = plan.with_steps([replace(s, guidance=None) if k == 1 else s for k, s in enumerate(plan.steps)])
    twice = turned(plan, Knobs(scale=1.0))
    assert [s.guidance and s.guidance.scale for s in twice.steps] == [2.0, None, 2.0, 2.0]
    assert twice.times == plan.times and [s.compute for s in twice.steps] == [s.compute for s in plan.steps]
    # Tilted: twice as far at t = 1, half as far at the end, unchanged half-way.
    tilted = turned(plan, Knobs(tilt=1.0))
    assert tilted.steps[0].guidance.scale == 2.0 and tilted.steps[2].guidance.scale == pytest.approx(1.5, abs=0.01)
    assert tilted.steps[3].guidance.scale < 1.36
    warped = turned(plan, Knobs(warp=1.0))
    assert warped.times[0] == plan.times[0] and warped.end == plan.end
    assert all(a > b for a, b in zip(warped.times[1:-1], plan.times[1:-1], strict=True))
    back = turned(warped, Knobs(warp=-1.0))
    assert back.times == pytest.approx(plan.times, abs=1e-12)
    # Their provenance says so, and not what was measured of the plan they come from.
    told = turned(plan.noting(score=[1.0, 0.9, 1.1]), Knobs(scale=1.0)).provenance
    assert told["knobs"] == {"scale": 1.0, "tilt": 0.0, "warp": 0.0} and "score" not in told
    assert "knobs" not in back.provenance and "knobs" not in turned(plan, Knobs()).provenance


def test_openings_say_what_they_are():
    """A plan that is guided in places, or weak first, is no "uniform" one."""
    task = Task.begin("bench", MODEL, "10%", None, 50, 1.5, 0, None)
    for plan in openings(task, Menu.of(MODEL, task.cfg, SOLVERS[:2])):
        told = plan.provenance
        alike = len({(s.compute, s.guidance, s.solver) for s in plan.steps}) == 1
        assert alike or told["preset"] != "uniform" or "guiding" in told or "caching" in told, told


def test_only_knobs_that_change_something_are_turned():
    assert names_for(Plan.uniform(MODEL, 4)) == ("warp",)
    assert names_for(Plan.uniform(MODEL, 1, guidance=2.0)) == ("scale",)
    assert names_for(Plan.uniform(MODEL, 3, guidance=2.0)) == ("scale", "tilt", "warp")


def test_the_pattern_search_finds_a_planted_optimum_and_keeps_to_its_trials():
    """Best at scale 4.5 (2.81 powers of two from 1.5), times shifted by 2^-.5: to a quarter power in 24 trials."""
    plan = Plan.uniform(MODEL, 5, guidance=1.5)
    wanted = turned(plan, Knobs(scale=math.log2(7.0), warp=-0.5))

    def far(p):
        guidance = sum(abs(math.log2((s.guidance.scale - 1) / 3.5)) for s in p.steps) / 5
        return guidance + 4 * sum(abs(a - b) for a, b in zip(p.times, wanted.times, strict=True))

    measure = judged(far)
    best, knobs = pattern_search(plan, turned, measure, 24)
    assert abs(knobs.scale - math.log2(7.0)) <= 0.25 and abs(knobs.warp + 0.5) <= 0.25
    assert best.digest() == turned(plan, knobs).digest()
    assert len(measure.asked) <= 25 and len(set(measure.asked)) == len(measure.asked)
    few = judged(far)
    second, _ = pattern_search(plan, turned, few, 3)
    assert len(few.asked) == 4 and far(second) < far(plan)
    again, _ = pattern_search(plan, turned, judged(far), 24)
    assert again.digest() == best.digest()


def test_the_pattern_search_passes_over_what_cannot_run_and_is_never_worse():
    plan = Plan.uniform(MODEL, 3, guidance=1.5)

    def make(p, knobs):
        if knobs.scale > 0:
            raise PlanError("no such plan")
        return None if knobs.warp else turned(p, knobs)

    best, knobs = pattern_search(plan, make, judged(lambda p: 1.0 if p.digest() == plan.digest() else 2.0), 50)
    assert best is plan and knobs == Knobs()
    stopped = judged(lambda p: 0.0)
    assert pattern_search(plan, turned, stopped, 50, stop=lambda: True)[0] is plan and len(stopped.asked) == 1


def test_auto_finds_how_far_guidance_should_go():
    """A judge that wants scale 5 where full compute has 1.5, and five steps; without knobs it is not reached."""

    class Judge:
        name = "made up"

        def describe(self):
            return {"objective": self.name}

        def __call__(self, plan):
            far = [5.0 if s.guidance is None else abs(s.guidance.scale - 5.0) for s in plan.steps]
            value = sum(far) / len(far) + abs(len(plan.steps) - 5)
            return Score(value, value, value, 1)

    options = {"objective": Judge(), "guidance": 1.5, "evaluations": 40, "caches": False, "fit": False}
    found = auto(MODEL, "10%", **options)
    assert found.quality.value <= 0.5
    assert found.settings["search"]["scale"] == 5.0
    assert auto(MODEL, "10%", knobs=False, **options).quality.value > found.quality.value


def test_what_is_bred_from_fitted_rows_is_fitted_again():
    task = Task.begin("auto", MODEL, "10%", None, 50, 1.5, 0, None)
    inner = PlanSpace(task, Menu.of(MODEL, task.cfg), [])
    plan = Plan.uniform(MODEL, 4, guidance=1.5)
    fit = Fitter(MODEL, 0, 8, 12)
    given, plain = inner.encode(fit(plan)), inner.encode(plan)
    inner.starts = [given]
    space, rng = FittedSpace(inner, fit), random.Random(0)
    assert has_rows(given) and not is_fitted(given) and not has_rows(plain)
    assert space.decode(given).digest() == inner.decode(given).digest(), "a start stays as it is"
    assert space.repair(given, rng) == given
    for child in (space.mutate(given, rng), space.sample(rng), space.cross(given, plain, rng)):
        assert is_fitted(child) == has_rows(child)
    assert is_fitted(space.mutate(fitted(plain), rng)) and not is_fitted(space.mutate(plain, rng))
    made = space.decode(fitted(plain))
    assert all(isinstance(s.solver, Rows) for s in made.steps) and made.times == plan.times
    assert bare(fitted(plain)) == plain
    only = FittedSpace(inner, fit, toggled=1.0)
    assert only.mutate(plain, rng) == fitted(plain) and only.mutate(fitted(plain), rng) == plain
    # Where nothing can be fitted, rows of other steps are no plan; a plan without rows stays itself.
    never = FittedSpace(inner, lambda plan: None)
    assert never.decode(fitted(plain)).digest() == plan.digest()
    with pytest.raises(PlanError, match="other steps"):
        never.decode(fitted(given))


def test_plans_that_guide_alike_share_a_teacher():
    teachers, seeds = Teachers(keep=2), [0, 1]
    one, two, three = (Plan.uniform(MODEL, 3, guidance=s) for s in (1.5, 2.0, None))
    first = teachers(MODEL, one, seeds)
    assert teachers(MODEL, one, seeds) is first
    teachers(MODEL, two, seeds)
    assert teachers(MODEL, one, seeds) is first
    teachers(MODEL, three, seeds)
    assert teachers(MODEL, one, seeds) is first and teachers(MODEL, one, [0]) is not first


SEARCHING = ("s3", "autodiffusion", "flexiffusion", "auto")


@pytest.mark.parametrize("name", PLANNERS)
def test_planners_share_their_arguments(name):
    takes = inspect.signature(PLANNERS[name]).parameters
    shared = ["model", "budget", "objective", "steps", "guidance", "seed", "progress"]
    if name in SEARCHING:
        shared += ["evaluations", "seconds", "journal", "finalists", "num"]
        assert takes["evaluations"].default == (160 if name == "auto" else 120)
        with pytest.raises(PlanError, match="at least 1 evaluation"):
            PLANNERS[name](MODEL, "10%", evaluations=0)
    assert list(takes)[: len(shared)] == shared and len(takes) > len(shared)
    assert "evaluations" in takes or name not in SEARCHING
    assert PLANNERS[name].__name__ == name.replace("-", "_") and PLANNERS[name].__doc__
    with pytest.raises(TypeError, match=rf"{PLANNERS[name].__name__}\(\) got an unexpected keyword argument 'colour'"):
        PLANNERS[name](MODEL, "10%", colour="red")
