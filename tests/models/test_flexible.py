"""The native backbone: any size, several patch sizes, any number of axes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant import Compute, Denoiser, Plan
from pliant.adapters.flow_map import flow_map
from pliant.compute import counted_flops
from pliant.compute.cost import parameter_count
from pliant.errors import ConfigError, FormatError, PlanError, ShapeError
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.models.patches import patchify, unpatchify
from pliant.paths import NetworkTime, get_path

LABELS = torch.tensor([1, 5, 0])


def network(**options: Any) -> FlexibleTransformer:
    """Small, with random weights everywhere (a new network answers 0)."""
    config = FlexibleConfig(**{"input_size": (8, 6), "in_channels": 3, "width": 48, "depth": 3, "heads": 4,
                                  "num_classes": 5, "train_sides": (4, 8), **options})  # fmt: skip
    torch.manual_seed(0)
    made = FlexibleTransformer(config)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.15)
    return made.eval().requires_grad_(False)


def denoiser(**options: Any) -> Denoiser:
    return Denoiser(network(**options), get_path("linear"), "velocity", NetworkTime(scale=1000.0))


def states(*size: int, batch: int = 3, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


AXES: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
    ((8,), ((1,), (4,))),
    ((8, 6), ((1, 1), (2, 2), (4, 2))),
    ((4, 6, 2), ((1, 1, 1), (1, 2, 2))),
]


@pytest.mark.parametrize(("size", "patches"), AXES)
def test_states_of_one_to_three_axes_at_every_patch(size: tuple[int, ...], patches: tuple[Any, ...]) -> None:
    model = denoiser(input_size=size, patch_sizes=patches)
    x = states(*size)
    for patch in patches:
        call = Compute(patch=patch)
        out = model(x, 0.4, LABELS, call).value
        assert out.shape == x.shape and bool(torch.isfinite(out).all())
        assert 6 * model.flops(call) == 2 * counted_flops(lambda call=call: model(x, 0.4, LABELS, call))  # type: ignore[misc]
        moved = x.clone()
        moved[:, :, -1] += 1.0  # every token sees every other
        assert bool((model(moved, 0.4, LABELS, call).value - out).abs().flatten(2).amin(2).gt(0).all())
    plan = Plan.uniform(model, 2, "euler", Compute(patch=patches[-1]))
    assert pliant.sample(model, plan, [1]).shape == (1, 3, *size)


@pytest.mark.parametrize("patch", [(2,), (2, 3), (1, 2, 2)])
def test_patches_of_any_number_of_axes(patch: tuple[int, ...]) -> None:
    size = tuple(2 * p for p in patch)
    x = states(*size)
    tokens = patchify(x, patch)
    assert tokens.shape == (3, 2 ** len(patch), 3 * x[0, 0].numel() // 2 ** len(patch))
    corner = x[(slice(None), slice(None), *(slice(p) for p in patch))]
    assert torch.equal(tokens[:, 0], corner.flatten(1))  # channel slowest
    fastest = tokens.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(fastest, (2,) * len(patch), patch), x)  # channel fastest


def test_a_new_network_answers_zero_and_its_patch_sizes_see_the_same() -> None:
    config = FlexibleConfig(input_size=(4, 4), width=32, depth=1, heads=2, num_classes=3)
    made = FlexibleTransformer(config).requires_grad_(False)
    x = states(4, 4, channels=4)
    assert float(made(x, torch.full((3,), 500.0), torch.tensor([0, 1, 3]), (2, 2)).abs().max()) == 0.0
    flat = x[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    fine, coarse = made.mode((1, 1)).embed(flat), made.mode((2, 2)).embed(flat)
    torch.testing.assert_close(coarse, fine.unflatten(1, (4, 4))[:, ::2, ::2].flatten(1, 2))


def test_patch_sizes_can_come_later() -> None:
    model = denoiser(patch_sizes=((1, 1), (2, 1)))
    more = pliant.flexify(model, [2])
    assert more.patch_sizes == ((1, 1), (2, 1), (2, 2)) and model.patch_sizes == ((1, 1), (2, 1))
    x = states(8, 6)
    for patch in model.patch_sizes:
        call = Compute(patch=patch)
        assert torch.equal(more(x, 0.4, LABELS, call).value, model(x, 0.4, LABELS, call).value)
    # Of states that are equal within its patches, the new size sees what the finest sees.
    flat = states(4, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    network_ = more.network
    fine, coarse = (network_.mode(p).embed(flat) for p in ((1, 1), (2, 2)))  # type: ignore[operator]
    assert torch.allclose(fine.view(3, 8, 6, -1)[:, ::2, ::2].flatten(1, 2), coarse, atol=1e-5)
    with pytest.raises(ConfigError, match="repeat one"):
        pliant.flexify(model, [1])
    with pytest.raises(ShapeError, match="4"):
        pliant.flexify(model, [4])
    with pytest.raises(ConfigError, match="without options, got rank"):
        pliant.flexify(model, [2], rank=4)


def test_positions_are_shared_by_patch_sizes_and_sizes() -> None:
    """A coarse token lies in the middle of the fine ones that it stands for; only differences matter."""
    made = network(train_sides=(4, 16))
    fine, coarse = (made.rope((8, 6), p, "none", made.device)[0].acos() for p in ((1, 1), (2, 2)))
    quads = fine.unflatten(0, (4, 2, 3, 2)).mean((1, 3)).flatten(0, 1)
    slow = [1, 2, 4, 5]  # of both axes, those whose angles stay below pi
    torch.testing.assert_close(coarse[:, slow], quads[:, slow], atol=1e-4, rtol=0)
    wider = made.rope((8, 10), (1, 1), "none", made.device)[0].unflatten(0, (8, 10))
    assert torch.equal(wider[:, :6].flatten(0, 1), made.rope((8, 6), (1, 1), "none", made.device)[0])


def test_packed_calls_equal_calls_one_by_one() -> None:
    made = network()
    xs = [states(8, 6, batch=2), states(4, 4, batch=1, seed=1), states(6, 10, batch=3, seed=2)]
    t, y = torch.rand(6) * 1000, torch.tensor([0, 1, 2, 3, 4, 5])
    for patch in made.patch_sizes:
        packed = torch.cat([o.flatten() for o in made.forward_packed(xs, t, y, patch)])
        alone, at = [], 0
        for x in xs:
            for row in x:
                alone.append(made(row[None], t[at : at + 1], y[at : at + 1], patch).flatten())
                at += 1
        assert float((packed - torch.cat(alone)).abs().max()) < 1e-5
    model = Denoiser(made, get_path("linear"), "velocity", NetworkTime(scale=1000.0))
    parts = model.packed(xs, torch.linspace(0.1, 0.9, 6), y, Compute(patch=(2, 2)))
    third = model(xs[2], torch.linspace(0.1, 0.9, 6)[3:], y[3:], Compute(patch=(2, 2)))
    torch.testing.assert_close(parts[2].to("sample"), third.to("sample"), atol=1e-5, rtol=0)


def test_packed_gradients_are_those_of_separate_calls_and_of_checkpointing() -> None:
    made = network().requires_grad_(True)
    xs, t, y = [states(4, 4, batch=1), states(8, 6, batch=2, seed=1)], torch.rand(3) * 1000, LABELS

    def gradients(outs: list[Tensor]) -> Tensor:
        made.zero_grad()
        torch.cat([o.flatten() for o in outs]).square().sum().backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])

    wanted = gradients([made(xs[0], t[:1], y[:1], (2, 2)), made(xs[1], t[1:], y[1:], (2, 2))])
    packed = gradients(made.forward_packed(xs, t, y, (2, 2)))
    torch.testing.assert_close(packed, wanted, atol=1e-3, rtol=1e-4)
    made.checkpointing = True
    assert torch.equal(gradients(made.forward_packed(xs, t, y, (2, 2))), packed)


def test_plans_budgets_and_files(tmp_path: Path) -> None:
    model = denoiser()
    half = Plan.weak_to_powerful(model, 8, "60%", guidance=2.0, solver="euler")
    cost = half.cost(model)
    assert 0.5 < cost.share <= 0.6005
    assert cost.flops == counted_flops(lambda: pliant.sample(model, half, [1]))
    assert "2x2" in half.describe(model) and "1x1" in half.describe(model)
    assert parameter_count(model.shape()) == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.network.mode((2, 2)).parameters()  # type: ignore[union-attr, operator]
    ) - 48  # the cost model's network has one patch size, and no embedding for it
    pliant.save(model, tmp_path / "model")
    loaded = pliant.load(tmp_path / "model")
    half.check(loaded)
    assert torch.equal(pliant.sample(loaded, half, [1, 2]), pliant.sample(model, half, [1, 2]))
    info = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(info.replace('"heads"', '"haeds"'))
    with pytest.raises(FormatError, match="did you mean 'heads'"):
        pliant.load(tmp_path / "model")


def test_sites_reuse_and_skip() -> None:
    """Keeping everything changes nothing; reusing costs nothing."""
    model = denoiser()
    plain = Plan.uniform(model, 4, "euler", Compute(precision="fp32"))
    keeping = Plan.uniform(model, 4, "euler", Compute(precision="fp32", write=("branch",)))
    assert torch.equal(pliant.sample(model, keeping, [1, 2]), pliant.sample(model, plain, [1, 2]))
    cached = plain.cached(model, "fora", interval=2)
    assert cached.cost(model).share < 0.8
    assert cached.cost(model).flops == counted_flops(lambda: pliant.sample(model, cached, [1]))
    with pytest.raises(PlanError, match="token subsets"):
        Plan.uniform(model, 4, "euler", Compute.from_dict({"tokens": {"kind": "subset", "ratio": 0.5}}))


def test_another_size_is_another_model_of_the_same_weights() -> None:
    model = denoiser()
    plan = Plan.uniform(model, 3, "euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = model.at_size((4, 8))
    assert pliant.sample(wide, plan, [1]).shape == (1, 3, 4, 8)
    assert plan.cost(wide).flops < plan.cost(model).flops and wide.sample_shape == (3, 4, 8)
    assert wide.at_size((8, 6)) == model
    with pytest.warns(UserWarning, match=r"12x16 is outside .* \(sides of 4 to 8\), without position extrapolation"):
        plainly = model.at_size((12, 16))
    with pytest.warns(UserWarning, match="'vision-ntk'"):
        stretched = model.at_size((12, 16), "vision-ntk")
    a, b = pliant.sample(plainly, plan, [1]), pliant.sample(stretched, plan, [1])
    assert float((a - b).abs().max()) > 1e-3
    inside = model.at_size((4, 8), "vision-ntk")  # every rule is plain RoPE at training sizes
    assert torch.equal(pliant.sample(inside, plan, [1]), pliant.sample(wide, plan, [1]))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((7, 6), "7x6 is no multiple of this model's patches .*nearest that is: 8x6"),
        ((1, 6), "the nearest that is: 2x6"),
        ((0, 6), "nearest that is: 2x6"),
        ((8,), "have 2 sides, 8 1"),
        ((2, 400), "64 times as long as wide"),
        ((3, 999), "64 times as long as wide"),
    ],
)
def test_sizes_that_cannot_be(size: tuple[int, ...], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        denoiser().at_size(size)


def test_bad_states_and_settings() -> None:
    model, made = denoiser(), network()
    for bad in (states(8, 6, channels=4), states(8, 6, batch=0), states(8)):
        with pytest.raises(ShapeError):
            made(bad, torch.zeros(len(bad)), torch.zeros(len(bad), dtype=torch.int64))
    with pytest.raises(ShapeError, match="at least one state"):
        made.forward_packed([], torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ShapeError, match="3 states need as many"):
        made.forward_packed([states(8, 6)], torch.zeros(2), LABELS[:2])
    with pytest.raises(ShapeError, match="3 channels"):  # mixed channels
        made.forward_packed([states(8, 6, batch=1), states(8, 6, batch=2, channels=2)], torch.zeros(3), LABELS)
    with pytest.raises(ShapeError, match="does not divide"):
        made(states(3, 6), torch.zeros(3), LABELS, (2, 2))
    with pytest.raises(ConfigError, match="patch sizes 1x1, 2x2, not 4x4"):
        model(states(8, 6), 0.5, LABELS, Compute(patch=(4, 4)))
    with pytest.raises(ConfigError, match="did you mean 'vision-ntk'"):
        model.at_size((8, 6), "vision-ntkk")
    with pytest.raises(ConfigError, match="no multiple of the finest"):
        FlexibleConfig(patch_sizes=((2, 2), (3, 3)))
    with pytest.raises(ConfigError, match="fp32 and bf16"):
        pliant.sample(model, Plan.uniform(model, 2, "euler", Compute(precision="int8d")), [1])


def test_requests_of_different_sizes_wait_in_one_batcher() -> None:
    from pliant.plans.batching import Request, sample_together

    model = denoiser()
    plan = Plan.uniform(model, 3, "euler", Compute(precision="fp32"), guidance=2.0)
    requests = [
        Request(plan, [1], [7]), Request(plan, [2], [8], size=(4, 8)), Request(plan, [0], [9], size=(4, 8)),
        Request(plan, [3], [5], size=(8, 8), extrapolation="vision-yarn"),
    ]  # fmt: skip
    together = sample_together(model, requests)
    for request, found in zip(requests, together, strict=True):
        alone = pliant.sample(model, plan, request.cond, request.seeds, size=request.size,
                              extrapolation=request.extrapolation)  # fmt: skip
        assert found.shape == alone.shape
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(PlanError, match=r"request 1: size 7x8 is no multiple"):
        sample_together(model, [requests[0], Request(plan, [1], size=(7, 8))])


def test_a_new_flow_map_is_the_network_it_was_made_of_at_every_size_and_patch(tmp_path: Path) -> None:
    model = denoiser(patch_sizes=((1, 1), (2, 2)))
    made = flow_map(model)
    assert not model.config.flow_map and "flow_map" not in model.config.to_dict()
    for size, patch in (((8, 6), (1, 1)), ((4, 8), (2, 2))):
        x, call = states(*size), Compute(patch=patch)
        plain = model.at_size(size)(x, 0.7, LABELS, call).value
        assert torch.equal(made.at_size(size)(x, 0.7, LABELS, call, lands=0.1).value, plain)
        jumping = flow_map(model)
        jumping.network.jump_embed.fc2.weight.data.normal_(std=0.2)  # type: ignore[union-attr]
        assert not torch.equal(jumping.at_size(size)(x, 0.7, LABELS, call, lands=0.1).value, plain)
        assert jumping.flops(call) == pytest.approx(
            counted_flops(lambda c=call, m=jumping: m(states(8, 6, batch=1), 0.7, LABELS[:1], c, lands=0.1)), rel=0.01  # type: ignore[misc]
        )
    plan = Plan.weak_to_powerful(jumping, 2, weak_steps=1, solver="jump")
    pliant.save(jumping, tmp_path / "map")
    again = pliant.load(tmp_path / "map")
    assert torch.equal(pliant.sample(again, plan, [1], [0]), pliant.sample(jumping, plan, [1], [0]))
    assert parameter_count(jumping.config.shape()) + patch_parameters(jumping) == sum(
        p.numel() for p in jumping.network.parameters()
    )
    with pytest.raises(ConfigError, match="a flow map already"):
        flow_map(made)


def patch_parameters(model: Denoiser) -> int:
    """Of the conditioning vector of the own patch size and of all of the other sizes."""
    network = model.network
    own, *others = (network.mode(patch) for patch in network.patch_sizes)  # type: ignore[operator]
    return own.embedding.numel() + sum(p.numel() for mode in others for p in mode.parameters())
