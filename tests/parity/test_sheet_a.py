"""What sheet A states about DiT: counts, initialisation, embeddings, time steps (3.1, 3.3, "it works when")."""

from __future__ import annotations

import math

import pytest
import torch

from parity.reference_dit import positions
from pliant import DiT, DiTConfig
from pliant.formats.official_dit import to_official
from pliant.guidance import guide
from pliant.models.layers import timestep_features
from pliant.models.positions import patch_positions
from pliant.paths import NetworkTime, VPDiscrete, respaced_times
from support.networks import batch, tiny_dit


@pytest.mark.parametrize(
    ("name", "trainable", "stored"),
    [
        ("DiT-S/2", 32_865_056, 32_963_360),
        ("DiT-B/2", 130_315_808, 130_512_416),
        ("DiT-L/2", 457_840_672, 458_102_816),
        ("DiT-XL/2", 674_834_720, 675_129_632),
    ],
)
def test_parameter_counts(name: str, trainable: int, stored: int) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig.named(name))
    assert sum(p.numel() for p in network.parameters()) == trainable
    official = to_official(network.state_dict(), network.positions)
    assert sum(tensor.numel() for tensor in official.values()) == stored


@torch.no_grad()
def test_fresh_network_outputs_exactly_zero() -> None:
    network = DiT(DiTConfig(input_size=(8, 8), width=32, depth=2, heads=2, num_classes=3))
    assert torch.equal(network(*batch(network)), torch.zeros(3, 8, 8, 8))


def test_initialisation() -> None:
    """Standard deviations of sheet A, 3.1 (8): Xavier-uniform linears, 0.02 embedders, zero gates and head."""
    torch.manual_seed(0)
    state = DiT(DiTConfig(width=128, depth=1, heads=2, num_classes=500)).state_dict()
    for name, (fan_in, fan_out) in {
        "blocks.0.qkv": (128, 384),
        "blocks.0.fc1": (128, 512),
        "patch_embed": (16, 128),
    }.items():
        assert float(state[f"{name}.weight"].std()) == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=0.05)
    for name in ("label_embed", "time_embed.fc1", "time_embed.fc2"):
        assert float(state[f"{name}.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert not any(
        state[name].any() for name in state if name.startswith(("modulation", "head")) or name.endswith("bias")
    )


def test_positions_encode_the_column_first() -> None:
    table = patch_positions((4, 4), (2, 2), (2, 2), 16)
    assert torch.equal(table, positions(4, 16)[0])
    grid = table.view(4, 4, 16)
    assert torch.equal(grid[0, :, :8], grid[3, :, :8])  # rows share the first half: it is the column's
    assert torch.equal(grid[:, 0, 8:], grid[:, 3, 8:])
    assert float(grid[0, 1, 0]) == pytest.approx(math.sin(1.0))  # sines first


def test_positions_of_a_grid_that_is_not_square() -> None:
    """Columns of a wide grid are columns of any other; no axis is stretched."""
    wide, square = patch_positions((2, 6), (2, 2), (2, 2), 16), patch_positions((6, 6), (2, 2), (2, 2), 16)
    assert torch.equal(wide.view(2, 6, 16), square.view(6, 6, 16)[:2])


@torch.no_grad()
def test_network_that_is_not_square() -> None:
    """A (4, 12) image: transposing the image and every spatial weight transposes the output."""
    network = tiny_dit(input_size=(4, 12), patch_size=(2, 4))
    turned = tiny_dit(input_size=(12, 4), patch_size=(4, 2))
    state = dict(network.state_dict())
    state["patch_embed.weight"] = state["patch_embed.weight"].transpose(2, 3)
    for kind in ("weight", "bias"):
        head = state[f"head.{kind}"]
        state[f"head.{kind}"] = head.reshape(2, 4, 2, *head.shape[1:]).transpose(0, 1).reshape(head.shape)
    turned.load_state_dict(state)
    turned.positions = network.positions.view(2, 3, -1).transpose(0, 1).reshape(6, -1)
    x, t, y = batch(network)
    out = network(x, t, y)
    assert out.shape == (3, 2, 4, 12)
    assert torch.allclose(turned(x.transpose(2, 3), t, y), out.transpose(2, 3), atol=1e-5)


def test_time_sinusoid() -> None:
    """Cosines first; 10000^(-k/128), and /127 for diffusers; time enters as it is, not divided by 1000."""
    t = torch.tensor([0.0, 1.0, 999.0])
    for divisor in (128, 127):
        features = timestep_features(t.double(), 256, divisor)
        for k in (0, 1, 64, 127):
            angle = 999.0 * 10000.0 ** (-k / divisor)
            assert float(features[2, k]) == pytest.approx(math.cos(angle), abs=1e-9)
            assert float(features[2, 128 + k]) == pytest.approx(math.sin(angle), abs=1e-9)
    assert torch.equal(timestep_features(t)[0], torch.cat([torch.ones(128), torch.zeros(128)]))


@torch.no_grad()
def test_guidance_of_one_is_the_conditional_output() -> None:
    network = tiny_dit(in_channels=4, learn_sigma=True)
    x, t, y = batch(network)
    conditional, null = network(x, t, y), network(x, t, torch.full_like(y, 3))
    assert torch.equal(guide(conditional, null, 1.0, channels=3), conditional)
    guided = guide(conditional, null, 3.0, channels=3)
    assert torch.equal(guided[:, 3:], conditional[:, 3:])
    assert not torch.equal(guided[:, :3], conditional[:, :3])


@pytest.mark.parametrize(
    ("spec", "first", "last"),
    [
        ("250", [0, 4, 8, 12, 16, 20], [991, 995, 999]),
        ("50", [0, 20, 41, 61, 82], [979, 999]),
        ("ddim50", [0, 20, 40], [980]),
        ("1000", [0, 1, 2], [998, 999]),
    ],
)
def test_network_sees_the_tables_own_steps(spec: str, first: list[int], last: list[int]) -> None:
    times = respaced_times(VPDiscrete(), spec)
    seen = NetworkTime.timesteps().encode(times[:-1]).float().flip(0).tolist()  # what the network gets, cleanest first
    assert seen[: len(first)] == first
    assert seen[-len(last) :] == last


def test_full_respacing_has_the_original_betas() -> None:
    alpha, *_ = VPDiscrete().alpha_sigma(respaced_times(VPDiscrete(), "1000").flip(0))
    betas = 1.0 - (alpha[1:] / alpha[:-1]) ** 2
    assert torch.allclose(betas, torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), rtol=0, atol=1e-12)
    table = VPDiscrete().alphas_cumprod
    assert float(table[0]) == pytest.approx(0.9999, abs=1e-12)
    assert float(table[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
