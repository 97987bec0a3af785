"""`pliant frontier`: results that are complete, kept, and refused in a line."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pliant
from pliant.cli import frontier_plot, frontier_run
from pliant.cli.frontier_rows import undominated
from pliant.planning import measuring
from pliant.plans import Plan
from support.cli import Run, refused

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

FAST = ("--reference", "digits:test", "--num", 16, "--steps", 10, "--search-num", 0, "--rounds", 1)
SMALL = ("--budgets", "60%,30%", "--solvers", "ddim")


@pytest.fixture(scope="module")
def done(flexible: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("frontier")
    Plan.uniform(pliant.load(flexible), 2, "heun").save(folder / "mine.json")
    found = run("frontier", flexible, *FAST, *SMALL, "--plans", folder / "mine.json", "-o", folder / "out", "--json")
    assert found.code == 0, found.err
    assert re.search(r"\d+ plans, 0 measured before; about \d+ s to go", found.err)
    return folder, found.json


def test_every_point_is_there(done: tuple[Path, Any]) -> None:
    _, report = done
    rows = {(r["family"], r["budget"]): r for r in report["rows"]}
    assert set(rows) == {
        ("full, 10 steps", ""),
        ("weak-split", "60%"),
        ("weak-split", "30%"),
        ("mine", ""),
        ("fewer steps, ddim", "60%"),
        ("fewer steps, ddim", "30%"),
    }
    assert rows["fewer steps, ddim", "30%"]["steps"] == 3 and rows["mine", ""]["NFE"] == 3
    for (_, budget), row in rows.items():
        assert row["share_of_full"] <= (float(budget.rstrip("%")) / 100 + 1e-3 if budget else 1)
        assert row["low"] <= row["distance"] <= row["high"] and row["seconds_per_image"] > 0
    recipe = report["recipe"]
    assert recipe["images"] == 16 and recipe["seeds"].startswith("2000000000..")
    for key in ("weights_sha256", "extractor_sha256", "reference_sha256"):
        assert len(recipe[key]) == 64
    assert recipe["pliant"] == pliant.__version__ and "in turn" in recipe["timed"]


def test_files(done: tuple[Path, Any], flexible: Path, run: Run) -> None:
    folder, report = done
    with open(folder / "out" / "frontier.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["family"] for line in lines] == [r["family"] for r in report["rows"]]
    assert float(lines[0]["distance"]) == report["rows"][0]["distance"]
    assert (folder / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    html = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#|data:)', html)  # nothing is loaded from elsewhere
    strips = re.findall(r'alt="Samples of ([^"]*)" src="data:image/png;base64,([^"]*)"', html)
    assert strips[0][0] == "full, 10 steps" and len(strips) == len({image for _, image in strips}) >= 2
    for words in ("<svg", "weak-split", report["recipe"]["weights_sha256"], "90%", "digits-classifier"):
        assert words in html
    plan = folder / "out" / report["rows"][1]["plan_file"]
    assert run("plan", flexible, "--show", plan).code == 0


def test_a_second_run_measures_nothing(
    done: tuple[Path, Any], flexible: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = done
    for module, name in (
        (measuring, "distance"),
        (measuring, "seconds_in_turns"),
        (frontier_run, "_seconds_per_flop"),
        (pliant.plans, "sample"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured again"))
    again = run("frontier", flexible, *FAST, *SMALL, "--plans", folder / "mine.json", "-o", folder / "out", "--json")
    assert again.code == 0, again.err
    assert again.json["rows"] == report["rows"] and again.json["recipe"] == report["recipe"]
    assert again.err == ""


def test_an_interrupted_run_goes_on(
    flexible: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[Path, Any]
) -> None:
    original, seen = measuring.distance, []

    def stopping(plan: Plan, objective: Any) -> Any:
        seen.append(plan.digest())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(plan, objective)

    monkeypatch.setattr(measuring, "distance", stopping)
    arguments = ("frontier", flexible, *FAST, *SMALL, "--rounds", 0, "-o", tmp_path / "out", "--json")
    assert run(*arguments).code == 130
    finished = run(*arguments)
    assert finished.code == 0, finished.err
    assert "2 measured before" in finished.err
    assert len(seen) == 3 + 3  # five plans: two before the interruption, three after
    whole = {(r["family"], r["budget"]): r["distance"] for r in done[1]["rows"]}
    assert all(whole[r["family"], r["budget"]] == r["distance"] for r in finished.json["rows"])


def test_repeats_search_and_text(flexible: Path, run: Run, tmp_path: Path) -> None:
    options = ("--budgets", "50%", "--solvers", "none", "--repeats", 2, "--search-num", 12, "--rounds", 0)
    found = run("frontier", flexible, *FAST, *options, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    for words in ("weak-split", "90% interval", "16 images per plan and repeat", "extractor_sha256", "index.html"):
        assert words in found.out
    names = sorted(f.name for f in (tmp_path / "out" / "cache").iterdir())
    assert sum(n.startswith("planned-weak-split-") for n in names) == 1
    assert sum(n.endswith(".json") for n in names) == 1 + 2 * 2  # two plans, two repeats


def test_budgets_without_a_plan_are_named(flexible: Path, run: Run, tmp_path: Path) -> None:
    found = run("frontier", flexible, *FAST, "--budgets", "60%,1%", "--solvers", "ddim", "--rounds", 0, "-o", tmp_path)
    assert found.code == 0, found.err
    assert "no plan: fewer steps, ddim at 1%" in found.out and "no plan: weak-split at 1%" in found.out


def test_refusals(flexible: Path, latent: Path, run: Run, tmp_path: Path) -> None:
    into = ("-o", tmp_path / "out")
    refused(run("frontier", flexible, *into), "--reference")
    refused(run("frontier", latent, *FAST, *into), "--decode")
    refused(run("frontier", flexible, *FAST, "--budgets", "fast", *into), "cannot read the budget 'fast'")
    refused(run("frontier", flexible, *FAST, "--planners", "weak-splits", *into), "did you mean 'weak-split'")
    refused(run("frontier", flexible, *FAST, "--solvers", "unipx", *into), "unipx", "unipc")
    refused(run("frontier", flexible, *FAST, "--plans", tmp_path / "no.json", *into), "no.json")
    refused(run("frontier", flexible, *FAST, "--num", 1, *into), "--num")
    assert not (tmp_path / "out").exists()  # refused before anything is made


def test_lists_keep_a_solvers_options_together() -> None:
    assert frontier_run.listed("dpmpp-2m, ddim:eta=0.5,x=1,unipc") == ["dpmpp-2m", "ddim:eta=0.5,x=1", "unipc"]
    assert frontier_run.listed("none") == []


def test_undominated() -> None:
    class Row:
        def __init__(self, flops: int, value: float) -> None:
            self.cost = type("Cost", (), {"flops": flops})
            self.quality = type("Quality", (), {"value": value})

    rows: Any = [Row(10, 1.0), Row(5, 2.0), Row(5, 1.5), Row(7, 1.6), Row(20, 1.0)]
    assert undominated(rows) == {0, 2}


def test_without_matplotlib_there_is_no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert frontier_plot.plot([], "", "", 0.9, "") is None


def test_the_plan_of_a_few_step_model_is_a_point(flexible: Path, run: Run, tmp_path: Path) -> None:
    model = pliant.load(flexible)
    plan = Plan.uniform(model, 2, "euler")
    pliant.save(replace(model, own_plan=plan.to_dict()), tmp_path / "few")
    options = ("--budgets", "50%", "--solvers", "none", "--planners", "none", "--rounds", 0)
    found = run("frontier", tmp_path / "few", *FAST, *options, "-o", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    rows = [(r["family"], r["plan"]) for r in found.json["rows"]]
    assert rows[1:] == [("the model's own plan", plan.digest())]
    assert found.json["rows"][1]["seconds_per_image"] is None
