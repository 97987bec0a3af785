"""`pliant demo`, with a small random model in place of the bundled one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import pliant
from pliant.cli import demo_runs
from pliant.plans import Plan
from support.cli import Run, refused
from support.networks import randomize, tiny_denoiser

pytest.importorskip("sklearn")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assets = tmp_path / "assets"
    denoiser = tiny_denoiser(in_channels=1, num_classes=10, patch_size=(1, 1), width=32)
    denoiser = pliant.flexify(replace(denoiser, metadata={"name": "digits"}), [2], rank=2)
    randomize(denoiser.network)
    pliant.save(denoiser, assets / "digits")
    monkeypatch.setattr("pliant.formats.locate.ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    return assets / "digits"


def test_everything_is_written(bundled: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    done = run("demo", "--seconds", 4, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert [row["budget"] for row in report["rows"]] == [1.0, 0.75, 0.6, 0.45]
    for row in report["rows"]:
        assert row["share"] <= row["budget"] + 1e-3
        assert row["seconds_per_image"] > 0
    with Image.open("demo/comparison.png") as picture:
        assert picture.width > 10 * 64
    plan = Plan.load("demo/plan-60.json")
    assert plan.cost(pliant.load(bundled)).flops == report["rows"][2]["flops_per_image"]
    html = Path("demo/index.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == (2 if report["metric"] else 1)
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing outside the file
    assert 'name="viewport"' in html
    if report["metric"]:
        assert report["metric"] == "Fréchet distance (digits-classifier)"
        assert Path("demo/quality.png").is_file()


def test_the_page_s_commands_run(bundled: Path, run: Run) -> None:
    from pliant.cli.demo import commands

    lines = commands("digits", demo_runs.SETTINGS["digits"], Path("demo"))[1:5]
    for line in lines:
        done = run(*line.split("#")[0].split()[1:])
        assert done.code == 0, (line, done.err)


def test_distances_shipped_with_the_model(bundled: Path) -> None:
    from pliant.cli.models import open_model

    setting = replace(demo_runs.SETTINGS["digits"], reference=None, steps=10)
    rows = demo_runs.make_rows(open_model("digits"), setting)
    distance = {"mean": 2.0, "std": 0.5, "values": [1.5, 2.0, 2.5]}
    found = {
        row.label: {
            "family": "full" if row.budget == 1 else "weak first",
            "flops": row.cost.flops,
            "report": {"metric": "Fréchet distance (x)", "distance": distance},
        }
        for row in rows
    }
    stored = {"settings": {"steps": 10, "solver": "dpmpp-2m", "guidance": 1.0, "num": 500}, "rows": found}
    (bundled / "quality.json").write_text(json.dumps(stored))
    judgement = demo_runs.judge(rows, setting, demo_runs.stored_quality("digits"))
    assert judgement == demo_runs.Judgement("Fréchet distance (x)", 500, here=False)
    assert rows[0].distance is not None
    assert rows[0].distance.high == pytest.approx(2.0 + 4.302653 * 0.5 / 3**0.5)
    # Another sampler was measured: its numbers are not these plans'.
    stored["settings"]["steps"] = 50
    assert demo_runs.judge(rows, setting, stored) is None


def test_refusals(bundled: Path, tmp_path: Path, run: Run) -> None:
    refused(run("demo", "--model", "digit"), "'digits'")
    (tmp_path / "file").write_text("")
    refused(run("demo", "-o", "file/x"), "cannot create the folder")
