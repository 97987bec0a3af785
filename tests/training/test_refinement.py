"""Learning rates from gradient norms (sheet G, 7)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pliant.errors import ConfigError, DataError
from pliant.training import train
from pliant.training.refinement import NORMS, Refined, gradient_norm, linear_decay, read_norms, refine_schedule
from pliant.training.schedule import learning_rate
from support.training import tiny_config


def test_constant_norms_give_linear_decay() -> None:
    """Sheet G, 7 (1)."""
    for power in (1, 2):
        found = refine_schedule(np.full(200, 3.7), power, resolution=1000)
        expected = linear_decay(1000)
        np.testing.assert_allclose(found, expected / expected.max(), rtol=0.0, atol=1e-12)
        assert found[-1] == 0.0
    assert linear_decay(4).tolist() == [0.75, 0.5, 0.25, 0.0]


def test_scale_does_not_matter_and_large_norms_mean_small_steps() -> None:
    """Sheet G, 7 (2)."""
    norms = 1.0 + 0.3 * np.sin(np.linspace(0.0, 9.0, 2000))
    np.testing.assert_allclose(refine_schedule(5.0 * norms), refine_schedule(norms), rtol=1e-12)
    early = np.ones(20_000)
    early[:1000] = 10.0
    for power in (1, 2):
        ratio = refine_schedule(np.ones(20_000), power)[100] / refine_schedule(early, power)[100]
        assert ratio == pytest.approx(10.0**power, rel=0.1)


def l1_regression(rates: np.ndarray, peak: float, seed: int) -> tuple[float, list[float]]:
    """Suboptimality of SGD's last iterate on |X w - y|_1 / n (400 x 50, Laplace noise, batch 4), and L2 norms."""
    problem = np.random.default_rng(0)
    x = problem.normal(size=(400, 50))
    truth = problem.normal(size=50)
    y = x @ truth + problem.laplace(size=400)
    rng, w, norms = np.random.default_rng(seed), np.zeros(50), []
    for rate in rates:
        rows = rng.integers(400, size=4)
        gradient = (np.sign(x[rows] @ w - y[rows])[:, None] * x[rows]).mean(0)
        norms.append(float(np.linalg.norm(gradient)))
        w = w - peak * rate * gradient
    return float(np.abs(x @ w - y).mean()), norms


def test_on_l1_regression() -> None:
    """Sheet G, 7 (3, 4): linear decay more than halves what constant rates leave; norms are flat: refining agrees."""
    steps = 2000
    best = min(l1_regression(linear_decay(8000), p, 9)[0] for p in (0.1, 0.2))  # near the optimum
    found = {}
    for name, rates in (("constant", np.ones(steps)), ("linear", linear_decay(steps))):
        peaks = (0.01, 0.02, 0.05, 0.1, 0.2)
        found[name] = min(np.mean([l1_regression(rates, p, seed)[0] for seed in range(3)]) for p in peaks)
    assert found["linear"] - best < 0.5 * (found["constant"] - best)
    # Norms of one run of 4 samples a step are noisy, and the start of the schedule rests on few of them: five runs.
    norms = np.mean([l1_regression(linear_decay(steps), 0.05, seed)[1] for seed in range(5)], axis=0)
    for power, most in ((1, 0.05), (2, 0.07)):  # measured: 0.037 and 0.059
        assert np.abs(refine_schedule(norms, power) - linear_decay(10_000)).max() < most


def test_collapsing_gradients_fall_back_to_linear_decay(caplog: pytest.LogCaptureFixture) -> None:
    norms = np.concatenate([np.full(3000, 100.0), np.ones(7000)])
    with caplog.at_level("WARNING", "pliant.training"):
        found = refine_schedule(norms)
    assert "linear decay instead" in caplog.text
    np.testing.assert_allclose(found, linear_decay(len(found)))


def test_spikes_do_not_survive() -> None:
    norms = np.ones(10_004)
    norms[[500, 5000, 9000]] = 1e3
    np.testing.assert_allclose(refine_schedule(norms), refine_schedule(np.ones(10_004)), atol=1e-9)


def test_bad_norms() -> None:
    with pytest.raises(DataError, match="at least 8"):
        refine_schedule([1.0] * 5)
    with pytest.raises(DataError, match="at least 8 positive"):
        refine_schedule([1.0] * 20 + [0.0])
    with pytest.raises(ConfigError, match="1 \\(Adam"):
        refine_schedule([1.0] * 20, power=3)


def test_schedules_of_other_lengths() -> None:
    refined = Refined(refine_schedule(np.ones(100)))
    assert [refined(step, 10) for step in (0, 4, 9)] == pytest.approx([0.9, 0.5, 0.0], abs=2e-3)
    assert learning_rate(4, 2.0, decay="refined", steps=10, refined=refined) == pytest.approx(1.0, abs=4e-3)
    assert [learning_rate(k, 1.0, 2, "linear", 6) for k in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_norms() -> None:
    parts = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])]
    assert float(gradient_norm(parts, 1)) == 19.0 and float(gradient_norm(parts, 2)) == 13.0


def test_a_run_records_and_the_next_one_refines(tmp_path: Path) -> None:
    options = {"lr": 1e-3, "record_norms": True}
    train(tiny_config(tmp_path / "first", optimizer=options, steps=5), quiet=True)
    train(tiny_config(tmp_path / "first", optimizer=options, steps=12, resume="latest"), quiet=True)
    lines = (tmp_path / "first" / NORMS).read_text().splitlines()
    norms = read_norms(tmp_path / "first")
    assert len(lines) == len(norms) == 12 and min(norms) > 0.0
    second = {"lr": 1e-3, "decay": "refined", "refine_from": str(tmp_path / "first")}
    train(tiny_config(tmp_path / "second", optimizer=second, steps=8), quiet=True)
    rows = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(row)["lr"] for row in rows]
    refined = Refined(refine_schedule(norms))
    assert rates == pytest.approx([1e-3 * refined(k, 8) for k in range(8)])
    with pytest.raises(DataError, match="record_norms=true"):
        read_norms(tmp_path / "second")
    with pytest.raises(ConfigError, match="belong together"):
        tiny_config(tmp_path / "third", optimizer={"decay": "refined"})
