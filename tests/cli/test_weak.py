"""`--weak`: what weak steps are, on models with coarse patches, with exits, and with neither."""

from __future__ import annotations

from pathlib import Path

import pytest

import pliant
from pliant.compute import Compute, LowBand
from pliant.plans import Plan
from support.cli import Run, refused


def test_a_smaller_grid_makes_any_model_cheaper(plain: Path, tmp_path: Path, run: Run) -> None:
    """A checkpoint with one patch size, no training."""
    report = run("plan", plain, "--budget", "60%", "--steps", 8, "--weak", "scale:ratio=2,band=dct", "--json").json
    plan, model = Plan.from_dict(report["plan"]), pliant.load(plain)
    low = Compute(scale=LowBand.of(2, band="dct"))
    weak = [step.compute == low for step in plan.steps]
    assert weak == sorted(weak, reverse=True) and 0 < sum(weak) < 8
    assert plan.cost(model).flops <= 0.6 * Plan.uniform(model, 8).cost(model).flops
    done = run("sample", plain, "--weak-steps", 3, "--steps", 5, "--weak", "scale", "-o", tmp_path / "a.png", "--json")
    once = model.flops(Compute(scale=LowBand())) / model.flops()
    assert done.json["cost"]["share"] == pytest.approx((3 * once + 2) / 5)


def test_an_exit_may_be_the_weak_call(plain: Path, tmp_path: Path, run: Run) -> None:
    assert run("exits", plain, tmp_path / "out", "--depths", "1").code == 0
    plan = run("plan", tmp_path / "out", "--weak-steps", 2, "--steps", 4, "--weak", "exit:1", "--json").json["plan"]
    assert [step.compute.exit for step in Plan.from_dict(plan).steps] == [1, 1, None, None]


@pytest.mark.parametrize(
    ("weak", "words"),
    [
        ("exit:x", ("'exit:x'", "exit:3")),
        ("exit:1", ("no exit after 1 blocks",)),
        ("scale:ratio=3", ("no whole number of pixels",)),
        ("scale:ratio=.5", ("at least 1",)),
        ("scale:ratio=null", ("cannot read the scale",)),
        ("scale:bands=dct", ("did you mean 'band'?",)),
        ("scale:missing=wiener", ("spectrum",)),
        ("patch:4", ("scale:ratio=2",)),
        ("4y4", ("4y4", "2x4")),
    ],
)
def test_nonsense_is_one_line(plain: Path, tmp_path: Path, run: Run, weak: str, words: tuple[str, ...]) -> None:
    out = tmp_path / "a.png"
    refused(run("sample", plain, "--weak-steps", 1, "--steps", 3, "--weak", weak, "-o", out), *words)
    assert not out.exists()
