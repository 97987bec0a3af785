"""Small models for the plan tests: random non-zero weights, so that every mistake changes a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pliant.adapters.flexify import flexify
from pliant.denoiser import Denoiser
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path

Make = Callable[..., Denoiser]


@pytest.fixture
def make() -> Make:
    """A random denoiser: `make(kind="flow" | "ddpm" | "sit", flexible=True, **DiTConfig fields)`."""

    def build(kind: str = "flow", flexible: bool = True, **options: object) -> Denoiser:
        torch.manual_seed(0)
        fields: dict[str, object] = {
            "input_size": (8, 8), "patch_size": (1, 1), "in_channels": 2, "width": 32, "depth": 2, "heads": 2,
            "num_classes": 5, "learn_sigma": kind != "flow",
        }  # fmt: skip
        network = DiT(DiTConfig(**{**fields, **options}))  # type: ignore[arg-type]
        for p in network.parameters():
            p.data.normal_(std=0.1)
        if kind == "ddpm":
            model = Denoiser(network, get_path("vp-discrete"), "epsilon", NetworkTime.timesteps())
        elif kind == "sit":
            model = Denoiser(network, get_path("linear"), "velocity", NetworkTime.sit())
        else:
            model = Denoiser(network, get_path("linear"), "velocity", NetworkTime(scale=1000.0))
        if not flexible:
            return model
        model = flexify(model, [2, 4], rank=2)
        for p in model.network.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.05)
        return model

    return build
