"""GET (sheet C, 10): one call from noise to image through a fixed point."""

import pytest
import torch

from pliant import Denoiser, Plan, load, sample, save
from pliant.compute import counted_flops
from pliant.errors import ConfigError
from pliant.models.equilibrium import EquilibriumConfig, EquilibriumTransformer
from pliant.paths import NetworkTime, get_path
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch
from pliant.training.objectives.equilibrium import EquilibriumDistillation
from support.networks import randomize

SMALL = {
    "input_size": (8, 8), "in_channels": 2, "width": 32, "heads": 4, "injection_depth": 2, "equilibrium_depth": 2,
    "equilibrium_ratio": 3, "iterations": 4, "num_classes": 3,
}  # fmt: skip


def network(**options):
    made = EquilibriumTransformer(EquilibriumConfig(**{**SMALL, **options})).eval()
    randomize(made, 1, std=0.1)
    return made


def model(**options):
    return Denoiser(network(**options), get_path("linear"), "sample", NetworkTime(scale=1000.0))


@pytest.mark.parametrize(("name", "millions"), [("T", 8.6), ("M", 19.2), ("S", 37.2), ("B", 62.2), ("B+", 83.5)])
def test_published_sizes(name, millions):
    """The published counts hold the table of positions (unconditional models)."""
    with torch.device("meta"):
        made = EquilibriumTransformer(EquilibriumConfig.from_dict({"name": name, "num_classes": 1}))
    count = sum(p.numel() for n, p in made.named_parameters() if n != "class_bias.weight") + made.positions.numel()
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_first_output_is_zero():
    made = EquilibriumTransformer(EquilibriumConfig(**SMALL))
    z, y = torch.randn(2, 2, 8, 8), torch.tensor([0, 2])
    assert torch.equal(made(z, y, y), torch.zeros(2, 2, 8, 8))


def test_the_cost_is_what_is_counted_and_grows_with_iterations():
    few, many = model(), model(iterations=8)
    z, y = torch.randn(1, 2, 8, 8), torch.tensor([1])
    for made in (few, many):
        counted = counted_flops(lambda made=made: made(z, 1.0, y))
        assert made.flops() == pytest.approx(counted, rel=0.01)
    assert 1.4 < many.flops() / few.flops() < 2.0


def test_iterations_share_weights_and_every_output_is_a_prefix():
    made = network()
    z, y = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2])
    outputs = made.outputs(z, y)
    assert len(outputs) == 4
    assert torch.equal(outputs[-1], made(z, y, y))
    assert torch.equal(outputs[1], made.with_iterations(2)(z, y, y))
    assert made.with_iterations(2).head.weight.data_ptr() == made.head.weight.data_ptr()
    assert not torch.allclose(made(z, y, y)[:1], made(z, y.roll(1), y.roll(1))[:1])  # the class matters
    with pytest.raises(ConfigError, match="at least 1"):
        made.with_iterations(0)


def test_it_samples_in_one_step_and_is_stored(tmp_path):
    made = model()
    plan = Plan.uniform(made, 1, solver="ddim")
    images = sample(made, plan, cond=[0, 1], seeds=[3, 4])
    save(made, tmp_path / "get")
    again = load(tmp_path / "get")
    assert torch.equal(sample(again, plan, cond=[0, 1], seeds=[3, 4]), images)
    z = sample(made, plan, cond=[1], seeds=[4])
    assert torch.allclose(z, images[1:], atol=2e-2)  # alone as in a batch
    with pytest.raises(ConfigError, match="injection_depth"):
        EquilibriumConfig.from_dict({"injection_dept": 2})


def test_the_loss_weighs_iterations_as_published():
    made = model()
    z, x, y = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])
    batch = Batch(x, y, sources=z)
    objective = EquilibriumDistillation()
    objective.check(made)
    found = objective(made, batch, Draws.single(4))
    errors = [float((image - x).abs().mean()) for image in made.network.outputs(z, y)]
    weights = [0.8**3, 0.8**2, 0.8, 1.0]
    expected = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)
    found.loss.backward()
    assert float(made.network.embed.weight.grad.abs().sum()) > 0


@pytest.mark.slow
def test_true_pairs_are_learnt_random_ones_are_not_and_the_iteration_converges():
    """Sheet C 10 (1), (2): pairs z -> a fixed linear map of z; shuffled pairs plateau at the median's error."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) / 8

    def train(shuffle):
        torch.manual_seed(0)
        options = {**SMALL, "in_channels": 1, "iterations": 6, "num_classes": 1}
        net = EquilibriumTransformer(EquilibriumConfig(**options))
        made = Denoiser(net, get_path("linear"), "sample", NetworkTime(scale=1000.0))
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
        y = torch.zeros(64, dtype=torch.int64)
        last = []
        for step in range(500):
            z = torch.randn(64, 1, 8, 8, generator=generator)
            x = torch.tanh(z.flatten(1) @ mix).view_as(z)
            batch = Batch(x[torch.randperm(64, generator=generator)] if shuffle else x, y, sources=z)
            optimizer.zero_grad()
            result = EquilibriumDistillation()(made, batch, Draws.single(64, step=step))
            result.loss.backward()
            optimizer.step()
            last.append(float(result.logs["last"]))
        return sum(last[-20:]) / 20, net

    learnt, net = train(False)
    random, _ = train(True)
    z, y = torch.randn(64, 1, 8, 8, generator=generator), torch.zeros(64, dtype=torch.int64)
    target = torch.tanh(z.flatten(1) @ mix).view_as(z)
    with torch.no_grad():
        six, twelve, one = (net.with_iterations(n)(z, y, y) for n in (6, 12, 1))
    change, residual = float((twelve - six).norm()), float((one - target).norm())
    print(f"true pairs {learnt:.3f}, shuffled {random:.3f}; 12 against 6 iterations: {change / residual:.3f}")
    assert learnt < 0.6 * random
    assert change < 0.2 * residual
