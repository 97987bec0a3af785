"""Token routers through the trainer: the network stays frozen, the routers learn, files hold both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pliant
from pliant import Denoiser
from pliant.adapters.token_router import TokenRoutedDiT, route_tokens
from pliant.errors import ConfigError
from pliant.paths import NetworkTime, VPDiscrete
from pliant.training import train
from pliant.training.config import TrainConfig, parse_config
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, TokenDistillation
from support.networks import tiny_denoiser


def config(output: Path, **objective: object) -> TrainConfig:
    return parse_config(
        {
            "model": {"from": str(output.parent / "base"), "routers": {"bias": 1.0}},
            "objective": {"name": "token-routers", "keep": 0.5, **objective},
            "data": {"source": "digits", "limit": 20},
            "steps": 3,
            "batch_size": 4,
            "log_every": 1,
            "output": str(output),
        }
    )


def test_the_trainer_trains_routers_and_keeps_the_network(tmp_path: Path) -> None:
    base = tiny_denoiser(in_channels=1, num_classes=10)
    pliant.save(base, tmp_path / "base")
    result = train(config(tmp_path / "run"), quiet=True)
    back = pliant.load(result.model_folder)
    assert isinstance(back.network, TokenRoutedDiT)
    fresh = route_tokens(base, bias=1.0).network
    assert isinstance(fresh, TokenRoutedDiT)
    for name, tensor in base.network.state_dict().items():
        assert torch.equal(back.network.base.state_dict()[name], tensor)
    weights = back.network.routers[0].fc2.weight  # type: ignore[union-attr]
    assert not torch.equal(weights, fresh.routers[0].fc2.weight)  # type: ignore[union-attr, arg-type]
    again = pliant.load_adapter(base, tmp_path / "run" / "adapter").network
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), back.network.parameters(), strict=True))


def test_networks_with_variance_and_other_paths_are_fine() -> None:
    model = route_tokens(tiny_denoiser(learn_sigma=True))
    discrete = Denoiser(model.network, VPDiscrete(), "epsilon", NetworkTime.timesteps())
    images = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.arange(4) % 3)
    for denoiser in (model, discrete, discrete.on_path(pliant.paths.get_path("linear"), "velocity")):
        loss = TokenDistillation(0.5)(denoiser, batch, Draws.single(4))
        assert torch.isfinite(loss.loss)
        assert set(loss.logs) == {"gap", "keep", "size", "entropy", "budget"}


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kep"):
        config(tmp_path / "run", kep=0.5)
    with pytest.raises(ConfigError, match="keep"):
        config(tmp_path / "run", keep=1.5)
