"""Checkpoints: complete or absent."""

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.errors import FormatError
from pliant.training import checkpoint
from pliant.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from pliant.training.fingerprint import changed_settings, frozen_hash
from support.training import equal_states


def state(step: int) -> TrainingState:
    tensors = {"w": torch.full((3, 2), float(step)), "b": torch.arange(4.0)}
    optimizer = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return TrainingState(step, tensors, {"w": tensors["w"] + 1}, optimizer, {"config": {"seed": 1}, "frozen": ""})


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(500), keep=2)
    assert path == tmp_path / "checkpoint-000500"
    loaded = load_checkpoint(path)
    assert loaded.step == 500
    assert equal_states(dict(loaded.model), dict(state(500).model))
    assert equal_states(dict(loaded.ema), dict(state(500).ema))
    assert loaded.optimizer == state(500).optimizer
    assert loaded.info == state(500).info


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1000000):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000003", "checkpoint-1000000"]


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_damaged_checkpoints_are_skipped_with_a_note(
    file: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save_checkpoint(tmp_path, state(1), 3), save_checkpoint(tmp_path, state(2), 3)
    data = (bad / file).read_bytes()
    if damage == "missing":
        (bad / file).unlink()
    else:
        (bad / file).write_bytes(data[: len(data) // 2] if damage == "truncated" else bytes(len(data)))
    with caplog.at_level(logging.WARNING, "pliant.training"):
        found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == good
    assert "checkpoint-000002" in caplog.text


def test_pickled_code_is_not_executed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), 1)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    import json

    torch.save({"state": Evil()}, path / "optimizer.pt")
    description = json.loads((path / "state.json").read_text())
    description["files"]["optimizer.pt"] = (path / "optimizer.pt").stat().st_size
    (path / "state.json").write_text(json.dumps(description))
    with pytest.raises(FormatError):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_full_disk_leaves_the_earlier_one(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(1), keep=1)
    write = checkpoint._write

    def full(path: Path, data: bytes) -> None:
        if path.name == file:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, state(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert load_checkpoint(tmp_path / "checkpoint-000001").step == 1


def test_a_damaged_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), 1)
    (path / "model.safetensors").unlink()
    save_checkpoint(tmp_path, state(1), 1)
    assert load_checkpoint(path).step == 1


def test_frozen_parameters_have_a_fingerprint() -> None:
    layer = torch.nn.Linear(2, 2)
    assert frozen_hash(layer) == ""
    layer.weight.requires_grad_(False)
    before = frozen_hash(layer)
    layer.bias.data += 1
    assert frozen_hash(layer) == before
    layer.weight.data += 1
    assert frozen_hash(layer) != before


def test_changed_settings() -> None:
    before = {"seed": 1, "steps": 5, "output": "a", "optimizer": {"decay": "constant"}}
    assert changed_settings(before, {**before, "steps": 9, "output": "b"}) == []
    assert changed_settings(before, {**before, "seed": 2}) == ["seed"]
    cosine = {**before, "optimizer": {"decay": "cosine"}}
    assert changed_settings(cosine, {**cosine, "steps": 9}) == ["steps"]
