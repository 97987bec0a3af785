"""`pliant bench`, and `pliant plan` with seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pliant
from pliant.plans import Plan
from pliant.plans.timing import Prices, Throughput, cache_file
from support.cli import Run, refused
from support.throughput import PIECES, foreign, synthetic_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pliant.plans.timing.measure.ROWS", (1, 2))
    return tmp_path / "cache"


def test_bench_writes_what_plan_reads(plain: Path, run: Run, own_cache: Path) -> None:
    report = run("bench", plain, "--json").json
    file = Path(report["file"])
    assert file.is_relative_to(own_cache) and Throughput.load(file).to_dict() == report["table"]
    assert list(report["table"]["networks"]) == ["2x2 fp32"]
    done = run("plan", plain, "--steps", 4)
    assert done.out.splitlines()[-1].startswith("predicted ") and "for 1 image on" in done.out
    cost = run("plan", plain, "--steps", 4, "--batch-size", 4, "--json").json["cost"]["batch"]
    expected = Prices(Throughput.load(file), pliant.load(plain), 4).plan(Plan.uniform(pliant.load(plain), 4))
    assert cost["images"] == 4 and cost["seconds"] == pytest.approx(expected.seconds)
    assert cost["seconds_per_image"] == pytest.approx(expected.seconds / 4) and cost["peak_bytes"] > 0


def test_bench_in_text_to_a_file(plain: Path, run: Run, tmp_path: Path, own_cache: Path) -> None:
    done = run("bench", plain, "--precision", "fp32", "-o", tmp_path / "table.json")
    assert done.code == 0 and "2x2 fp32" in done.out and f"{tmp_path / 'table.json'} written" in done.out
    assert not own_cache.exists()
    refused(run("bench", plain, "--precision", "fp23"), "fp23", "did you mean 'fp32'")
    refused(run("bench", plain, "--unmerged"), "one patch size")


def test_bench_adjusts_a_kept_table(plain: Path, run: Run) -> None:
    model = pliant.load(plain)
    refused(run("bench", plain, "--adjust"), "no table", "pliant bench")
    synthetic_table(model).save(cache_file(model))
    done = run("bench", plain, "--adjust", "--json").json
    made = Throughput.load(cache_file(model))
    assert done["table"] == made.to_dict() and done["pace"] == pytest.approx(made.measured["adjusted"], rel=1e-3)
    plan = Plan.uniform(model, 4)
    before, now = (Prices(t, model).plan(plan).seconds for t in (synthetic_table(model), made))
    assert now == pytest.approx(done["pace"] * before, rel=1e-3)
    assert "times as long" in run("bench", plain, "--adjust").out
    refused(run("bench", plain, "--adjust", "--rows", 3), "leave out")
    refused(run("bench", plain, "--adjust", "-o", "/proc/nowhere/table.json"), "could not write")


def test_budgets_in_seconds(flexible: Path, run: Run, tmp_path: Path) -> None:
    model = pliant.load(flexible)
    table = synthetic_table(model, (None, "bf16"))
    table.save(cache_file(model))
    full = Prices(table, model).plan(Plan.uniform(model, 10)).seconds
    done = run("plan", flexible, "--budget", f"{600 * full:.4g} ms", "--steps", 10, "--json")
    assert done.err == ""  # nothing is measured
    plan = Plan.from_dict(done.json["plan"])
    assert done.json["cost"]["batch"]["seconds"] <= 0.601 * full
    assert 0 < plan.provenance["weak_steps"] < 10
    four = run("plan", flexible, "--budget", f"{2.4 * full:.4g} s for 4 images", "--steps", 10, "--json").json
    assert four["cost"]["batch"]["images"] == 4
    assert Plan.from_dict(four["plan"]).provenance["weak_steps"] == plan.provenance["weak_steps"]
    pinned = run("plan", flexible, "--budget", f"{600 * full:.4g} ms", "--steps", 10, "--precision", "bf16", "--json")
    assert {s.compute.precision for s in Plan.from_dict(pinned.json["plan"]).steps} == {"bf16"}


@pytest.mark.parametrize(
    "options",
    [["--cache", "fora:interval=2"], ["--guide", "interval"], ["--guide", "every:period=2", "--cache", "tome"]],
)
def test_a_budget_counts_what_the_final_plan_does(flexible: Path, run: Run, options: list[str]) -> None:
    """Caches and cheaper guidance are priced before the budget is met, so that it is used up, and kept where they cost
    more than they save."""
    model = pliant.load(flexible)
    synthetic_table(model, pieces={**PIECES, "merge": 4e-3}).save(cache_file(model))
    asked = ["plan", flexible, "--steps", 20, "--guidance", 2, *options, "--json"]

    def seconds(weak: int) -> float:
        return run(*asked, "--weak-steps", weak).json["cost"]["batch"]["seconds"]

    wanted = (seconds(0) + seconds(20)) / 2
    done = run(*asked, "--budget", f"{1e3 * wanted:.6g} ms").json
    plan = Plan.from_dict(done["plan"])
    weak = plan.provenance["weak_steps"]
    spent = done["cost"]["batch"]["seconds"]
    assert 0 < weak < 20 and spent <= wanted * 1.001
    assert seconds(weak - 1) > wanted or seconds(weak - 2) > wanted  # reused steps cost the same at any patch size



def test_a_first_budget_in_seconds_measures(flexible: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pliant.load(flexible)
    monkeypatch.setattr("pliant.plans.timing.ready.measure", lambda *a, **k: synthetic_table(model))
    first = run("plan", flexible, "--budget", "100 ms", "--steps", 10)
    assert first.code == 0 and "measuring how fast this machine runs the model" in first.err
    assert run("plan", flexible, "--budget", "100 ms", "--steps", 10).err == ""


def test_bad_budgets_and_tables(flexible: Path, plain: Path, run: Run, tmp_path: Path) -> None:
    model = pliant.load(flexible)
    table, file = synthetic_table(model), tmp_path / "table.json"
    table.save(file)
    ask = ("plan", flexible, "--steps", 10, "--throughput", file)
    refused(run(*ask, "--budget", "1 ms"), "below the cheapest", "all 10 steps weak", "for 1 image")
    refused(run(*ask, "--budget", "3 lightyears"), "unit", "2.0 s, 350 ms")
    foreign(table).save(file)
    refused(run(*ask, "--budget", "1 s"), "another machine", "Difference Engine", "pliant bench")
    refused(run(*ask), "another machine")
    refused(run("plan", plain, "--throughput", tmp_path / "none.json"), "does not exist", "pliant bench")
    file.write_text(json.dumps({"format": "pliant-plan"}))
    refused(run(*ask), "not a throughput table")
