"""Small networks whose every parameter is random, so that no part of them can hide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant import Denoiser, DiT, DiTConfig
from pliant.paths import NetworkTime, PredictionType, get_path

TINY: dict[str, Any] = {
    "input_size": (8, 8),
    "patch_size": (2, 2),
    "in_channels": 2,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "num_classes": 3,
    "learn_sigma": False,
}


@torch.no_grad()
def randomize(network: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """N(0, std^2) into every parameter: DiT's zero initialisation would make most tests pass trivially."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def tiny_dit(seed: int = 0, **options: Any) -> DiT:
    """A random DiT; options override the fields of `TINY`."""
    network = DiT(DiTConfig(**{**TINY, **options})).eval()
    randomize(network, seed)
    return network


def tiny_denoiser(
    seed: int = 0, path: str = "linear", prediction: PredictionType = "velocity", **options: Any
) -> Denoiser:
    return Denoiser(tiny_dit(seed, **options), get_path(path), prediction, NetworkTime(scale=1000.0))


def batch(network: DiT, n: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, C, H, W), network times (n,) and labels (n,), the last of them null where there is one."""
    config = network.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.in_channels, *config.input_size, generator=generator)
    t = 1000.0 * torch.rand(n, generator=generator)
    y = torch.arange(n) % config.label_rows
    return x, t, y
