"""Two gloo processes train like one."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pliant.training import train
from support.training import TINY_DIT, in_two_processes, tiny_config


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        # Each step leaves the parameters of the other patch sizes without gradient.
        pytest.param(
            {
                "model": {"dit": TINY_DIT, "flexify": {"patch_sizes": [8], "recipe": "shared"}},
                "objective": {"name": "shared"},
            },
            marks=pytest.mark.slow,  # the same on sharded processes is in test_sharding.py
        ),
    ],
    ids=["flow", "shared"],
)
def test_two_processes_equal_one(changes: dict[str, Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(tiny_config(two, steps=4, **changes).to_dict()))  # JSON is YAML
    done = in_two_processes("train", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    train(tiny_config(one, steps=4, **changes), quiet=True)
    assert len(rows(one)) == len(rows(two)) == 4
    for a, b in zip(rows(one), rows(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    # Adam divides tiny gradients by themselves: sums in another order may move a weight by part of a step.
    assert all(float((weights[0][k] - weights[1][k]).abs().max()) < 1e-3 for k in weights[0])
