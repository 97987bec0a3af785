"""What a frontier is made of: baselines that fit, distances that are kept, seconds in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.denoiser import Denoiser
from pliant.errors import DataError, PlanError
from pliant.evaluation import bootstrap_interval, get_extractor, load_reference
from pliant.planning import FrechetObjective
from pliant.planning import measuring as module
from pliant.planning.entries import baselines, budgets_of, most_steps, name_of
from pliant.planning.measuring import Quality, QualityStore, Repeat, seconds_in_turns
from pliant.plans import Plan, parse_budget
from support.networks import tiny_denoiser


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return tiny_denoiser(in_channels=1)


@pytest.fixture
def objective(model: Denoiser) -> FrechetObjective:
    extractor = get_extractor("digits-classifier")
    return FrechetObjective(model, load_reference("digits:test", extractor), extractor, num=24).on_fresh_seeds()


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_most_steps_is_the_most(model: Denoiser, solver: str) -> None:
    full, budget = Plan.uniform(model, 20), parse_budget("35%")
    plan = most_steps(model, full, budget, solver, None)
    assert plan is not None
    more = Plan.uniform(model, len(plan.steps) + 1, solver)
    assert budget.fits(plan, full, model) and not budget.fits(more, full, model)
    assert len(plan.steps) == (7 if solver == "ddim" else 4)  # heun's last step to clean data needs one evaluation
    assert most_steps(model, full, parse_budget("2%"), solver, None) is None


def test_baselines_and_what_has_none(model: Denoiser) -> None:
    full, budgets = Plan.uniform(model, 20), budgets_of(["50%", " 10%", "3%"])
    entries, skipped = baselines(model, full, budgets, ["ddim", {"name": "ddim", "eta": 0.5}], None)
    assert [(e.family, e.budget, len(e.plan.steps)) for e in entries] == [
        ("fewer steps, ddim", "50%", 10),
        ("fewer steps, ddim", "10%", 2),
        ("fewer steps, ddim (eta=0.5)", "50%", 10),
        ("fewer steps, ddim (eta=0.5)", "10%", 2),
    ]
    assert [(s.family, s.budget) for s in skipped] == [
        ("fewer steps, ddim", "3%"),
        ("fewer steps, ddim (eta=0.5)", "3%"),
    ]
    assert name_of("unipc") == "unipc"
    for texts in ([], ["", " "], ["120%"], ["fast"]):
        with pytest.raises(PlanError):
            budgets_of(texts)


def test_intervals_of_repeats() -> None:
    """Bootstrap errors of independent repeats add in squares; without them, Student's interval."""
    pooled = Quality((Repeat(1.0, 0.3), Repeat(2.0, 0.4))).interval(0.9)
    assert pooled is not None
    assert pooled.value == 1.5 and pooled.standard_error == pytest.approx(0.25)
    assert pooled.high - 1.5 == pytest.approx(1.6449 * 0.25, rel=1e-4)
    student = Quality((Repeat(1.0, None), Repeat(2.0, None))).interval(0.9)
    assert student is not None and student.high - 1.5 == pytest.approx(6.3138 * 0.5, rel=1e-4)
    assert Quality((Repeat(1.0, None),)).interval() is None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    measured: list[str] = []
    original: Callable[..., Repeat] = module.distance

    def counting(plan: Plan, objective: FrechetObjective) -> Repeat:
        measured.append(plan.digest())
        return original(plan, objective)

    monkeypatch.setattr(module, "distance", counting)
    return measured


def test_distances_are_kept_by_what_decides_them(
    model: Denoiser, objective: FrechetObjective, counted: list[str], tmp_path: Path
) -> None:
    plan, facts = Plan.uniform(model, 3), {"weights_sha256": "a"}
    found = QualityStore(tmp_path, facts).measure(plan, objective)
    expected = bootstrap_interval(objective.features(plan), objective.reference.statistics, groups=objective.labels)
    assert (found.value, found.error) == (expected.value, expected.standard_error)
    same = Plan(plan.steps, plan.path, plan.end, plan.model, provenance={"made": "otherwise"})
    assert QualityStore(tmp_path, facts).measure(same, objective) == found
    assert len(counted) == 1
    # Each of these decides the number, so none may find the other's.
    QualityStore(tmp_path, {"weights_sha256": "b"}).measure(plan, objective)
    QualityStore(tmp_path, facts).measure(Plan.uniform(model, 4), objective)
    QualityStore(tmp_path, facts).measure(plan, objective.on_fresh_seeds(repeat=1))
    QualityStore(tmp_path, facts).measure(plan, objective.on_fresh_seeds(num=23))
    assert len(counted) == 5 and len(list(tmp_path.iterdir())) == 5
    stored = json.loads(QualityStore(tmp_path, facts).file(plan, objective).read_text())
    assert stored["facts"]["images"] == 24 and stored["facts"]["extractor_sha256"] == objective.extractor.fingerprint


def test_damaged_measurements_are_refused(model: Denoiser, objective: FrechetObjective, tmp_path: Path) -> None:
    store, plan = QualityStore(tmp_path, {}), Plan.uniform(model, 2)
    for content in ("{", "[]", '{"value": 1}', '{"value": "x", "error": null}'):
        store.file(plan, objective).write_text(content)
        with pytest.raises(DataError, match="delete it"):
            store.known(plan, objective)


def test_plans_take_turns(model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round runs every plan once; the median forgets one slow call; the warm-up does not count."""
    plans = [Plan.uniform(model, k) for k in (1, 2)]
    order: list[int] = []
    clock = [0.0]
    spent = {1: iter([50.0, 1.0, 9.0, 1.0]), 2: iter([50.0, 2.0, 2.0, 2.0])}

    class Fake:
        def __init__(self, _: Denoiser, plan: Plan, weights: Any) -> None:
            self.steps = len(plan.steps)

        def __call__(self, labels: list[int], seeds: list[int]) -> torch.Tensor:
            order.append(self.steps)
            clock[0] += next(spent[self.steps])
            assert len(labels) == len(seeds) == 4
            return torch.zeros(1)

    monkeypatch.setattr(module, "Sampler", Fake)
    advanced: list[tuple[int, int]] = []
    found = seconds_in_turns(
        model, plans, batch=4, rounds=3, advance=lambda a, b: advanced.append((a, b)), clock=lambda: clock[0]
    )
    assert order == [1, 2] * 4
    assert found == {plans[0].digest(): 0.25, plans[1].digest(): 0.5}
    assert advanced[-1] == (8, 8)
