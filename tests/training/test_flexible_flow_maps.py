"""Flow maps are trained on the native backbone as on a DiT."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.plans import uniform
from pliant.training import setup, train
from support.training import tiny_config

FLEXIBLE = {"input_size": [8, 8], "patch_sizes": [2, 4], "in_channels": 1, "width": 32, "depth": 1, "heads": 2,
            "num_classes": 10}  # fmt: skip


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "mean-flow"},
        {"name": "alpha-flow"},
        {"name": "split-mean-flow"},
        {"name": "shared", "own": {"name": "mean-flow"}},
    ],
    ids=lambda o: o["name"],
)
def test_objectives_of_flow_maps_train_the_native_backbone(objective: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model={"flexible": FLEXIBLE, "flow_map": True}, objective=objective)
    before = setup.build_denoiser(config).network.state_dict()
    result = train(config, quiet=True)  # gates and heads are zero at first: lengths matter from the third step on
    model = pliant.load(result.model_folder)
    assert model.config.flow_map
    after = model.network.state_dict()
    assert float((after["jump_embed.fc2.weight"] - before["jump_embed.fc2.weight"]).abs().max()) > 0
    images = pliant.sample(model, uniform(model, 2, "jump"), [0, 1])
    assert images.shape == (2, 1, 8, 8) and bool(torch.isfinite(images).all())
