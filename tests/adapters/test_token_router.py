"""Learned token routing (Infor-Coef; sheet E, section 7)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pliant
from pliant.adapters.token_router import TokenRoutedDiT, route_tokens, straight_through
from pliant.compute import WITHOUT_CONDITIONING, Compute, Subset, counted_flops
from pliant.compute.subset import put_tokens, take_tokens
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError, PlanError
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path
from pliant.plans import Plan, sample
from pliant.plans.cost import plan_cost
from pliant.training.draws import Draws
from pliant.training.objectives import TokenDistillation
from pliant.training.objectives.base import Batch


def denoiser(**options: object) -> Denoiser:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(2, 2), in_channels=2, width=32, depth=2, heads=2, num_classes=5,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    return route_tokens(Denoiser(network, get_path("linear"), "velocity", NetworkTime(scale=1000.0)), **options)


def network(model: Denoiser) -> TokenRoutedDiT:
    assert isinstance(model.network, TokenRoutedDiT)
    return model.network


def shaken(model: Denoiser) -> Denoiser:
    """Routers that disagree about tokens."""
    torch.manual_seed(1)
    for p in network(model).routers.parameters():
        p.data.add_(torch.randn_like(p) * 0.5)
    return model


def batch(n: int = 6) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(torch.randn(n, 2, 8, 8, generator=g), torch.arange(n) % 5)


def inputs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 2, 8, 8, generator=g), torch.linspace(50, 950, n), torch.arange(n) % 5


def routed(plan: Plan, ratio: float) -> Plan:
    compute = Compute(tokens=Subset(ratio, "router"), precision="fp32")
    return plan.with_steps(replace(s, compute=compute) for s in plan.steps)


def test_at_first_everything_is_kept() -> None:
    """Check 1."""
    model, (x, t, y) = denoiser(), inputs()
    with torch.no_grad():
        dense = model.network(x, t, y)
        gumbel = -torch.log(-torch.log(torch.rand(6, 4, 16, 2)))
        for noise in (None, gumbel):
            out, found = network(model).routed(x, t, y, noise)
            assert float((out - dense).abs().max()) < 1e-3
            expected = torch.sigmoid(torch.tensor(10.0))
            torch.testing.assert_close(found.probability, expected.expand_as(found.probability), atol=1e-4, rtol=0)


def test_masks_are_zeros_and_ones_with_a_gradient() -> None:
    """Check 2; without noise nothing is drawn."""
    logits = torch.randn(3, 50, 2, requires_grad=True)
    keep = straight_through(logits, -torch.log(-torch.log(torch.rand(3, 50, 2))))
    assert set(keep.tolist()[0]) == {0.0, 1.0} and set(keep.flatten().tolist()) == {0.0, 1.0}
    (keep * torch.randn(3, 50)).sum().backward()
    assert logits.grad is not None and bool((logits.grad != 0).all())
    assert torch.equal(straight_through(logits, None), (logits[..., 1] >= logits[..., 0]).float())
    model = shaken(denoiser())
    loss = TokenDistillation(0.5)(model, batch(), Draws.single(6)).loss
    loss.backward()
    trained = [p for p in network(model).routers.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in trained)
    assert all(p.grad is None for p in network(model).base.parameters())


def trained(steps: int = 30, **options: float) -> tuple[Denoiser, float]:
    """Routers after a few steps of Adam, and the share they keep."""
    model = denoiser(bias=1.0)
    objective = TokenDistillation(**options)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(network(model).routers.parameters(), lr=0.03)
    for step in range(steps):
        optimizer.zero_grad()
        objective(model, batch(), Draws.single(6, step=step)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        logs = [objective(model, batch(), Draws.single(6, step=1000 + k)).logs["keep"] for k in range(4)]
    return model, float(torch.stack(logs).mean())


def test_the_penalty_of_size_empties_and_without_it_tokens_stay() -> None:
    """Check 3, on a network whose branches matter; the penalty is raised tenfold in two steps."""
    _, free = trained(norm=0.0, entropy=0.0)
    shares = [trained(norm=norm, entropy=5e-4)[1] for norm in (0.003, 0.01, 0.03)]
    assert free > 0.9
    assert free > shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.5


def test_the_budget_is_met() -> None:
    _, share = trained(60, keep=0.6, budget=20.0, norm=0.0, entropy=0.0)
    assert share == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_gathered_rows_are_the_masked_network(ratio: float) -> None:
    """Check 4 for branches that are skipped: masks in training, gathered rows in sampling."""
    model = shaken(denoiser())
    plan = routed(Plan.uniform(model, 1, "euler"), ratio)
    y = torch.tensor([0, 3, 4])
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        masked, found = network(model).routed(x, torch.full((3,), 1000.0), y, ratio=ratio)
    assert (found.keep.sum(-1) == round(ratio * 16)).all()
    got = sample(model, plan, y.tolist(), x=x)
    torch.testing.assert_close(got, x - masked, atol=1e-5, rtol=1e-5)
    if ratio < 1:
        assert not torch.allclose(got, sample(model, Plan.uniform(model, 1, "euler"), y.tolist(), x=x), atol=1e-3)


def test_masked_softmax_is_softmax_over_the_gathered_subset() -> None:
    """Check 4 as published, keys left out too: what `Compute(tokens=Subset)` gathers equals a mask on the scores."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 8, generator=g)
    keep = torch.stack([torch.randperm(12, generator=g)[:5] for _ in range(2)])
    mask = torch.zeros(2, 12).scatter(1, keep, 1.0)
    scores = (q @ k.transpose(1, 2) / 8**0.5).exp() * mask[:, None]
    masked = scores / scores.sum(-1, keepdim=True) @ v
    few = torch.nn.functional.scaled_dot_product_attention(*(take_tokens(z, keep) for z in (q, k, v)))
    torch.testing.assert_close(take_tokens(masked, keep), few, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(take_tokens(put_tokens(masked, few, keep), keep), few)


def test_sampling_is_separate_per_sample_and_costs_what_is_counted() -> None:
    model = shaken(denoiser())
    plan = routed(Plan.uniform(model, 4, "euler", guidance=2.0), 0.5)
    together = sample(model, plan, [1, 2], [5, 6])
    torch.testing.assert_close(together[:1], sample(model, plan, [1], [5]), atol=1e-5, rtol=1e-5)
    one = routed(Plan.uniform(model, 1, "euler"), 0.5)
    conditioning = counted_flops(lambda: network(model).plain.modulations(torch.ones(1), torch.tensor([1])))
    counted = counted_flops(lambda: sample(model, one, [1], [5])) - conditioning
    assert counted == pytest.approx(plan_cost(one, model, WITHOUT_CONDITIONING).flops, rel=0.01)
    assert plan.cost(model).share < 0.85


def test_plain_calls_and_the_original_are_untouched(tmp_path: Path) -> None:
    model = shaken(denoiser())
    x, t, y = inputs()
    base = replace(model, network=copy.deepcopy(network(model).plain))
    assert torch.equal(model.network(x, t, y), base.network(x, t, y))
    plan = Plan.uniform(base, 3, "euler", guidance=1.5)
    assert torch.equal(sample(model, plan, [1, 2]), sample(base, plan, [1, 2]))  # also: one fingerprint
    own = routed(Plan.uniform(model, 3, "euler"), 0.5)
    want = sample(model, own, [1, 2])
    pliant.save(model, tmp_path / "whole")
    assert torch.equal(sample(pliant.load(tmp_path / "whole"), own, [1, 2]), want)
    from pliant.formats import native

    native.save_adapter(model, tmp_path / "adapter")
    native.save(base, tmp_path / "base")
    again = pliant.load_adapter(pliant.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(sample(again, own, [1, 2]), want)


def test_bad_uses_are_refused() -> None:
    model = denoiser()
    plain = replace(model, network=network(model).plain)
    with pytest.raises(PlanError, match=r"step 0 .*no token routers; see route_tokens"):
        routed(Plan.uniform(plain, 2, "euler"), 0.5).check(plain)
    with pytest.raises(ConfigError, match="hidden features"):
        route_tokens(plain, hidden=0)
    with pytest.raises(ConfigError, match="route_tokens"):
        route_tokens(plain, hiden=3)
    with pytest.raises(ConfigError, match="plain or flexible network"):
        route_tokens(model)
    with pytest.raises(ConfigError, match=r"did you mean .hidden"):
        type(network(model).spec).from_dict({"hiden": 3})
    with pytest.raises(ConfigError, match="needs a model with routers"):
        TokenDistillation().check(plain)
    from pliant.formats.official_dit import plain_network_only

    with pytest.raises(FormatError, match="token routers"):
        plain_network_only(model)
