"""Packs of samples of any size on two gloo processes: the same training as one process with two packs per step."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pliant.training import parse_config, train
from support.training import in_two_processes


def pictures(folder: Path) -> Path:
    from PIL import Image

    for i, size in enumerate([(4, 4), (4, 6), (8, 4), (6, 4)] * 3):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 20 * i).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.mark.slow
def test_two_processes_equal_two_packs(tmp_path: Path) -> None:
    tree = {
        "model": {"flexible": {"input_size": [4, 4], "in_channels": 1, "width": 32, "depth": 2, "heads": 2,
                               "num_classes": 2, "train_sides": [4, 8], "train_pixels": [16, 32]}},
        "objective": {"name": "any_size"},
        "data": {"source": str(pictures(tmp_path / "data")), "side": 8, "flip": True},
        "steps": 4,
        "tokens": 64,
        "log_every": 1,
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**tree, "output": str(two)}))  # JSON is YAML
    done = in_two_processes("train", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    train(parse_config({**tree, "output": str(one), "accumulate": 2}), quiet=True)
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 4
    for a, b in zip(*logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    assert all(float((weights[0][k] - weights[1][k]).abs().max()) < 1e-3 for k in weights[0])
