"""The network itself: shapes, initialisation, parameter counts, conditioning. Parity with others: tests/parity."""

from __future__ import annotations

import pytest
import torch

from pliant.errors import ConfigError, ShapeError
from pliant.models import DiT, DiTConfig
from pliant.models.layers import Block, LowRank, modulated_norm
from support.networks import batch, randomize, tiny_dit


@pytest.mark.parametrize(("name", "count"), [("S/2", 32_865_056), ("B/2", 130_315_808), ("XL/2", 674_834_720)])
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig.named(f"DiT-{name}"))
    assert sum(p.numel() for p in network.parameters()) == count


def test_a_fresh_network_outputs_zero() -> None:
    network = DiT(tiny_dit().config)
    assert torch.count_nonzero(network(*batch(network))) == 0
    assert network.blocks[0].qkv.weight.abs().max() > 0


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("size", "patch"), [((8, 8), (2, 2)), ((4, 12), (2, 3)), ((8, 8), (8, 8))])
def test_any_rectangle(size: tuple[int, int], patch: tuple[int, int], learn_sigma: bool) -> None:
    network = tiny_dit(input_size=size, patch_size=patch, learn_sigma=learn_sigma)
    x, t, y = batch(network)
    out = network(x, t, y)
    assert out.shape == (3, 4 if learn_sigma else 2, *size)
    for i in range(3):  # samples do not see each other; the fused norm of a batch of one agrees
        torch.testing.assert_close(network(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], out[i], rtol=1e-4, atol=1e-5)


def test_every_input_and_parameter_matters() -> None:
    network = tiny_dit()
    x, t, y = batch(network)
    x.requires_grad_()
    out = network(x, t, torch.tensor([0, 1, 2]))
    out.square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert network.label_embed.weight.grad is not None
    assert not network.label_embed.weight.grad[3].any()  # the null row was not used
    assert not torch.allclose(network(x, t + 1, y), network(x, t, y))
    assert not torch.allclose(network(x, t, (y + 1) % 3), network(x, t, y))


def test_nothing_is_dropped_inside() -> None:
    """Label dropout belongs to the training objective: training and evaluation mode are the same function."""
    network = tiny_dit(class_dropout=0.9)
    inputs = batch(network)
    assert torch.equal(network.train()(*inputs), network.eval()(*inputs))


def test_positions_break_the_symmetry_of_tokens() -> None:
    """The same patch everywhere gives different patches out; without positions it could not."""
    network = tiny_dit()
    out = network(torch.ones(1, 2, 8, 8), torch.tensor([500.0]), torch.tensor([0]))
    assert (out[:, :, :2, :2] - out[:, :, 2:4, :2]).abs().max() > 1e-3
    assert (out[:, :, :2, :2] - out[:, :, :2, 2:4]).abs().max() > 1e-3
    assert not any("positions" in key for key in network.state_dict())


def test_modulation_per_token_and_for_all() -> None:
    """(B, 6, D), (B, 6, N, D) with equal tokens, and (1, 6, D) shared by the batch are one function."""
    block = Block(32, 4, 4.0, 1e-6)
    randomize(block)
    x, m = torch.randn(3, 5, 32), torch.randn(3, 6, 32)
    with torch.no_grad():
        expected = block(x, m)
        per_token = block(x, m[:, :, None].expand(-1, -1, 5, -1))
        torch.testing.assert_close(per_token, expected, rtol=1e-5, atol=1e-5)
        shared = block(x, m[:1])
        torch.testing.assert_close(shared, block(x, m[:1].expand(3, -1, -1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        modulated_norm(x[:1], m[:1, 0], m[:1, 1], 1e-6), modulated_norm(x, m[:, 0], m[:, 1], 1e-6)[:1]
    )


def test_a_mask_separates_sequences() -> None:
    block = Block(32, 4, 4.0, 1e-6)
    randomize(block)
    a, b, m = torch.randn(1, 3, 32), torch.randn(1, 4, 32), torch.randn(1, 6, 32)
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()[None, None]
    with torch.no_grad():
        both = block(torch.cat([a, b], 1), m, mask=mask)
        torch.testing.assert_close(both, torch.cat([block(a, m), block(b, m)], 1), rtol=1e-5, atol=1e-5)


def test_low_rank_delta() -> None:
    lora = LowRank(6, 4, rank=2, alpha=3.0)
    x = torch.randn(5, 6)
    assert torch.count_nonzero(lora(x)) == 0
    randomize(lora)
    torch.testing.assert_close(lora(x), x @ lora.delta().T)
    torch.testing.assert_close(lora.delta(), 1.5 * lora.up @ lora.down)


def test_config_round_trip_and_names() -> None:
    config = DiTConfig.named("DiT-B/4x2", input_size=(16, 8), class_dropout=0.0)
    assert DiTConfig.from_dict(config.to_dict()) == config
    assert (config.width, config.patch_size, config.grid(), config.label_rows) == (768, (4, 2), (4, 4), 1000)
    assert config.grid((2, 2)) == (8, 4)
    assert DiTConfig.named("S/2") == DiTConfig.named("SiT-S/2")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"width": 30}, ConfigError, "divisible"),
        ({"depth": 0}, ConfigError, "at least 1"),
        ({"patch_size": 3}, ShapeError, "does not divide"),
        ({"input_size": (8, 0)}, ConfigError, "positive"),
        ({"wdth": 32}, ConfigError, "did you mean 'width'"),
    ],
)
def test_bad_configs(fields: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DiTConfig.from_dict({**tiny_dit().config.to_dict(), **fields})
    with pytest.raises(ConfigError, match="unknown model name"):
        DiTConfig.named("DiT-XXL/2")


def test_wrong_input() -> None:
    network = tiny_dit()
    x, t, y = batch(network)
    with pytest.raises(ShapeError, match=r"takes inputs of \(2, 8, 8\).*got \(2, 4, 8\)"):
        network(x[:, :, :4], t, y)
