"""DyDiT's objective: the FLOPs target, the two stages, and a training that reaches its target."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pliant
from pliant import Denoiser
from pliant.adapters import DynamicDiT
from pliant.adapters.width_slicing import width_variants
from pliant.errors import ConfigError
from pliant.paths import NetworkTime, VPDiscrete
from pliant.training import train
from pliant.training.config import TrainConfig, parse_config
from pliant.training.draws import Draws
from pliant.training.objectives import DDPM, Batch, DynamicWidth, FlopsTarget, FlowMatching
from pliant.training.objectives.dydit import router_noise
from support.networks import tiny_denoiser


def batch(n: int = 6) -> Batch:
    images = torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(n) % 3)


def objective(share: float = 0.5, **options: int) -> DynamicWidth:
    return DynamicWidth(FlowMatching(), FlopsTarget(share), **options)


def test_target_over_time() -> None:
    """1 for 100 steps, then on the line from 1 at step 0 to lambda at step 1000, then lambda."""
    target = FlopsTarget(0.5)
    assert [target.at(step) for step in (0, 99, 100, 500, 1000, 5000)] == [1.0, 1.0, 0.95, 0.75, 0.5, 0.5]
    assert [FlopsTarget(0.3, hold=2, warmup=2).at(step) for step in (0, 1, 2)] == [1.0, 1.0, 0.3]
    assert FlopsTarget(0.3, hold=0, warmup=0).at(0) == 0.3


def test_flops_loss_is_of_the_batch_mean() -> None:
    assert float(FlopsTarget(0.5).loss(torch.tensor([0.2, 0.8]), 5000)) == pytest.approx(0.0, abs=1e-12)
    assert float(FlopsTarget(0.5).loss(torch.tensor([0.7, 0.9]), 5000)) == pytest.approx(0.09)


def test_new_routers_train_as_the_plain_model_at_first() -> None:
    """Everything on, target 1: both loss terms are the plain loss on the same draws, and the FLOPs loss is 0."""
    base = tiny_denoiser()
    denoiser = pliant.route_width(base)
    loss = objective()(denoiser, batch(), Draws.single(6))
    draws = Draws.single(6)
    router_noise(denoiser.network, draws)
    plain = FlowMatching()(base, batch(), draws).loss
    assert torch.equal(loss.logs["own"], plain.detach()) and torch.equal(loss.logs["complete"], plain.detach())
    assert float(loss.logs["share"]) == 1.0 and float(loss.logs["flops"]) == 0.0
    assert torch.equal(loss.loss, 2 * plain)


def test_stage_two_is_without_the_complete_network() -> None:
    denoiser = pliant.route_width(tiny_denoiser())
    staged = objective(complete_steps=10)
    first, second = (staged(denoiser, batch(), Draws.single(6, step=step)) for step in (9, 10))
    assert "complete" in first.logs and "complete" not in second.logs
    own, flops = second.logs["own"], second.logs["flops"]
    torch.testing.assert_close(second.loss.detach(), own + 2.0 * flops)


def test_every_router_learns_from_both_losses() -> None:
    denoiser = pliant.route_width(tiny_denoiser())
    for weight in (0.0, 1e6):  # the model's own loss alone; in effect the FLOPs loss alone
        denoiser.network.zero_grad()
        only = DynamicWidth(FlowMatching(), FlopsTarget(0.5), weight, 0)
        only(denoiser, batch(), Draws.single(6, step=2000)).loss.backward()
        routers = denoiser.network.routers
        for layer in (routers.heads.linear, routers.groups.linear, *(router.fc2 for router in routers.tokens)):
            assert float(layer.bias.grad.abs().min()) > 0
        if weight:  # less is wanted: every gradient pushes down
            assert float(routers.heads.linear.bias.grad.min()) > 0


def test_ddpm_as_the_own_loss() -> None:
    base = tiny_denoiser(learn_sigma=True)
    denoiser = Denoiser(pliant.route_width(base).network, VPDiscrete(), "epsilon", NetworkTime.timesteps(1000))
    own = DynamicWidth(DDPM(), FlopsTarget(0.5))
    own.check(denoiser)
    loss = own(denoiser, batch(), Draws.single(6))
    torch.testing.assert_close(loss.loss.detach(), loss.logs["own"] + loss.logs["complete"])


def test_checks() -> None:
    with pytest.raises(ConfigError, match="needs a network with routers"):
        objective().check(tiny_denoiser())
    with pytest.raises(ConfigError, match="out of reach"):
        objective(0.2).check(pliant.route_width(tiny_denoiser(), routes=("heads", "groups")))
    objective(0.2).check(pliant.route_width(tiny_denoiser()))
    with pytest.raises(ConfigError, match="share in"):
        FlopsTarget(0.0)
    with pytest.raises(ConfigError, match="hold <= warmup"):
        FlopsTarget(0.5, hold=10, warmup=5)


@pytest.mark.slow
def test_training_reaches_the_target() -> None:
    """Sheet A, 5, check 4: lambda = 0.5 within 500 steps, decisions hard as in inference, from the paper's biases."""
    denoiser = pliant.route_width(tiny_denoiser())
    network = denoiser.network
    assert isinstance(network, DynamicDiT)
    own = DynamicWidth(FlowMatching(), FlopsTarget(0.5, hold=10, warmup=200), complete_steps=20)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(500):
        loss = own(denoiser, batch(), Draws.single(6, seed=1, step=step))
        optimizer.zero_grad()
        loss.loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()
    t = torch.linspace(0, 1000, 96)
    x = denoiser.path.mix(batch(96).images, torch.randn(96, 2, 8, 8), t / 1000)
    with torch.no_grad():
        masks = network.routed(x, t, torch.arange(96) % 3)[1]
    assert float(masks.share(network.config).mean()) == pytest.approx(0.5, abs=0.03)
    assert float(masks.heads.sum(-1).min()) >= 1 and float(masks.groups.sum(-1).min()) >= 1
    assert width_variants(network, t[:1])[0].config.block_hidden is not None


def config(output: Path, **width: object) -> TrainConfig:
    """Three steps of DyDiT on digits, from a tiny model that the test saves beside it."""
    return parse_config(
        {
            "model": {"from": str(output.parent / "base"), "width": {"time_bias": 0.0, "token_bias": 0.0, **width}},
            "objective": {"name": "dydit", "target": 0.6, "hold": 1, "warmup": 2, "complete_steps": 2},
            "data": {"source": "digits", "limit": 20},
            "steps": 3,
            "batch_size": 4,
            "log_every": 1,
            "output": str(output),
        }
    )


@pytest.fixture
def base(tmp_path: Path) -> Denoiser:
    denoiser = tiny_denoiser(in_channels=1, num_classes=10)
    pliant.save(denoiser, tmp_path / "base")
    return denoiser


def test_the_trainer_trains_all_weights(base: Denoiser, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run"), quiet=True)
    back = pliant.load(result.model_folder)
    assert isinstance(back.network, DynamicDiT) and not (tmp_path / "run" / "adapter").exists()
    x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 300.0), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(back.network(x, t, y), result.denoiser.network(x, t, y))
    assert not torch.equal(back.network.base.head.weight, base.network.head.weight)


def test_the_trainer_keeps_a_frozen_base(base: Denoiser, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", base="frozen"), quiet=True)
    back = pliant.load_adapter(base, tmp_path / "run" / "adapter")
    for name, tensor in base.network.state_dict().items():
        assert torch.equal(back.network.base.state_dict()[name], tensor)
    x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 300.0), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(back.network(x, t, y), result.denoiser.network(x, t, y))


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'target'"):
        parse_config({"objective": {"name": "dydit", "tarket": 0.5}, "output": "x"})
    with pytest.raises(ConfigError, match="unknown width option 'route'"):
        pliant.adapters.WidthSpec.from_dict({"route": ["heads"]})
