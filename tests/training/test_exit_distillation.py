"""Exits learn to imitate the frozen network (sheet E, section 6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pliant
from pliant import Compute, Denoiser, attach_exits
from pliant.adapters import ExitDiT
from pliant.compute import counted_flops
from pliant.errors import ConfigError
from pliant.paths import get_time_density
from pliant.training import parse_config, train
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, ExitDistillation
from pliant.training.setup import build_denoiser, build_objective
from support.networks import randomize, tiny_denoiser
from support.training import tiny_config


def with_exits(depths: tuple[int, ...] = (1, 2), **options: object) -> Denoiser:
    denoiser = attach_exits(tiny_denoiser(depth=3, **options), depths)  # type: ignore[arg-type]
    randomize(denoiser.network.exits, 4)  # type: ignore[arg-type]
    return denoiser


def batch(n: int = 6) -> Batch:
    images = torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(n) % 3)


def test_the_loss_is_the_sum_of_the_gaps() -> None:
    denoiser = with_exits()
    objective = ExitDistillation(class_dropout=0.0)
    result = objective(denoiser, batch(), Draws.single(6))
    draws = Draws.single(6)
    t = draws.each(get_time_density("uniform").sample)
    x = denoiser.path.mix(batch().images, draws.noise(denoiser.path, (2, 8, 8)), t)
    full = denoiser(x, t, batch().labels).value
    gaps = [(denoiser(x, t, batch().labels, Compute(exit=e)).value - full).square().mean() for e in (1, 2)]
    assert result.loss.item() == pytest.approx(gaps[0].item() + gaps[1].item(), rel=1e-4)
    assert result.logs["gap_exit_1"].item() == pytest.approx(gaps[0].item(), rel=1e-4)


def test_variance_codes_are_regressed_with_their_weight() -> None:
    denoiser = with_exits((1,), path="vp-discrete", prediction="epsilon", learn_sigma=True)
    loss = {w: ExitDistillation(variance_weight=w)(denoiser, batch(), Draws.single(6)) for w in (0.0, 0.5)}
    codes = float(loss[0.5].logs["variance_gap_exit_1"])
    assert codes > 0 and loss[0.5].loss.item() == pytest.approx(loss[0.0].loss.item() + 0.5 * codes, rel=1e-5)


def test_velocity_weighting_measures_errors_in_the_velocity() -> None:
    """From x0 on the linear path, v = (x - x0) / t: the squared error is divided by t^2."""
    denoiser = with_exits((1,), prediction="sample")
    losses = [
        ExitDistillation(times=(0.25,), weight=weight)(denoiser, batch(), Draws.single(6)).loss.item()
        for weight in ("one", "velocity")
    ]
    assert losses[1] == pytest.approx(16 * losses[0], rel=1e-4)


def test_times_of_a_plan(tmp_path: Path) -> None:
    plain = tiny_denoiser(in_channels=1, num_classes=10, depth=3)
    pliant.save(plain, tmp_path / "model")
    plan = pliant.Plan.uniform(plain, 2, "heun", times=[0.9, 0.5, 0.1])
    plan.save(tmp_path / "plan.json")
    config = tiny_config(
        tmp_path / "run",
        model={"from": str(tmp_path / "model"), "exits": {"depths": [1, 2], "gates": "zero"}},
        objective={"name": "exits", "plan": str(tmp_path / "plan.json"), "weight": "velocity"},
    )
    denoiser = build_denoiser(config)
    objective = build_objective(config, denoiser)
    assert isinstance(objective, ExitDistillation) and objective.weight == "velocity"
    assert set(objective.times) == {0.9, 0.5, 0.1} and denoiser.exit_depths == (1, 2)
    drawn = objective._times(denoiser, Draws.single(200))
    assert set(drawn.tolist()) == set(objective.times)


def test_expected_flops_are_what_a_step_does() -> None:
    denoiser = with_exits()
    objective = ExitDistillation()
    counted = counted_flops(lambda: objective(denoiser, batch(6), Draws.single(6)).loss.backward())
    # To some percent: a backward pass of twice the cost ignores inputs that need no gradient and attention's scores.
    assert counted / 6 == pytest.approx(objective.flops(denoiser), rel=0.1)


def test_a_run_trains_exits_only_and_writes_them_alone(tmp_path: Path) -> None:
    plain = tiny_denoiser(in_channels=1, num_classes=10, depth=3)
    pliant.save(plain, tmp_path / "model")
    config = tiny_config(
        tmp_path / "run",
        model={"from": str(tmp_path / "model"), "exits": {"depths": [1]}},
        objective={"name": "exits"},
    )
    start = build_denoiser(config)
    result = train(config, quiet=True)
    trained, again = result.denoiser, pliant.load_adapter(plain, tmp_path / "run" / "adapter")
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 10])
    with torch.no_grad():
        full = [d(x, 0.3, y).value for d in (plain, trained, pliant.load(result.model_folder))]
        left = [d(x, 0.3, y, Compute(exit=1)).value for d in (start, trained, again)]
    assert torch.equal(full[0], full[1]) and torch.equal(full[0], full[2])
    assert torch.equal(left[1], left[2]) and not torch.allclose(left[0], left[1], atol=1e-4)
    assert isinstance(trained.network, ExitDiT)
    assert all(p.grad is None for p in trained.network.base.parameters())


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a model with exits"):
        ExitDistillation().check(tiny_denoiser())
    pliant.save(tiny_denoiser(in_channels=1, num_classes=10, depth=3), tmp_path / "m")
    model = {"from": str(tmp_path / "m"), "exits": {"depths": [1]}}
    config = tiny_config(tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match="its objective is 'exits'"):
        build_objective(config, build_denoiser(config))
    tree = config.to_dict()
    with pytest.raises(ConfigError, match="imitate a trained model"):
        parse_config({**tree, "model": {"dit": {"depth": 3}, "exits": {"depths": [1]}}})
    with pytest.raises(ConfigError, match="either `time` or `plan`"):
        parse_config({**tree, "objective": {"name": "exits", "time": "uniform", "plan": "p.json"}})
    with pytest.raises(ConfigError, match="depth"):
        parse_config({**tree, "model": {**model, "exits": {"depth": [1]}}})


@pytest.mark.slow
def test_an_exit_halves_the_error_of_the_bare_head(tmp_path: Path) -> None:
    """Sheet E 6.3: 8x8 digits, six blocks, exit after three; the reference is the frozen head straight on x_3."""
    dit = {"input_size": [8, 8], "patch_size": [2, 2], "in_channels": 1, "width": 48, "depth": 6, "heads": 4}
    run = {
        "data": {"source": "digits", "split": "all"},
        "batch_size": 64,
        "ema": {"decay": 0.99},
        "log_every": 200,
        "checkpoint": {"every": 2000},
    }
    base = train(
        tiny_config(
            tmp_path / "base",
            model={"dit": {**dit, "num_classes": 10, "learn_sigma": False}},
            optimizer={"lr": 2e-3, "warmup": 50, "decay": "cosine"},
            steps=1200,
            **run,
        ),
        quiet=True,
    )
    x, t, y = _states(base.denoiser)
    with torch.no_grad():
        before = base.denoiser(x, t, y).value
    exits = train(
        tiny_config(
            tmp_path / "exits",
            model={"from": str(base.model_folder), "exits": {"depths": [3]}},
            objective={"name": "exits"},
            optimizer={"lr": 2e-3, "warmup": 50, "decay": "cosine"},
            steps=400,
            **run,
        ),
        quiet=True,
    ).denoiser
    network = exits.network
    assert isinstance(network, ExitDiT)
    with torch.no_grad():
        assert torch.equal(exits(x, t, y).value, before)
        plain = network.plain
        rows, tokens = plain.modulations(exits.encode(t).float(), y), plain.embed(x)
        for i in range(3):
            tokens = plain.blocks[i](tokens, rows[:, 6 * i : 6 * i + 6])
        bare = float((plain.read(tokens, rows) - before).square().mean())
        learnt = float((exits(x, t, y, Compute(exit=3)).value - before).square().mean())
    print(f"MSE to full: bare head on x_3 {bare:.4g}, exit after 3 {learnt:.4g}, ratio {learnt / bare:.4f}")
    assert learnt <= 0.5 * bare


def _states(denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    """Noised digits, uniform times."""
    from pliant.evaluation import digits

    images = digits()
    assert images.labels is not None
    generator = torch.Generator().manual_seed(9)
    chosen = torch.randperm(len(images), generator=generator)[:256]
    x0 = images.images[chosen] / 127.5 - 1
    t = torch.rand(256, generator=generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator)
    return denoiser.path.mix(x0, noise, t), t, images.labels[chosen]
