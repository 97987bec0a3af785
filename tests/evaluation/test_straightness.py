"""The straightness of models: against hand-made flows, and the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.evaluation.straightness import straightness
from pliant.training.data import ImageSet
from support.cli import refused, run_here
from support.networks import tiny_denoiser
from support.training import formula_denoiser


def denoiser_of(velocity: Any) -> Any:
    """A denoiser of a formula, with a parameter that says where it lives."""
    model = formula_denoiser(velocity)
    model.network.register_parameter("place", torch.nn.Parameter(torch.zeros(1)))
    return model


def affine(scale: float, shift: float) -> Any:
    """A network for the flow that takes z to shift + scale z along lines."""

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w = t[:, None, None, None]
        z = (x - shift * (1.0 - w)) / (scale * (1.0 - w) + w)
        return z - (shift + scale * z)

    return denoiser_of(velocity)


def test_a_straight_model() -> None:
    found = straightness(affine(3.0, 0.5), steps=8, count=64)
    assert found.straightness < 1e-6 and found.first_order_gap < 1e-9
    # E|z - (0.5 + 3 z)|^2 over 64 elements
    assert found.cost == pytest.approx(64.0 * (0.25 + 4.0), rel=0.05)
    assert len(found.per_step) == len(found.curvature) == 8
    assert found.crossing is None and found.residual is None


def test_a_rotating_model() -> None:
    """v = w J x turns pairs of pixels at a constant rate, a quarter turn in all: S = |z|^2 ((pi/2)^2 - 2)."""
    rate = torch.pi / 2.0

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return rate * torch.stack([-b, a], -1).flatten(-2)

    found = straightness(denoiser_of(velocity), steps=100, count=32)
    norm = found.cost / 2.0  # |z - Jz|^2 = 2 |z|^2
    # int |v|^2 = rate^2 |z|^2, and S = int |v|^2 - cost.
    assert found.straightness == pytest.approx(norm * (rate**2 - 2.0), rel=1e-3)
    assert found.relative == pytest.approx(found.straightness / found.cost)
    # |dv/dt| / |z1 - z0| = rate^2 / sqrt(2) at every time.
    assert found.curvature == pytest.approx([rate**2 / 2**0.5] * 100, rel=1e-3)


def test_the_identity_on_gaussian_data() -> None:
    """Data N(1, 0.5^2): the exact velocity closes the identity to a percent of Monte Carlo."""

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w = t[:, None, None, None]
        return -1.0 + (w - (1.0 - w) * 0.25) / ((1.0 - w) ** 2 * 0.25 + w**2) * (x - (1.0 - w))

    n = 512
    pixels = 1.0 + 0.5 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = ImageSet(pixels, torch.arange(n) % 10, tuple("0123456789"))
    found = straightness(denoiser_of(velocity), steps=64, count=n, data=data)
    assert found.residual == pytest.approx(0.0, abs=0.01)
    assert found.straightness > 1.0 and found.crossing is not None and found.crossing > 1.0


def test_models_of_other_paths_and_weak_calls() -> None:
    vp = tiny_denoiser(path="vp", prediction="epsilon")
    assert straightness(vp, steps=3, count=4).straightness > 0.0
    from pliant.adapters.flexify import flexify

    model = flexify(tiny_denoiser(patch_size=(2, 2)), [4], rank=2)
    own, weak = (straightness(model, steps=3, count=4, compute=c).cost for c in (Compute(), Compute(patch=(4, 4))))
    assert own != weak
    with pytest.raises(ConfigError, match="steps >= 1"):
        straightness(vp, steps=0)


def test_batches_do_not_matter() -> None:
    model = tiny_denoiser()
    one, other = (straightness(model, steps=4, count=10, batch_size=b).to_dict() for b in (10, 3))
    assert one["straightness"] == pytest.approx(other["straightness"], rel=1e-4)
    assert one["per_step"] == pytest.approx(other["per_step"], rel=1e-4)


def test_the_verb(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "model"
    pliant.save(tiny_denoiser(in_channels=1, num_classes=10), folder)
    plot = tmp_path / "plots" / "s.png"
    done = run_here("straightness", folder, "--steps", 4, "--num", 8, "--plot", plot, "--data", "digits", "--json")
    assert done.code == 0, done.err
    assert done.json["straightness"] > 0.0 and done.json["crossing"] > 0.0 and len(done.json["per_step"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = run_here("straightness", folder, "--steps", 4, "--num", 8)
    assert text.out.startswith("S ")
    refused(run_here("straightness", folder, "--plot", "s.pdf"), ".png")
    refused(run_here("straightness", folder, "--weak", "4"), "patch size")
    refused(run_here("straightness", "nowhere"), "nowhere")
