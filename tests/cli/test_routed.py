"""Routed plans on the command line: a file of them works where a plan file does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pliant
from pliant.plans import Plan, RoutedPlans, load_plan
from support.cli import Run, refused


@pytest.fixture
def routed(flexible: Path, tmp_path: Path) -> Path:
    model = pliant.load(flexible)
    plans = (Plan.uniform(model, 2, "euler"), Plan.uniform(model, 3))
    RoutedPlans(plans, tuple(c % 2 for c in range(model.num_classes + 1))).save(tmp_path / "routed.json")
    return tmp_path / "routed.json"


def test_sampling_with_routed_plans(flexible: Path, routed: Path, tmp_path: Path, run: Run) -> None:
    options = ("--class", 0, "--class", 1, "--num", 5, "--batch-size", 3)
    out = tmp_path / "x.safetensors"
    report = run("sample", flexible, "--plan", routed, *options, "-o", out, "--json").json
    model, both = pliant.load(flexible), load_plan(routed)
    assert report["plan_digest"] == both.digest()
    assert report["cost"]["flops_per_image"] == both.cost(model, [0, 1, 0, 1, 0]).flops
    found = load_file(out)["samples"]
    for k in range(5):
        alone = pliant.sample(model, both.plans[k % 2], [k % 2], [k])
        torch.testing.assert_close(found[k : k + 1], alone.float().cpu(), rtol=0, atol=0.05)  # bf16 in other batches
    picture = tmp_path / "x.png"
    assert run("sample", flexible, "--plan", routed, *options, "-o", picture).code == 0
    assert run("sample", "--replay", picture, "-o", tmp_path / "y.png", "--json").json["identical"]
    assert "2 or 3 steps" in run("info", picture).out


def test_what_routed_plans_say(flexible: Path, routed: Path, run: Run) -> None:
    assert "2 steps  classes 0 2" in run("plan", "--show", routed).out
    assert run("info", routed).out == run("plan", "--show", routed).out
    priced = run("plan", flexible, "--show", routed).out
    assert "2 plans for" in priced and "of full compute" in priced
    assert run("plan", flexible, "--show", routed, "--json").json["cost"]["flops_per_image"] > 0


def test_routed_plans_are_evaluated(plain: Path, tmp_path: Path, run: Run) -> None:
    model = pliant.load("digits")
    file, plans = tmp_path / "r.json", (Plan.uniform(model, 2), Plan.uniform(model, 3))
    RoutedPlans(plans, tuple(c % 2 for c in range(10))).save(file)
    report = run("eval", "digits", "--plan", file, "--reference", "digits:test", "--num", 20, "--json").json
    assert report["recipe"]["steps"] == [2, 3] and report["cost"]["evaluations"] in (2, 3)


def test_one_plan_is_needed_elsewhere(flexible: Path, routed: Path, tmp_path: Path, run: Run) -> None:
    options = ("--planners", "router", "--reference", "digits:test", "-o", tmp_path / "f")
    refused(run("frontier", "digits", *options), "router")
    routed.write_text(routed.read_text().replace('"table": [', '"table": [7, '))
    refused(run("sample", flexible, "--plan", routed, "-o", tmp_path / "x.png"), "routed.json", "names plan 7")
