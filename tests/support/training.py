"""Small training runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant import Denoiser, DiTConfig
from pliant.models.network import Backbone
from pliant.paths import NetworkTime, PredictionType, get_path
from pliant.training import TrainConfig, parse_config

TINY_DIT: dict[str, Any] = {
    "input_size": [8, 8],
    "patch_size": [4, 4],
    "in_channels": 1,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "num_classes": 10,
}


def tiny_config(output: Path, **changes: Any) -> TrainConfig:
    """Six steps on digits; `changes` replace top-level sections."""
    tree: dict[str, Any] = {
        "model": {"dit": TINY_DIT},
        "data": {"source": "digits", "limit": 20, "flip": True},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
        "steps": 6,
        "batch_size": 8,
        "seed": 3,
        "log_every": 1,
        "checkpoint": {"every": 2, "keep": 2},
        "output": str(output),
    }
    return parse_config({**tree, **changes})


TINY_FLEXIBLE: dict[str, Any] = {
    "input_size": [4, 4], "in_channels": 1, "width": 32, "depth": 2, "heads": 2, "num_classes": 2,
    "train_sides": [4, 8], "train_pixels": [16, 32],
}  # fmt: skip


def pictures(folder: Path) -> Path:
    """Twelve grey images of four sizes in two classes; the folder."""
    from PIL import Image

    for i, size in enumerate([(4, 4), (4, 6), (8, 4), (6, 4)] * 3):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 20 * i).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def packs(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Packs of several sizes at a random patch size: each step leaves the other patch size without gradient."""
    return {
        "model": {"flexible": TINY_FLEXIBLE}, "objective": {"name": "any_size"},
        "data": {"source": str(folder), "side": 8, "flip": True},
        "steps": 4, "tokens": 64, "checkpointing": True, "log_every": 1, "checkpoint": {"every": 2},
        "output": str(output), **changes,
    }  # fmt: skip


class Formula(Backbone):
    """A network that is a function of (x, network time, labels), with the interface that a denoiser needs."""

    family = "dit"

    def __init__(self, function: Any, config: DiTConfig) -> None:
        super().__init__()
        self.function, self.config = function, config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.function(x, t, y)
        return out


def formula_denoiser(
    function: Any, path: str = "linear", prediction: PredictionType = "velocity", learn_sigma: bool = False
) -> Denoiser:
    """A denoiser of 1x8x8 samples in 10 classes whose network receives house time."""
    config = DiTConfig(
        input_size=(8, 8), patch_size=(4, 4), in_channels=1, width=16, heads=2, num_classes=10, learn_sigma=learn_sigma
    )
    network: Any = Formula(function, config)
    return Denoiser(network, get_path(path), prediction, NetworkTime())


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of named tensors are bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_two_processes(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """The command line on two gloo processes. (`accelerate launch --cpu --num_processes 2` starts only one.)"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch += ["-m", "--", "pliant.cli", *arguments]  # "--": or torchrun takes the verb's options for its own
    return subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
