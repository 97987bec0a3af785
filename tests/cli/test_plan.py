"""`pliant plan`: files, tables, and plans that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pliant
from pliant.guidance import Guidance, Projected
from pliant.paths import make_grid
from pliant.plans import Plan
from support.cli import Run, refused


@pytest.fixture
def plan_file(flexible: Path, tmp_path: Path, run: Run) -> Path:
    file = tmp_path / "plan.json"
    done = run("plan", flexible, "--budget", "60%", "--steps", 10, "--guidance", 2, "-o", file)
    assert done.code == 0
    return file


def test_plan_file_and_table(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    done = run("plan", flexible, "--budget", "60%", "--steps", 10, "--solver", "heun", "-o", file)
    plan, model = Plan.load(file), pliant.load(flexible)
    assert done.out.startswith(plan.describe(model))
    assert f"pliant sample {flexible} --plan {file}" in done.out
    assert plan == Plan.weak_to_powerful(model, 10, "60%", solver="heun")


def test_plan_as_json(flexible: Path, run: Run) -> None:
    report = run("plan", flexible, "--weak-steps", 4, "--steps", 10, "--weak-last", "--json").json
    plan = Plan.from_dict(report["plan"])
    assert plan.digest() == report["digest"]
    assert [s.compute.patch for s in plan.steps] == [None] * 6 + [(4, 4)] * 4
    cost = plan.cost(pliant.load(flexible))
    assert report["cost"]["flops_per_image"] == cost.flops
    assert report["cost"]["share"] == pytest.approx(cost.share)


def test_a_budget_alone_says_what_it_is_a_share_of(flexible: Path, tmp_path: Path, run: Run) -> None:
    asked = ("--budget", "10%", "--guidance", 2)
    report = run("plan", flexible, *asked, "--json").json
    model = pliant.load(flexible)
    share = report["cost"]["flops_per_image"] / Plan.uniform(model, 50, guidance=2.0).cost(model).flops
    words = f"{share:.1%} of 50 full steps"
    assert 0.08 < share <= 0.1005 and report["cost"]["share"] > 0.3
    assert report["cost"]["of_budget_baseline"] == words
    assert f"that is {words}" in run("plan", flexible, *asked).out
    assert f"s at {words} (" in run("sample", flexible, *asked, "--num", 1, "-o", tmp_path / "x.png").out


def test_weak_guidance_and_precision(flexible: Path, run: Run) -> None:
    options = ("--weak-steps", 2, "--weak-guidance-steps", 3, "--steps", 8, "--guidance", 2, "--precision", "bf16")
    plan = Plan.from_dict(run("plan", flexible, *options, "--json").json["plan"])
    kinds = [s.guidance.against if s.guidance else None for s in plan.steps]
    assert kinds == ["null"] * 2 + ["weak"] * 3 + ["null"] * 3
    assert {s.compute.precision for s in plan.steps} == {"bf16"}


def test_uniform_plan_without_a_budget(plain: Path, run: Run) -> None:
    plan = Plan.from_dict(run("plan", plain, "--json").json["plan"])
    assert len(plan.steps) == 50
    assert {s.solver.name for s in plan.steps} == {"dpmpp-2m"}


def test_show(flexible: Path, plan_file: Path, run: Run) -> None:
    with_model = run("plan", flexible, "--show", plan_file)
    assert with_model.out.rstrip("\n") == Plan.load(plan_file).describe(pliant.load(flexible))
    alone = run("plan", "--show", plan_file)
    assert "10 steps" in alone.out
    assert Plan.load(plan_file).digest() in alone.out
    assert run("plan", "--show", plan_file, "--json").json["cost"] is None
    refused(run("plan", "--show", plan_file, "--budget", "60%"), "--budget")


def test_schema_describes_the_plan(plan_file: Path, run: Run) -> None:
    schema = run("plan", "--schema").json
    assert schema["title"] == "Pliant plan"
    assert set(schema["required"]) <= set(json.loads(plan_file.read_text()))


def test_a_plan_file_decides_everything(flexible: Path, plan_file: Path, run: Run) -> None:
    refused(run("sample", flexible, "--plan", plan_file, "--steps", 5), "--steps")


def test_plan_for_another_model(latent: Path, plan_file: Path, run: Run) -> None:
    refused(run("sample", latent, "--plan", plan_file), "made for plain", "not for this model")


def test_plan_for_patch_sizes_the_model_lacks(plain: Path, plan_file: Path, run: Run) -> None:
    refused(run("sample", plain, "--plan", plan_file), "step 0", "4x4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, ["version 2", "version 1"]),
        ({"colour": "red"}, ["'colour'"]),
        ({"format": "cake"}, ["not a plan"]),
        ({"steps": []}, ["at least one step"]),
        ({"path": {"name": "linaer"}}, ["linear"]),
    ],
)
def test_damaged_plans(change: dict[str, Any], words: list[str], flexible: Path, plan_file: Path, run: Run) -> None:
    plan_file.write_text(json.dumps({**json.loads(plan_file.read_text()), **change}))
    refused(run("sample", flexible, "--plan", plan_file), str(plan_file), *words)
    refused(run("info", plan_file), *words)


def test_a_damaged_step_is_named(flexible: Path, plan_file: Path, run: Run) -> None:
    data = json.loads(plan_file.read_text())
    data["steps"][4]["sovler"] = data["steps"][4].pop("solver")
    plan_file.write_text(json.dumps(data))
    refused(run("plan", flexible, "--show", plan_file), "step 4", "'solver'")
    plan_file.write_text(plan_file.read_text()[:100])
    refused(run("plan", flexible, "--show", plan_file), "not readable JSON")


def test_budgets_that_cannot_be(flexible: Path, plain: Path, run: Run) -> None:
    too_little = run("plan", flexible, "--budget", "5%", "--steps", 50)
    refused(too_little, "below the cheapest schedule", "of full compute", "GFLOP")
    refused(run("plan", plain, "--budget", "60%", "--steps", 9), "one patch size", "flexify")
    refused(run("plan", flexible, "--weak-steps", 60), "between 0 and 50")
    refused(run("plan"), "name a model")


@pytest.mark.parametrize(
    ("typed", "grid"),
    [("log-snr", "log-snr"), ("shifted:shift=3", {"name": "shifted", "shift": 3}), ("uniform:start=0.9", None)],
)
@pytest.mark.parametrize("budget", [(), ("--budget", "60%")])
def test_grid(flexible: Path, run: Run, typed: str, grid: Any, budget: tuple[str, ...]) -> None:
    plan = Plan.from_dict(run("plan", flexible, *budget, "--steps", 6, "--grid", typed, "--json").json["plan"])
    model = pliant.load(flexible)
    grid = grid or {"name": "uniform", "start": 0.9}
    assert plan.times == make_grid(model.path, 6, grid).tolist()
    assert plan.times != Plan.uniform(model, 6).times
    assert plan.provenance["times"] == ({"name": grid} if isinstance(grid, str) else grid)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("karas", ("unknown time grid 'karas'", "'karras'")),
        ("shifted:shft=3", ("'shifted' has no option 'shft'", "'shift'")),
        ("shifted:3", ("cannot read the grid", "shifted:shift=3")),
        ("shifted:shift=three", ("'shifted' does not take these options",)),
    ],
)
def test_bad_grids(flexible: Path, run: Run, typed: str, words: tuple[str, ...]) -> None:
    refused(run("plan", flexible, "--grid", typed), *words)


def test_grid_is_spelt_the_same_everywhere(flexible: Path, plan_file: Path, run: Run) -> None:
    for verb in ("plan", "sample", "eval"):
        shown = " ".join(run(verb, "--help").out.split())
        assert "--grid" in shown
        assert "karras" in shown
    refused(run("sample", flexible, "--plan", plan_file, "--grid", "karras"), "leave out --grid")
    refused(run("sample", flexible, "--grid", "karas"), "'karras'")
    refused(run("eval", flexible, "--reference", "digits", "--grid", "karas"), "'karras'")


def test_guide_names_how_guidance_is_applied(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    run("plan", flexible, "--steps", 6, "--guidance", 2, "--guide", "every:period=3", "-o", file)
    plan = Plan.load(file)
    assert [s.guidance.against for s in plan.steps if s.guidance] == ["null", "difference", "difference"] * 2
    run("plan", flexible, "--steps", 6, "--guidance", 2, "--guide", "projected:momentum=-0.5,rescale=0.7", "-o", file)
    assert Plan.load(file).steps[0].guidance == Guidance.cfg(2.0, rule=Projected(momentum=-0.5), rescale=0.7)
    for wrong, words in (
        (("--guide", "every"), "say how far"),
        (("--guidance", "2", "--guide", "evry"), "did you mean 'every'"),
        (("--guidance", "2", "--guide", "every:n=3"), "takes period"),
        (("--guidance", "2", "--guide", "interval:least=3,most=1"), "empty"),
    ):
        refused(run("plan", flexible, "--steps", 6, *wrong, "-o", file), words)
