"""Packs of samples of any size on two gloo processes: the same training as one process with two packs per step."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pliant.training import parse_config, train
from support.training import in_two_processes, packs, pictures


@pytest.mark.slow
def test_two_processes_equal_two_packs(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    one, two = tmp_path / "one", tmp_path / "two"
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(packs(data, two, checkpointing=False)))  # JSON is YAML
    done = in_two_processes("train", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    train(parse_config(packs(data, one, accumulate=2, checkpointing=False)), quiet=True)
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 4
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    assert all(float((weights[0][k] - weights[1][k]).abs().max()) < 1e-3 for k in weights[0])
