"""`pliant train`: reports, resuming, and data or losses that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

import pliant
from support.cli import Run, refused
from support.training import TINY_DIT


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = {
        "model": {"dit": {**TINY_DIT, "learn_sigma": False}},
        "data": {"source": "digits", "limit": 20},
        "steps": 3,
        "batch_size": 4,
        "log_every": 1,
        "checkpoint": {"every": 1},
        "output": str(tmp_path / "run"),
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_report(config: Path, tmp_path: Path, run: Run) -> None:
    done = run("train", config, "steps=2", "optimizer.lr=3e-4", "--json")
    assert done.code == 0
    report = done.json
    assert report["steps"] == 2
    assert report["model"] == str(tmp_path / "run" / "model")
    assert report["warnings"] == []
    assert pliant.load(report["model"]).fingerprint() == report["fingerprint"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["lr"] == pytest.approx(3e-4)


def test_text_report_and_resume(config: Path, tmp_path: Path, run: Run) -> None:
    done = run("train", config, "steps=1")
    assert done.out.startswith(str(tmp_path / "run" / "model"))
    assert done.out.count("\n") == 1  # progress and log lines are on stderr
    refused(run("train", config), "already holds checkpoints", "resume=latest")
    assert run("train", config, "--resume", "--json").json["steps"] == 3


def test_flexify_then_finetune(config: Path, tmp_path: Path, run: Run) -> None:
    """The commands that flexify prints do run."""
    run("train", config)
    out = tmp_path / "flexible"
    assert run("flexify", tmp_path / "run" / "model", out, "--patch", 8, "--rank", 2).code == 0
    done = run(
        "train", f"{out}-finetune.yaml", "data.source=digits", "steps=2", "data.limit=20", "batch_size=4", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["patch_sizes"] == [[4, 4], [8, 8]]
    assert run("sample", f"{out}-finetuned/model", "--weak-steps", 1, "--steps", 2, "-o", tmp_path / "x.png").code == 0


def test_damaged_pictures_are_skipped_counted_and_named(config: Path, tmp_path: Path, run: Run) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("L", (8, 8), 40 * k).save(tmp_path / "images" / name / f"{k}.png")
    bad = tmp_path / "images" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    done = run("train", config, f"data.source={tmp_path / 'images'}", "data.limit=null", "--json")
    assert done.code == 0, done.err
    assert len(done.json["warnings"]) == 1
    assert "skipped 1 of 6" in done.json["warnings"][0]
    assert "1.png" in done.json["warnings"][0]
    assert "warning: skipped 1 of 6" in done.err


def test_a_loss_that_is_not_a_number(config: Path, tmp_path: Path, run: Run) -> None:
    assert run("train", config, "steps=2").code == 0
    done = run("train", config, "--resume", "optimizer.lr=1e38", "optimizer.clip=null", "steps=20", "--json")
    assert (done.code, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("error: training stopped at step")
    assert "not finite" in last
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-000002'}" in last


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stepz=3"], ["'stepz'", "'steps'"]),
        (["steps"], ["key.sub=value"]),
        (["steps=-1"], ["steps"]),
        (["data.source=/nowhere"], ["/nowhere"]),
        (["model.dit.num_classes=5"], ["num_classes"]),
        (["model.dit.patch_size=[3,3]"], ["does not divide"]),
    ],
)
def test_bad_settings(overrides: list[str], words: list[str], config: Path, run: Run) -> None:
    refused(run("train", config, *overrides), *words)


def test_bad_config_files(tmp_path: Path, run: Run) -> None:
    refused(run("train", tmp_path / "none.yaml"), "none.yaml", "No such file")
    (tmp_path / "bad.yaml").write_text("a: [")
    refused(run("train", tmp_path / "bad.yaml"), "not valid YAML")
