"""`pliant plan --search` and budgets without options."""

from __future__ import annotations

from pathlib import Path

import pytest

from pliant.plans import Plan
from support.cli import Run, refused

QUICK = ("--budget", "50%", "--steps", 6, "--num", 20, "--search", "s3")


def test_a_search_writes_plan_journal_and_evidence(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    done = run("plan", flexible, *QUICK, "--time", "1s", "--seed", 1, "-o", file, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert report["search"]["planner"] == "s3" and report["search"]["settings"]["seed"] == 1
    seeds = [report["search"]["settings"][k]["seeds"] for k in ("objective", "confirmed_by")]
    assert [s.split("..")[0] for s in seeds] == ["50000000", "1000000000"], "not those of 'pliant eval'"
    assert report["digest"] == Plan.load(file).digest()
    assert report["cost"]["of_budget_baseline"].endswith("of 6 full steps")
    journal = tmp_path / "plan.search.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) > 3
    # Resumed, the same time is used up already: nothing is searched again, and the plan is the same.
    again = run("plan", flexible, *QUICK, "--time", "1s", "--seed", 1, "--resume", "-o", file, "--json").json
    assert again["digest"] == report["digest"]
    assert journal.read_text().splitlines()[: len(lines)] == lines
    text = run("plan", flexible, *QUICK, "--time", "1s", "--seed", 1, "--resume", "-o", file).out
    assert text.startswith("s3: relative Fréchet distance")
    # A journal of another search is not taken for this one's.
    other = run("plan", flexible, *QUICK, "--time", "1s", "--seed", 2, "--resume", "-o", file)
    refused(other, "another search", "seed")


def test_what_would_fail_after_a_search_is_refused_before(
    flexible: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pliant.planning.search", lambda *_, **__: pytest.fail("searched"))
    refused(run("plan", flexible, *QUICK, "-o", tmp_path), "could not write", "folder")
    refused(run("plan", flexible, *QUICK, "-o", "/proc/nowhere/plan.json"), "could not write")
    refused(run("plan", flexible, *QUICK, "--throughput", tmp_path / "no.json"), "does not exist")


def test_an_interrupted_search_says_how_to_go_on(
    flexible: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pliant.planning.search", interrupted)
    done = run("plan", flexible, *QUICK, "-o", tmp_path / "plan.json")
    assert done.code == 130 and "plan.search.jsonl; the same command with --resume" in done.err
    assert "resume" not in run("plan", flexible, *QUICK).err


def test_planners_are_listed(run: Run) -> None:
    out = run("plan", "--list-planners").out
    for name in ("auto", "s3", "autodiffusion", "flexiffusion", "weak-split", "oss"):
        assert name in out
    assert {"auto", "boss"} <= {row["name"] for row in run("plan", "--list-planners", "--json").json["planners"]}


def test_a_budget_alone_is_planned(flexible: Path, plain: Path, run: Run) -> None:
    for model in (flexible, plain):
        report = run("plan", model, "--budget", "30%", "--json").json
        plan = Plan.from_dict(report["plan"])
        assert plan.provenance["planner"] in ("weak-split", "closed-form")
        rich = run("plan", model, "--budget", "1 TFLOP", "--json")
        assert len(rich.json["plan"]["steps"]) == 50 and "full compute, 50 steps, costs 100.0%" in rich.err
    done = run("sample", flexible, "--budget", "30%", "--num", 1, "-o", flexible.with_name("one.png"))
    assert done.code == 0, done.err


def test_searches_that_make_no_sense(flexible: Path, run: Run, tmp_path: Path) -> None:
    refused(run("plan", flexible, "--budget", "10%", "--search", "autoo"), "unknown planner 'autoo'", "'auto'")
    refused(run("plan", flexible, "--search", "auto"), "needs a budget")
    refused(run("plan", flexible, "--budget", "10%", "--time", "2min"), "--time belongs to a search")
    refused(run("plan", flexible, "--budget", "10%", "--search", "auto", "--solver", "ddim"), "leave out --solver")
    refused(run("plan", flexible, "--budget", "10%", "--search", "auto", "--resume"), "name that file with -o")
    refused(run("plan", flexible, "--budget", "10%", "--search", "boss", "--time", "5s"), "takes no limit of time")
    again = ("--search", "boss", "--resume", "-o", tmp_path / "plan.json")
    refused(run("plan", flexible, "--budget", "10%", *again), "'boss' keeps no journal")
    refused(run("plan", flexible, "--budget", "0.01%", "--search", "auto", "--time", "soon"), "cannot read the time")
    tiny = run("plan", flexible, "--budget", "0.01%", "--steps", 4, "--search", "auto", "--num", 20)
    refused(tiny, "below the cheapest plan")


def test_sample_searches_when_asked(flexible: Path, tmp_path: Path, run: Run) -> None:
    options = ("--class", 1, "--budget", "50%", "--steps", 6, "--search", "oss", "--json")
    done = run("sample", flexible, *options, "-o", tmp_path / "a.png")
    assert done.code == 0, done.err
    report = done.json
    assert report["search"]["planner"] == "oss" and report["search"]["quality"]["samples"] > 0
    found = run("plan", flexible, *options[2:], "-o", tmp_path / "plan.json").json
    assert found["digest"] == report["plan_digest"]
    assert run("sample", "--replay", tmp_path / "a.png", "-o", tmp_path / "b.png", "--json").json["identical"]


def test_sample_s_searches_that_make_no_sense(flexible: Path, tmp_path: Path, run: Run) -> None:
    out = ("-o", tmp_path / "a.png")
    refused(run("sample", flexible, "--search", "auto", *out), "needs a budget")
    refused(run("sample", flexible, "--time", "5s", *out), "--time belongs to a search")
    both = ("--budget", "50%", "--search", "oss", "--plan", tmp_path / "plan.json")
    refused(run("sample", flexible, *both, *out), "leave out --search, or --plan")
    refused(run("sample", flexible, "--budget", "50%", "--search", "oss", "--cache", "fora", *out), "--cache")
    refused(run("sample", "--replay", tmp_path / "a.png", "--search", "oss"), "leave out --search")
    assert not (tmp_path / "a.png").exists()
