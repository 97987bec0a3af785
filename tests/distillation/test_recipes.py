"""Recipes end to end on a tiny model: what they leave, being killed anywhere and resumed, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pliant
from pliant.adapters.flexify import flexify
from pliant.distillation import RECIPES, distil, load_recipe
from pliant.distillation.recipe import parse_recipe
from pliant.distillation.registry import SETTINGS
from pliant.errors import ConfigError, DataError, PliantError
from pliant.files import write_json
from pliant.plans import Plan, sample
from pliant.training import trainer
from pliant.training.fingerprint import weights_hash
from support.cli import Run, refused, run_here
from support.networks import tiny_denoiser

TRAIN = {"steps": 3, "batch_size": 4, "log_every": 1, "checkpoint": {"every": 1, "keep": 1}}
PAIRS = {"count": 6, "shard_size": 2, "batch_size": 4, "plan": {"steps": 2, "solver": "euler"}}
DATA = {"source": "digits", "limit": 8}
STUDENT = {
    "input_size": [8, 8], "patch_size": [4, 4], "in_channels": 1, "width": 16, "depth": 1, "heads": 2,
    "num_classes": 10, "learn_sigma": False,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "reflow": {"rounds": 2, "pairs": PAIRS, "train": TRAIN, "real": DATA, "real_steps": 2},
    "rfpp": {"pairs": PAIRS, "train": TRAIN, "metric": {"name": "huber"}},
    "direct": {"pairs": PAIRS, "train": TRAIN, "plan": {"steps": 2}},
    "weak-first": {"pairs": PAIRS, "train": TRAIN, "plan": {"steps": 2, "weak_steps": 1}, "patches": "own"},
    "instaflow": {
        "pairs": {**PAIRS, "plan": {"steps": 2, "solver": "euler", "guidance": 1.5}},
        "reflow": TRAIN, "reflowed_pairs": PAIRS, "distil": TRAIN, "perceptual": TRAIN,
        "metric": {"name": "perceptual", "perceptual": "classifier:digits-classifier"},
    },
    "slimflow": {
        "student": STUDENT, "pairs": PAIRS, "reflow": TRAIN, "student_pairs": PAIRS, "distil": TRAIN,
    },
    "rectified-diffusion": {"pairs": PAIRS, "train": TRAIN, "consistency": TRAIN, "intervals": 2},
    "phased": {"data": DATA, "train": TRAIN, "phases": 2, "steps": 2, "plan": {"steps": 2, "solver": "ddim"}},
    "boss": {"anchors": 4, "search": 4, "count": 6, "train": {**TRAIN, "trainable": "lora"}, "plan": {"steps": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A flexible model of 1x8x8 samples in 10 classes, random."""
    base = tiny_denoiser(in_channels=1, num_classes=10, patch_size=(2, 2), width=16, depth=1, heads=2)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    pliant.save(flexify(base, [4], rank=2), folder)
    return str(folder)


def run_recipe(name: str, teacher: str, out: Path, resume: bool = False) -> pliant.Denoiser:
    return distil(parse_recipe({"recipe": name, **TINY[name]}), teacher, out, resume=resume, quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


class Killed(BaseException):
    """As abrupt as a signal for what it passes through."""


QUICK = ("boss", "slimflow", "weak-first")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(TINY) - set(QUICK))]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_recipes_leave_a_few_step_model_and_resume_exactly(
    name: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at every fifth optimizer step over and over, they end with the same bits as in one go."""
    straight = run_recipe(name, teacher, tmp_path / "straight")
    plan = Plan.own(straight)
    assert plan is not None
    assert weights_hash(straight) != weights_hash(pliant.load(teacher))
    # What is loaded again carries the plan, and runs it.
    again = pliant.load(tmp_path / "straight" / "model")
    assert Plan.own(again) == plan
    images = sample(again, plan, [0, 1], [3, 4])
    assert bool(torch.isfinite(images).all())
    if name != "slimflow":  # whose student has one patch size
        assert again.patch_sizes == ((2, 2), (4, 4))

    step, count = trainer.Trainer._step, 0

    def dying(self: Any, k: int, batches: Any) -> Any:
        nonlocal count
        count += 1
        if count % 5 == 0:
            raise Killed
        return step(self, k, batches)

    monkeypatch.setattr(trainer.Trainer, "_step", dying)
    for attempt in range(20):
        try:
            run_recipe(name, teacher, tmp_path / "killed", resume=attempt > 0)
            break
        except Killed:
            continue
    assert count >= 3
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_every_recipe_is_tested_here_or_elsewhere_and_has_settings() -> None:
    for name, entry in RECIPES.items():
        assert entry.settings.is_file(), name
        assert load_recipe(name).recipe == name
    assert {f.stem for f in SETTINGS.glob("*.yaml")} == set(RECIPES)
    assert set(TINY) <= set(RECIPES)


def test_weak_first_runs_its_first_step_weak(teacher: str, tmp_path: Path) -> None:
    plan = Plan.own(run_recipe("weak-first", teacher, tmp_path / "out"))
    assert plan is not None
    assert [s.compute.patch for s in plan.steps] == [(4, 4), None]
    config = json.loads((tmp_path / "out" / "distilled" / "done.json").read_text())
    assert config["objective"]["plan"]["weak_steps"] == 1


def test_stages_continue_from_the_averaged_weights(teacher: str, tmp_path: Path) -> None:
    """Sheet C, 2 (3): a second stage starts where the first one's average is, not from scratch or from the teacher."""
    run_recipe("instaflow", teacher, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "distilled-perceptual" / "done.json").read_text())
    assert config["model"]["from"] == str(tmp_path / "out" / "distilled" / "model")
    first, second = (tmp_path / "out" / s / "model" for s in ("distilled", "distilled-perceptual"))
    gap = weights_gap(first, second)
    assert 0.0 < gap < 0.01 < weights_gap(Path(teacher), second) + 0.02


def weights_gap(a: Path, b: Path) -> float:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return max(float((one[k] - two[k]).abs().max()) for k in one)


def test_online_reflow(teacher: str, tmp_path: Path) -> None:
    tree = {"recipe": "reflow", "pairs": PAIRS, "train": TRAIN, "online": DATA}
    model = distil(parse_recipe(tree), teacher, tmp_path / "out", quiet=True)
    assert Plan.own(model) is not None
    assert not (tmp_path / "out" / "pairs-1").exists()


def test_a_folder_of_an_older_version_resumes(teacher: str, tmp_path: Path) -> None:
    run_recipe("direct", teacher, tmp_path)
    file = tmp_path / "recipe.json"
    stored = json.loads(file.read_text())
    del stored["class_dropout"], stored["train"]["lora_rank"]  # settings that such a version did not have
    file.write_text(json.dumps(stored))
    run_recipe("direct", teacher, tmp_path, resume=True)
    file.write_text(json.dumps({**stored, "invented": 1}))  # and one that this version does not have
    with pytest.raises(ConfigError, match="begun with another"):
        run_recipe("direct", teacher, tmp_path, resume=True)


def test_other_settings_and_used_folders_are_refused(teacher: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe("direct", teacher, out)
    with pytest.raises(ConfigError, match="already holds a distillation"):
        run_recipe("direct", teacher, out)
    changed = parse_recipe({"recipe": "direct", **TINY["direct"], "class_dropout": 0.1})
    with pytest.raises(ConfigError, match="another 'class_dropout'"):
        distil(changed, teacher, out, resume=True, quiet=True)
    deeper = {**TINY["direct"], "train": {**TRAIN, "steps": 7}}
    with pytest.raises(ConfigError, match=r"another 'train\.steps' \(\d+, now 7\)"):
        distil(parse_recipe({"recipe": "direct", **deeper}), teacher, out, resume=True, quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds 'thesis.txt'"):
        run_recipe("direct", teacher, tmp_path / "full")
    with pytest.raises(DataError, match="not the index"):
        distil(
            parse_recipe({"recipe": "direct", **TINY["direct"], "pairs": {"folder": str(tmp_path)}}),
            teacher, tmp_path / "new", quiet=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "`recipe: reflow`"),
        ({"recipe": "reflw"}, "did you mean 'reflow'"),
        ({"recipe": "reflow", "round": 2}, "did you mean 'rounds'"),
        ({"recipe": "reflow", "rounds": 0}, "key rounds"),
        ({"recipe": "reflow", "train": {"step": 2}}, "did you mean 'steps'"),
    ],
)
def test_bad_settings(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree)


# ------------------------------------------------------------------------------------------------------------ the CLI


@pytest.fixture
def run() -> Run:
    return run_here


def test_the_verb(teacher: str, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "direct.yaml"
    file.write_text(yaml.safe_dump({"recipe": "direct", **TINY["direct"]}))
    out = tmp_path / "out"
    done = run("distill", file, "train.steps=2", "--teacher", teacher, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["evaluations"] == 2 and done.json["model"] == str(out / "model")
    refused(run("distill", file, "train.steps=2", "--teacher", teacher, "--out", out), "--resume")
    assert run("distill", file, "train.steps=2", "--teacher", teacher, "--out", out, "--resume", "--json").code == 0
    # Sampling and evaluation take the plan that lies beside the weights.
    assert run("plan", out / "model", "--json").json["digest"] == done.json["plan_digest"]
    sampled = run("sample", out / "model", "-o", tmp_path / "a.png", "--json").json
    assert sampled["plan_digest"] == done.json["plan_digest"]
    other = run("sample", out / "model", "--steps", 3, "-o", tmp_path / "b.png", "--json").json
    assert other["cost"]["evaluations"] == 3


def test_the_list(run: Run) -> None:
    assert {row["name"] for row in run("distill", "--list", "--json").json} == set(RECIPES)
    assert "reflow" in run("distill", "--list").out


def test_bad_commands(teacher: str, tmp_path: Path, run: Run) -> None:
    refused(run("distill"), "name a recipe")
    refused(run("distill", "reflow"), "--teacher is missing")
    refused(run("distill", "reflow", "--teacher", teacher), "--out is missing")
    refused(run("distill", "reflo", "--teacher", teacher, "--out", tmp_path / "x"), "did you mean 'reflow'")
    refused(run("distill", "reflow", "rounds", "--teacher", teacher, "--out", tmp_path / "x"), "key.sub=value")
    refused(run("distill", "reflow", "--teacher", "nowhere", "--out", tmp_path / "x"), "nowhere")


def test_a_damaged_plan_beside_the_weights(teacher: str, tmp_path: Path, run: Run) -> None:
    model = pliant.load(teacher)
    folder = tmp_path / "model"
    pliant.save(model, folder)
    (folder / "plan.json").write_text("{")
    refused(run("sample", folder, "-o", tmp_path / "a.png"), "plan.json", "not readable JSON")
    write_json(folder / "plan.json", {"format": "something"})
    with pytest.raises(PliantError, match="not a plan"):
        Plan.own(pliant.load(folder))
