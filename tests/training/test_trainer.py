"""Runs: exact resumption, divergence, full disks, flexible models."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pliant import Denoiser, PliantError
from pliant.formats import load, load_adapter
from pliant.training import checkpoint, setup, train
from pliant.training.checkpoint import load_checkpoint
from pliant.training.config import TrainConfig
from pliant.training.data import ImageSet
from pliant.training.objectives import FlowMatching
from pliant.training.state import Trainable
from support.networks import tiny_denoiser
from support.training import TINY_DIT, equal_states, tiny_config


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def assert_same_end(a: Path, b: Path, step: int = 6) -> None:
    """Bit-equal parameters, averages and optimizer state, and equal exported weights."""
    one, two = (load_checkpoint(folder / f"checkpoint-{step:06d}") for folder in (a, b))
    assert equal_states(dict(one.model), dict(two.model))
    assert equal_states(dict(one.ema), dict(two.ema))
    for left, right in zip(one.optimizer["state"].values(), two.optimizer["state"].values(), strict=True):
        assert equal_states(left, right)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (a, b)]
    assert equal_states(*weights)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(tiny_config(folder), quiet=True)
    return folder


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert names == {"checkpoint-000004", "checkpoint-000006", "metrics.jsonl", "model", "tensorboard"}
    row = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {"step", "loss", "lr", "grad_norm", "images_per_second", "flops_per_second"}
    assert row.keys() == expected
    denoiser = load(str(straight / "model"))
    assert denoiser.class_names == [str(i) for i in range(10)]
    assert equal_states(denoiser.network.state_dict(), dict(load_checkpoint(straight / "checkpoint-000006").ema))


def test_resuming_is_exact(straight: Path, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, steps=3), quiet=True)
    result = train(tiny_config(tmp_path, resume="latest"), quiet=True)
    assert result.step == 6
    assert_same_end(straight, tmp_path)
    assert losses(tmp_path) == losses(straight)


def test_an_older_checkpoint_resumes_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = Trainable(tiny_denoiser().network, tiny_config(tmp_path, steps=1))
    state = trained.capture(0)
    info = json.loads(json.dumps(state.info))
    del info["config"]["data"]["crop"], info["config"]["compile"]  # settings that such a version did not have
    trained.restore(tmp_path, replace(state, info=info))
    assert not caplog.records
    info["config"]["seed"] = 12345
    trained.restore(tmp_path, replace(state, info=info))
    assert "another seed" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from support.training import tiny_config
from pliant.training import checkpoint, train, trainer

kind, folder = sys.argv[1], Path(sys.argv[2])
if kind == "while writing":
    write = checkpoint._write
    def half(path, data):
        if path.name == "optimizer.pt" and "000004" in str(path):
            write(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)
    checkpoint._write = half
else:
    step = trainer.Trainer._step
    def dying(self, k, batches):
        if k == 5:
            os._exit(9)
        return step(self, k, batches)
    trainer.Trainer._step = dying
train(tiny_config(folder), quiet=True)
"""


@pytest.mark.parametrize("kind", ["while writing", "between checkpoints"])
def test_a_killed_run_resumes_exactly(
    kind: str, straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(folder)], env=environment, timeout=300, check=False)
    assert done.returncode in (-signal.SIGKILL, 9)
    newest = max(path.name for path in folder.glob("checkpoint-*"))
    assert newest == ("checkpoint-000002" if kind == "while writing" else "checkpoint-000004")
    with caplog.at_level(logging.WARNING, "pliant.training"):
        train(tiny_config(folder, resume="latest"), quiet=True)
    assert ("unfinished" in caplog.text) == (kind == "while writing")
    assert not list(folder.glob("*.tmp"))
    assert_same_end(straight, folder)


def test_accumulation_does_not_change_the_run(straight: Path, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, accumulate=4), quiet=True)
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)


def test_the_callers_random_state_is_neither_used_nor_changed(straight: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    train(tiny_config(tmp_path), quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_end(straight, tmp_path)


def test_a_finished_run_can_be_prolonged(straight: Path, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, steps=4), quiet=True)
    assert train(tiny_config(tmp_path, steps=4, resume="latest"), quiet=True).step == 4
    train(tiny_config(tmp_path, resume="latest"), quiet=True)
    assert_same_end(straight, tmp_path)
    with pytest.raises(PliantError, match="beyond"):
        train(tiny_config(tmp_path, steps=2, resume="latest"), quiet=True)


def test_resuming_from_nothing_starts(tmp_path: Path) -> None:
    assert train(tiny_config(tmp_path, steps=1, resume="latest"), quiet=True).step == 1


def test_an_old_run_is_not_overwritten(straight: Path) -> None:
    with pytest.raises(PliantError, match="resume=latest"):
        train(tiny_config(straight), quiet=True)


def test_changed_settings_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny_config(tmp_path, steps=1), quiet=True)
    with caplog.at_level(logging.WARNING, "pliant.training"):
        train(tiny_config(tmp_path, steps=2, batch_size=4, resume="latest"), quiet=True)
    assert "another batch_size" in caplog.text


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, steps=1), quiet=True)
    model = {"dit": {**TINY_DIT, "depth": 2}}
    with pytest.raises(PliantError, match="another model"):
        train(tiny_config(tmp_path, model=model, resume="latest"), quiet=True)


def test_nan_stops_before_it_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = FlowMatching.__call__

    def poisoned(self: FlowMatching, denoiser: Denoiser, batch: Any, draws: Any, compute: Any = None) -> Any:
        result = sound(self, denoiser, batch, draws, compute)
        return type(result)(result.loss * (float("nan") if draws.step == 3 else 1.0))

    monkeypatch.setattr(FlowMatching, "__call__", poisoned)
    with pytest.raises(PliantError, match=r"step 3: loss nan.*checkpoint-000002"):
        train(tiny_config(tmp_path), quiet=True)
    state = load_checkpoint(tmp_path / "checkpoint-000002")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.model.values())


def fill_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    write = checkpoint._write

    def full(path: Path, data: bytes) -> None:
        if f"{step:06d}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full)


def test_a_full_disk_does_not_stop_training(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_disk(monkeypatch, 4)
    with caplog.at_level(logging.WARNING, "pliant.training"):
        train(tiny_config(tmp_path), quiet=True)
    (record,) = caplog.records
    assert "No space left" in record.getMessage()
    assert "checkpoint-000002" in record.getMessage()
    assert_same_end(straight, tmp_path)


def test_a_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, 6)
    with pytest.raises(PliantError, match=r"checkpoint-000006.*No space left.*checkpoint-000004"):
        train(tiny_config(tmp_path), quiet=True)
    assert load_checkpoint(tmp_path / "checkpoint-000004").step == 4


def test_batches_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PliantError, match="does not divide"):
        train(tiny_config(tmp_path, accumulate=3), quiet=True)


def test_sampler_sees_the_averages_and_the_run_does_not_notice(straight: Path, tmp_path: Path) -> None:
    seen = {}

    def sampler(denoiser: Denoiser, step: int) -> None:
        assert not denoiser.network.training
        seen[step] = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}

    train(tiny_config(tmp_path, sampling={"every": 3}), sampler=sampler, quiet=True)
    assert sorted(seen) == [3, 6]
    assert equal_states(seen[6], dict(load_checkpoint(tmp_path / "checkpoint-000006").ema))
    assert_same_end(straight, tmp_path)


def test_grids(tmp_path: Path) -> None:
    from PIL import Image

    sampling = {"every": 1, "steps": 2, "solver": "euler", "guidance": 2.0, "rows": 2}
    train(tiny_config(tmp_path, steps=1, sampling=sampling), quiet=True)
    with Image.open(tmp_path / "samples" / "step-000001.png") as image:
        assert image.size == (10 * 64 + 9 * 4, 2 * 64 + 4)


def test_a_failing_sampler_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def sampler(denoiser: Denoiser, step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level(logging.WARNING, "pliant.training"):
        train(tiny_config(tmp_path, steps=1, sampling={"every": 1}), sampler=sampler, quiet=True)
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"objective": {"name": "ddpm"}},
        {
            "objective": {"name": "shared", "mmd": {"weak_steps": 1, "powerful_steps": 1}},
            "model": {"dit": TINY_DIT, "flexify": {"patch_sizes": [8], "recipe": "shared"}},
        },
    ],
    ids=["bf16", "ddpm", "shared"],
)
def test_other_recipes_run_and_resume_exactly(changes: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(whole, steps=3, **changes), quiet=True)
    train(tiny_config(parts, steps=2, **changes), quiet=True)
    train(tiny_config(parts, steps=3, resume="latest", **changes), quiet=True)
    assert_same_end(whole, parts, step=3)


def test_learning(tmp_path: Path) -> None:
    """A tiny network halves its loss on digits within seconds, with the cosine schedule."""
    dit = {**TINY_DIT, "patch_size": [2, 2], "width": 64, "depth": 2}
    config = tiny_config(
        tmp_path,
        model={"dit": dit},
        data={"source": "digits"},
        optimizer={"lr": 3e-3, "warmup": 10, "decay": "cosine"},
        steps=150,
        batch_size=32,
        log_every=30,
        checkpoint={"every": 1000},
    )
    train(config, quiet=True)
    curve = losses(tmp_path)
    assert curve[150] < 0.6 * curve[30]


class TestDistillation:
    """Recipe L from a trained folder: the base stays bit-equal, the adapter is stored on its own."""

    def config(self, folder: Path, base: Path, **changes: Any) -> TrainConfig:
        model = {"from": str(base / "model"), "flexify": {"patch_sizes": [8], "options": {"rank": 2}}}
        return tiny_config(folder, model=model, objective={"name": "distill"}, **changes)

    def test_only_the_adapter_changes(self, straight: Path, tmp_path: Path) -> None:
        config = self.config(tmp_path, straight)
        before = setup.build_denoiser(config).network.state_dict()
        result = train(config, quiet=True)
        after = result.denoiser.network.state_dict()
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"modes"}
        state = load_checkpoint(tmp_path / "checkpoint-000006")
        assert all(name.startswith("modes.") for name in (*state.model, *state.ema))
        flexible = load_adapter(load(str(straight / "model")), str(tmp_path / "adapter"))
        assert equal_states(flexible.network.state_dict(), load(str(tmp_path / "model")).network.state_dict())

    def test_resuming_is_exact_and_checks_the_base(self, straight: Path, tmp_path: Path) -> None:
        whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
        train(self.config(whole, straight, steps=3), quiet=True)
        train(self.config(parts, straight, steps=2), quiet=True)
        train(self.config(parts, straight, steps=3, resume="latest"), quiet=True)
        assert_same_end(whole, parts, step=3)
        train(tiny_config(other, seed=8, steps=1), quiet=True)
        with pytest.raises(PliantError, match="another base"):
            train(self.config(parts, other, resume="latest"), quiet=True)


def test_data_and_model_can_be_given(tmp_path: Path) -> None:
    data = ImageSet(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), ("only",))
    denoiser = setup.build_denoiser(tiny_config(tmp_path))
    result = train(tiny_config(tmp_path, steps=1), denoiser=denoiser, data=data, quiet=True)
    assert result.denoiser.network is denoiser.network
