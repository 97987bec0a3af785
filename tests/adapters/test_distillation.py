"""Recipe L learns (sheet A, 1.13(7)): a small flow on Gaussian random fields, made flexible and distilled.

The exact velocity of such a field is linear, so the base network reaches it closely and what is measured is the
weak mode alone: its mean square distance to the powerful mode, at fixed noise.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from pliant import Compute, Denoiser, DiT, DiTConfig, flexify
from pliant.paths import NetworkTime, get_path

WEAK = Compute.of(patch=4, merged=False)


def random_fields(n: int, side: int, generator: Generator) -> Tensor:
    """(n, 1, side, side) Gaussian fields of unit variance with power spectrum ~ f^-3 (the mean like f = 1)."""
    f = torch.fft.fftfreq(side) * side
    frequency = torch.hypot(f[:, None], f[None, :]).clamp(min=1.0)
    amplitude = frequency**-1.5
    amplitude = amplitude / amplitude.square().mean().sqrt()
    noise = torch.fft.fft2(torch.randn(n, 1, side, side, generator=generator))
    return torch.fft.ifft2(noise * amplitude).real


def train(denoiser: Denoiser, parameters: list[nn.Parameter], loss, steps: int, lr: float) -> None:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / steps))
    generator = Generator().manual_seed(0)
    side = denoiser.sample_shape[-1]
    for _ in range(steps):
        x0, eps = random_fields(64, side, generator), torch.randn(64, 1, side, side, generator=generator)
        t = torch.rand(64, generator=generator, dtype=torch.float64).clamp(0.01, 1.0)
        optimizer.zero_grad()
        loss(denoiser, x0, eps, t).backward()
        optimizer.step()
        schedule.step()


def flow_matching(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    prediction = denoiser(denoiser.path.mix(x0, eps, t), t, torch.zeros(len(x0), dtype=torch.long))
    return (prediction.value - (eps - x0)).square().mean()


def distillation(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    x, y = denoiser.path.mix(x0, eps, t), torch.zeros(len(x0), dtype=torch.long)
    with torch.no_grad():
        teacher = denoiser(x, t, y).value
    return (denoiser(x, t, y, WEAK).value - teacher).square().mean()


def trained_base(side: int, width: int, depth: int, steps: int) -> Denoiser:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(side, side),
        patch_size=(2, 2),
        in_channels=1,
        width=width,
        depth=depth,
        heads=4,
        num_classes=1,
        class_dropout=0.0,
        learn_sigma=False,
    )
    denoiser = Denoiser(DiT(config), get_path("linear"), "velocity", NetworkTime(scale=1000.0))
    train(denoiser, list(denoiser.parameters()), flow_matching, steps, 2e-3)
    return denoiser


@torch.no_grad()
def gap(denoiser: Denoiser, t: float) -> float:
    """Mean square distance between the weak and the powerful velocity at time t."""
    generator = Generator().manual_seed(1)
    side = denoiser.sample_shape[-1]
    x0, eps = random_fields(256, side, generator), torch.randn(256, 1, side, side, generator=generator)
    x, y = denoiser.path.mix(x0, eps, t), torch.zeros(256, dtype=torch.long)
    return float((denoiser(x, t, y, WEAK).value - denoiser(x, t, y).value).square().mean())


def distil(base: Denoiser, initialisation: str, steps: int, times: tuple[float, ...]) -> tuple[dict, dict]:  # type: ignore[type-arg]
    """Gaps per time before and after; checks on the way that the powerful mode keeps every bit."""
    denoiser = flexify(base, [4], rank=8, initialisation=initialisation)
    probe = torch.randn(4, *denoiser.sample_shape, generator=Generator().manual_seed(2))
    labels = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        reference = base(probe, 0.6, labels).value
    before = {t: gap(denoiser, t) for t in times}
    new = [p for p in denoiser.parameters() if p.requires_grad]
    untouched = copy.deepcopy(base.network.state_dict())
    train(denoiser, new, distillation, steps, 3e-3)
    with torch.no_grad():
        assert torch.equal(denoiser(probe, 0.6, labels).value, reference)
    assert all(torch.equal(v, base.network.state_dict()[k]) for k, v in untouched.items())
    return before, {t: gap(denoiser, t) for t in times}


@pytest.fixture(scope="module")
def quick_base() -> Denoiser:
    return trained_base(side=8, width=32, depth=2, steps=150)


@pytest.mark.parametrize(
    ("initialisation", "factors"),
    [("average", {0.8: 4.0, 0.6: 6.0, 0.4: 8.0}), ("noise-aligned", {0.8: 4.0, 0.6: 3.0, 0.4: 1.4})],
)
def test_recipe_l_learns_a_little(quick_base: Denoiser, initialisation: str, factors: dict[float, float]) -> None:
    """The small version for every run: two hundred steps on 8x8 fields cut the gap by these factors at least.

    Measured: 6.3, 9.9, 13.7 and 6.1, 4.5, 1.8. With `missing_power=0` the gap at 0.4 grows instead.
    """
    before, after = distil(quick_base, initialisation, 200, tuple(factors))
    assert all(before[t] > factor * after[t] for t, factor in factors.items()), (before, after)


@pytest.mark.slow
def test_recipe_l_learns(request: pytest.FixtureRequest) -> None:
    """The numbers of the sheet: 16x16 fields, width 64, 3 blocks, rank 8, 1500 steps. Minutes; the base is cached.

    Measured at t = 0.95, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05:
    average        .769 .770 .803 .847 .744 .382 .199 -> .0040 .0087 .0073 .0048 .0074 .0068 .0071
    noise-aligned  .256 .308 .280 .456 .414 .145 .038 -> .0034 .0050 .0042 .0046 .0117 .0101 .0052
    """
    times = (0.95, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05)
    file = Path(request.config.cache.mkdir("pliant")) / "random-field-base.pt"  # type: ignore[union-attr]
    if file.exists():
        base = trained_base(16, 64, 3, steps=1)
        base.network.load_state_dict(torch.load(file, weights_only=True))
    else:
        base = trained_base(16, 64, 3, steps=2500)
        torch.save(base.network.state_dict(), file)
    for initialisation in ("average", "noise-aligned"):
        before, after = distil(base, initialisation, 1500, times)
        for t in times:
            print(f"{initialisation:14} t={t:.2f}  gap {before[t]:.4f} -> {after[t]:.5f} ({before[t] / after[t]:.0f}x)")
        assert all(before[t] > 20 * after[t] for t in (0.8, 0.6, 0.4))
        assert all(after[t] < 0.02 for t in times)
