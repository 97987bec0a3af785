"""Fully sharded training on two gloo processes, started by accelerate with the shipped file, equals plain training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pliant.errors import ConfigError
from pliant.training import parse_config, train
from pliant.training.checkpoint import load_checkpoint
from pliant.training.objectives import FlowMatching
from pliant.training.sharding import check_sharded
from support.training import TINY_DIT, packs, pictures, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def launched(*files: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", str(ROOT / "configs/accelerate/fsdp.yaml"), str(ROOT / "tests/support/sharded_runs.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*launch, *map(str, files)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_sharded_runs_equal_plain_ones_also_resumed(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    picture = {"every": 2, "steps": 1, "rows": 1, "columns": 2}
    shared = {"dit": TINY_DIT, "flexify": {"patch_sizes": [8], "recipe": "shared"}}
    trees = {
        "dit": lambda out, two: tiny_config(
            out, steps=4, accumulate=2, sampling=picture, model=shared, objective={"name": "shared"}
        ).to_dict(),
        "packs": lambda out, two: packs(data, out, accumulate=1 if two else 2),
    }
    files = []
    for name, tree in trees.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(tree(tmp_path / "two" / name, True)))
    done = launched(*files)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, tree in trees.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        train(parse_config(tree(one, False)), quiet=True)
        logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
        assert len(logs[0]) == len(logs[1]) == 4
        for a, b in zip(*logs, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        shards = json.loads((two / "model" / "shards.json").read_text())
        assert 0.45 * shards["all"] < shards["held"] < 0.55 * shards["all"]
        # Adam divides tiny gradients by themselves: sums in another order may move a weight by part of a step.
        weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        assert all(float((weights[0][k] - weights[1][k]).abs().max()) < 1e-3 for k in weights[0])
        states = [load_checkpoint(folder / "checkpoint-000004") for folder in (one, two)]
        for key in ("model", "ema"):
            a, b = (getattr(state, key) for state in states)
            assert a.keys() == b.keys() and all(float((a[k] - b[k]).abs().max()) < 1e-3 for k in a)
        moments = [state.optimizer["state"] for state in states]
        assert moments[0].keys() == moments[1].keys()
        assert all(moments[0][i]["exp_avg"].allclose(moments[1][i]["exp_avg"], atol=1e-5) for i in moments[0])
    # A plain run goes on from the checkpoint of a sharded one.
    folder = tmp_path / "two" / "packs"
    more = train(parse_config(packs(data, folder, accumulate=2, steps=5, resume="latest")), quiet=True)
    assert more.step == 5
    assert len(list((tmp_path / "two" / "dit" / "samples").glob("*.png"))) == 2


def test_refused_objectives_say_so() -> None:
    from pliant.training.objectives.mean_flow import MeanFlow

    check_sharded(FlowMatching())
    with pytest.raises(ConfigError, match="not MeanFlow; train it without FSDP"):
        check_sharded(MeanFlow())
