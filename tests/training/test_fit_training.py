"""FiT in training: any size, FiTv2's freezing rule for larger images, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.errors import ConfigError
from pliant.models.fit import FiT, FiTConfig
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.paths import NetworkTime
from pliant.training import TrainConfig, parse_config, train
from pliant.training.resolution import freeze_for_resolution, trains_on_resolution
from pliant.training.setup import build_denoiser

FIT: dict[str, Any] = {
    "input_size": [4, 4], "patch_size": [1, 1], "in_channels": 1, "width": 32, "depth": 2, "heads": 4,
    "num_classes": 10, "train_length": 8, "train_tokens": 64,
}  # fmt: skip


def config(output: Path, **changes: Any) -> TrainConfig:
    tree = {
        "model": {"fit": FIT},
        "objective": {"name": "any_size"},
        "data": {"source": "nowhere", "side": 8},
        "optimizer": {"lr": 3e-3},
        "steps": 2,
        "tokens": 128,
        "output": str(output),
    }
    return parse_config({**tree, **changes})


def pictures(folder: Path) -> Path:
    from PIL import Image

    for i, size in enumerate([(4, 4), (4, 6), (8, 4), (6, 4)] * 2):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 30 * i).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_a_fit_trains_on_any_size_and_goes_to_the_official_format(tmp_path: Path) -> None:
    source = {"source": str(pictures(tmp_path / "d")), "side": 8}
    done = train(config(tmp_path / "run", data=source))
    model = pliant.load(done.model_folder)
    assert isinstance(model.network, FiT)
    assert model.network_time == NetworkTime.sit()
    before = build_denoiser(config(tmp_path / "other", data=source)).network.state_dict()
    changed = [name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])]
    assert "head.weight" in changed
    pliant.save(model, tmp_path / "fit.safetensors", format="fit")
    back = pliant.load(tmp_path / "fit.safetensors")
    assert back.fingerprint() == model.fingerprint()


def test_the_published_share_of_weights_trains_on_larger_images() -> None:
    """94,961,680 of FiTv2-XL's 671,045,776: 14.15 %, as the paper prints it (sheet B, 1)."""
    with torch.device("meta"):
        network = FiT(FiTConfig.named("FiTv2-XL/2"))
    freeze_for_resolution(network)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == 94_961_680
    assert trained / sum(p.numel() for p in network.parameters()) == pytest.approx(0.1415, abs=5e-5)


def test_the_rule_on_the_native_backbone(tmp_path: Path) -> None:
    network = FlexibleTransformer(FlexibleConfig(width=32, depth=1, heads=2))
    freeze_for_resolution(network)
    named = {name: p.requires_grad for name, p in network.named_parameters()}
    assert named["modes.1x1.head.weight"] and named["modulation.up_weight"] and named["blocks.0.qkv.bias"]
    assert not named["blocks.0.qkv.weight"] and not named["label_embed.weight"]
    model = {"fit": FIT, "trainable": "resolution"}
    built = build_denoiser(config(tmp_path, model=model)).network
    assert {n for n, p in built.named_parameters() if p.requires_grad} == {
        n for n, _ in built.named_parameters() if trains_on_resolution(n)
    }


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    network = FiT(FiTConfig(**{**FIT, "input_size": (4, 4), "patch_size": (1, 1)}))
    for parameter in network.parameters():
        parameter.data.normal_(std=0.15)
    t, y = torch.tensor([0.2, 0.6]), torch.tensor([1, 2])
    found = []
    for kept in (False, True):
        network.checkpointing = kept
        network.zero_grad()
        alone = network(torch.ones(2, 1, 4, 4), t, y).square().mean()
        first, second = network.forward_packed([torch.ones(1, 1, 4, 6), torch.ones(1, 1, 2, 2)], t, y)
        (alone + first.square().mean() + second.square().mean()).backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of"):
        config(tmp_path, model={"fit": FIT, "flexible": {}})
    with pytest.raises(ConfigError, match="is for a DiT"):
        config(tmp_path, model={"fit": FIT, "flexify": {"patch_sizes": [2]}})
    with pytest.raises(ConfigError, match="FiTv2-B/2"):
        build_denoiser(config(tmp_path, model={"fit": {"name": "FiTv2-C/2"}}))
