"""Official DiT and SiT against Pliant: outputs on equal random weights (sheet A, 3 and 4).

`reference_dit.py` stands in for the official code, which may not be part of this project. The tests that end in
"official_code" run the real thing and skip without a checkout (see `official_code.py`). Measured there in fp32, largest
differences over plain and guided (scales 1 to 4) outputs of size about 1: the reference against the official code
5.5e-6, its positions bit-equal; Pliant against the official DiT 7.4e-6 and SiT 5.0e-6, from every kind of file; at the
real size of DiT-S/2 and SiT-S/2 (32x32 latents) 3.4e-6 plain, 4.7e-6 guided at 1.5. Weights return bit-equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from parity.official_code import official_network
from parity.reference_dit import Sizes, dit, random_state, sit, with_guidance
from pliant import Denoiser
from pliant.guidance import guide
from pliant.paths import NetworkTime, VPDiscrete

SIZES = [
    Sizes(),
    Sizes(input_size=12, patch_size=4, hidden_size=72, num_heads=2, depth=3, num_classes=11),
    Sizes(in_channels=3, learn_sigma=False, depth=1),
]
TOLERANCE = 1e-5


def inputs(sizes: Sizes, n: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """States (n, C, H, W) and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, sizes.in_channels, sizes.input_size, sizes.input_size, generator=generator)
    return x, torch.arange(n) % (sizes.num_classes + 1)


def stored(state: dict[str, Tensor], folder: Path, sizes: Sizes, kind: str) -> Path:
    """The three ways official weights are stored: as released, as train.py writes them, as safetensors."""
    file = folder / f"weights-{kind}.pt"
    if kind == "flat":
        torch.save(state, file)
    elif kind == "train":
        arguments = argparse.Namespace(model="DiT-X/2", image_size=64, results_dir="results", ckpt_every=None)
        junk = {name: torch.zeros_like(value) for name, value in state.items()}
        torch.save({"model": junk, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": arguments}, file)
    else:
        from safetensors.torch import save_file

        file = file.with_suffix(".safetensors")
        save_file(state, file)
    return file


def loaded(
    state: dict[str, Tensor], folder: Path, sizes: Sizes, kind: str = "flat", format: str = "official-dit"
) -> Denoiser:
    return pliant.load(stored(state, folder, sizes, kind), format=format, heads=sizes.num_heads)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ["flat", "train", "safetensors"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.no_grad()
def test_forward(sizes: Sizes, kind: str, tmp_path: Path) -> None:
    state = random_state(sizes)
    model = loaded(state, tmp_path, sizes, kind)
    x, y = inputs(sizes)
    t = torch.tensor([0.0, 517.0, 999.0])
    expected = dit(state, sizes, x, t, y)
    assert expected.abs().mean() > 0.1, "the comparison must not be about zeros"
    assert difference(model.network(x, t, y), expected) < TOLERANCE


@torch.no_grad()
def test_denoiser_speaks_the_official_time_and_kind(tmp_path: Path) -> None:
    sizes = Sizes()
    state = random_state(sizes)
    model = loaded(state, tmp_path, sizes)
    assert (model.path, model.prediction, model.network_time) == (VPDiscrete(), "epsilon", NetworkTime.timesteps())
    x, y = inputs(sizes)
    steps = torch.tensor([0.0, 517.0, 999.0])
    prediction = model(x, VPDiscrete().time_of_timestep(steps), y)
    expected = dit(state, sizes, x, steps, y)
    assert prediction.variance is not None
    assert difference(prediction.value, expected[:, :4]) < TOLERANCE
    assert difference(prediction.variance, expected[:, 4:]) < TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
@torch.no_grad()
def test_forward_with_cfg(scale: float, tmp_path: Path) -> None:
    """Three guided channels, and the second half of x is never looked at."""
    sizes = Sizes()
    state = random_state(sizes)
    model = loaded(state, tmp_path, sizes)
    x, y = inputs(sizes)
    null = torch.full_like(y, model.null_label)
    t = torch.full((6,), 300.0)
    double = torch.cat([x, torch.randn(x.shape, generator=torch.Generator().manual_seed(9))])
    expected = with_guidance(dit, state, sizes, double, t, torch.cat([y, null]), scale)
    network = model.network
    ours = guide(network(x, t[:3], y), network(x, t[:3], null), scale, channels=3)
    assert difference(ours, expected[:3]) < TOLERANCE
    if scale == 1.0:
        assert torch.equal(ours, network(x, t[:3], y))  # sheet A, 3 "it works when" 3


@pytest.mark.parametrize("kind", ["flat", "train", "safetensors"])
@torch.no_grad()
def test_sit(kind: str, tmp_path: Path) -> None:
    """House time is 1 - SiT's, and house velocity is minus SiT's (sheet A, 4.1)."""
    sizes = Sizes()
    state = random_state(sizes)
    model = loaded(state, tmp_path, sizes, kind, format="sit")
    assert (model.path.name, model.prediction, model.network_time) == ("linear", "velocity", NetworkTime.sit())
    x, y = inputs(sizes)
    t = torch.tensor([0.0, 0.25, 0.9], dtype=torch.float64)
    expected = sit(state, sizes, x, 1.0 - t, y)
    assert difference(model(x, t, y).value, -expected) < TOLERANCE


@torch.no_grad()
def test_sit_with_cfg(tmp_path: Path) -> None:
    sizes = Sizes()
    state = random_state(sizes)
    model = loaded(state, tmp_path, sizes, format="sit")
    x, y = inputs(sizes)
    null = torch.full_like(y, model.null_label)
    expected = with_guidance(sit, state, sizes, torch.cat([x, x]), torch.full((6,), 0.3), torch.cat([y, null]), 2.0)
    ours = guide(model(x, 0.7, y).value, model(x, 0.7, null).value, 2.0, channels=3)
    assert difference(ours, -expected[:3]) < TOLERANCE


@torch.no_grad()
def test_code_time_and_house_time_give_the_same_samples(tmp_path: Path) -> None:
    """Sheet A, 4 "it works when" 4: Euler in SiT's time from 0 to 1 and in house time from 1 to 0."""
    sizes = Sizes()
    state = random_state(sizes, std=0.05)
    model = loaded(state, tmp_path, sizes, format="sit")
    start, y = inputs(sizes)
    theirs, ours, n = start, start, 5
    for i in range(n):
        theirs = theirs + sit(state, sizes, theirs, torch.full((3,), i / n), y) / n
        ours = ours - model(ours, 1.0 - i / n, y).value / n
    assert difference(theirs, start) > 0.1
    assert difference(theirs, ours) < TOLERANCE


# The official code itself ----------------------------------------------------------------------------------------


def calls(sizes: Sizes, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A doubled batch for forward_with_cfg: x, t in the network's own time, labels then null labels."""
    x, y = inputs(sizes)
    t = torch.tensor([0.0, 517.0, 999.0]) if kind == "dit" else torch.tensor([0.0, 0.4, 1.0])
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return torch.cat([x, other]), t.repeat(2), torch.cat([y, torch.full_like(y, sizes.num_classes)]), x


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("kind", ["dit", "sit"])
@torch.no_grad()
def test_reference_equals_official_code(kind: str, sizes: Sizes) -> None:
    network = official_network(kind, **sizes.official_arguments())
    state = network.state_dict()
    forward: Any = {"dit": dit, "sit": sit}[kind]
    double, t, labels, x = calls(sizes, kind)
    worst = difference(network(x, t[:3], labels[:3]), forward(state, sizes, x, t[:3], labels[:3]))
    for scale in (1.0, 4.0):
        theirs = network.forward_with_cfg(double, t, labels, scale)
        worst = max(worst, difference(theirs, with_guidance(forward, state, sizes, double, t, labels, scale)))
    positions = difference(state["pos_embed"], random_state(sizes)["pos_embed"])
    print(f"reference against official {kind}: {worst:.1e}, positions {positions:.1e}")
    assert set(state) == set(random_state(sizes))
    assert worst < TOLERANCE
    assert positions < 1e-6


@pytest.mark.parametrize("storage", ["flat", "train", "safetensors"])
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
@pytest.mark.parametrize("kind", ["dit", "sit"])
@torch.no_grad()
def test_pliant_equals_official_code(kind: str, sizes: Sizes, storage: str, tmp_path: Path) -> None:
    network = official_network(kind, **sizes.official_arguments())
    state = network.state_dict()
    format = {"dit": "official-dit", "sit": "sit"}[kind]
    model = loaded(state, tmp_path, sizes, storage, format)
    double, t, labels, x = calls(sizes, kind)
    house = model.network_time.decode(t[:3].double())
    c = sizes.in_channels
    conditional, null = model(x, house, labels[:3]), model(x, house, labels[3:])
    sign = model.network_time.sign
    worst = difference(sign * conditional.value, network(x, t[:3], labels[:3])[:, :c])
    for scale in (1.0, 1.5, 4.0):
        theirs = network.forward_with_cfg(double, t, labels, scale)[:3, :c]
        worst = max(worst, difference(sign * guide(conditional.value, null.value, scale, channels=3), theirs))
    print(f"Pliant against official {kind}, {storage}: {worst:.1e}")
    assert worst < TOLERANCE

    # And back: the official code reads our file, and finds every bit of its own.
    pliant.save(model, tmp_path / "back.pt", format=format)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    network.load_state_dict(back)
    assert all(torch.equal(back[name], value) for name, value in state.items())
