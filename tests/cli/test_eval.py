"""`pliant eval`: a number, its interval and its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant.cli.intervals import bootstrap, student
from support.cli import Run, refused

pytest.importorskip("sklearn")

FAST = ("--steps", 2, "--reference", "digits:test", "--num", 20)


def test_report(flexible: Path, run: Run) -> None:
    done = run("eval", flexible, "--budget", "80%", *FAST, "--seed", 5, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert report["metric"] == "Fréchet distance (digits-classifier)"
    assert report["interval"]["low"] <= report["distance"]["mean"] <= report["interval"]["high"]
    assert "bootstrap" in report["interval"]["how"]
    recipe = report["recipe"]
    assert recipe["images"] == 20
    assert recipe["seeds"].startswith("5..24")
    assert recipe["reference"] == "digits (test)"
    assert recipe["steps"] == 2
    assert recipe["share_of_full_compute"] == report["cost"]["share"] <= 0.801
    assert len(recipe["weights_sha256"]) == 64


def test_repeats_and_text(flexible: Path, run: Run) -> None:
    done = run("eval", flexible, *FAST, "--repeats", 2)
    assert done.code == 0, done.err
    for words in (
        "Fréchet distance (digits-classifier)",
        "recipe",
        "95 % interval",
        "Student, 2 repeats",
        "weights_sha256",
    ):
        assert words in done.out


def test_refusals(flexible: Path, latent: Path, run: Run) -> None:
    refused(run("eval", flexible, *FAST, "--extractor", "inceptoin"), "inceptoin", "inception-v3-pool3")
    refused(run("eval", flexible, "--reference", "nowhere"), "nowhere")
    refused(run("eval", latent, *FAST), "--decode")
    refused(run("eval", flexible, *FAST, "--num", 1), "--num")
    refused(run("eval", flexible, "--steps", 2, "--reference", "digits", "--budget", "1%"), "below the cheapest")


def test_student_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 10, 11, 15, 30, 200):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_bootstrap_knows_that_classes_are_balanced() -> None:
    """Two classes far apart: resampled one by one, their shares would vary and the spread be far too large."""
    from pliant.evaluation import FeatureStatistics, Reference, frechet_distance

    def draw(seed: int, n: int, shift: float = 0.5) -> torch.Tensor:
        rows = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        rows[::2] += 10
        return rows + shift

    reference = Reference("two clouds", FeatureStatistics.of(draw(999, 20_000, shift=0)))
    real = [frechet_distance(FeatureStatistics.of(draw(k, 400)), reference.statistics) for k in range(40)]
    spread = float(torch.tensor(real).std())
    assert bootstrap(draw(0, 400), reference, 2).standard_error == pytest.approx(spread, rel=0.3)
    assert bootstrap(draw(0, 400), reference, 1).standard_error > 4 * spread
