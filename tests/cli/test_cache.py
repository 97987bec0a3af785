"""--cache and --freeze."""

from __future__ import annotations

from pathlib import Path

import pytest

from pliant.plans import Plan
from support.cli import Run, refused


def test_a_preset_with_options(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    run("plan", flexible, "--steps", "7", "--cache", "fora:interval=3", "-o", file)
    plan = Plan.load(file)
    assert plan.provenance["caching"] == {"name": "fora", "interval": 3}
    assert ["C" in (s.compute.sites or "") for s in plan.steps] == [False, True, True, False, True, True, False]


def test_freeze_leaves_no_gates(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    done = run("plan", flexible, "--steps", "6", "--cache", "teacache:threshold=0.5", "--freeze", "-o", file)
    assert "gates decide" not in done.out
    assert all(s.compute.gate is None for s in Plan.load(file).steps)
    run("sample", flexible, "--plan", file, "--num", "2", "-o", tmp_path / "out.png")


def test_calibration_is_written_into_the_plan(flexible: Path, run: Run) -> None:
    done = run("plan", flexible, "--steps", "6", "--cache", "magcache:calibrate=2,threshold=0.5", "--json")
    made = done.json["plan"]["provenance"]["caching"]
    assert made["measured"]["samples"] == 2 and len(made["ratios"]) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache", "teacash"], "did you mean 'teacache'"),
        (["--cache", "fora:3"], "cannot read the cache"),
        (["--cache", "fora", "--freeze"], "no gates"),
        (["--freeze"], "no gates"),
    ],
)
def test_bad_requests(flexible: Path, arguments: list[str], words: str, run: Run) -> None:
    done = run("plan", flexible, "--steps", "6", *arguments)
    refused(done, words)
