"""Two gloo processes train like one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.training import TINY_DIT, tiny_config

from pliant.training import train

SHARED_RECIPE: dict[str, Any] = {
    "model": {"dit": TINY_DIT, "flexify": {"patch_sizes": [8], "recipe": "shared"}},
    "objective": {"name": "shared"},
}
SCRIPT = """
import json, sys
from pliant.training import parse_config, train

for file in sys.argv[1:]:
    train(parse_config(json.load(open(file))), quiet=True)
"""


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Flow matching, and recipe S, where each step leaves the parameters of other patch sizes without gradient."""
    cases: dict[str, dict[str, Any]] = {"flow": {"accumulate": 2}, "shared": SHARED_RECIPE}
    files = []
    for name, changes in cases.items():
        config = tiny_config(tmp_path / f"{name}-two", steps=4, **changes)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(config.to_dict()))
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--num_cpu_threads_per_process", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", str(tmp_path / "script.py"), *map(str, files)]
    done = subprocess.run(
        launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, changes in cases.items():
        one, two = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        train(tiny_config(one, steps=4, **changes), quiet=True)
        assert len(rows(one)) == len(rows(two)) == 4
        for a, b in zip(rows(one), rows(two), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
        # Adam divides tiny gradients by themselves: sums in another order may move a weight by part of a step.
        assert all(float((weights[0][k] - weights[1][k]).abs().max()) < 1e-3 for k in weights[0])
