"""FiT as a network: published sizes and costs, any size, plans, what is refused. Parity: tests/parity/test_fit.py."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant import Compute, Denoiser, Plan, sample
from pliant.compute import counted_flops
from pliant.compute.cost import FIT_PUBLISHED, macs, parameter_count
from pliant.compute.scale import LowBand
from pliant.errors import ConfigError, PlanError, ShapeError
from pliant.models.fit import FiT, FiTConfig
from pliant.models.token_batch import TokenBatch
from pliant.paths import NetworkTime, get_path

TINY: dict[str, Any] = {"input_size": (8, 8), "width": 32, "depth": 3, "heads": 4, "num_classes": 5, "train_length": 4,
                        "train_tokens": 16}  # fmt: skip
FIRST: dict[str, Any] = {"mlp_hidden": 128, "modulation_rank": None, "qk_norm": False}


def network(**options: Any) -> FiT:
    """Small, with random weights everywhere (a new network answers 0)."""
    torch.manual_seed(0)
    made = FiT(FiTConfig(**{**TINY, **options}))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.15)
    return made.eval().requires_grad_(False)


def denoiser(**options: Any) -> Denoiser:
    return Denoiser(network(**options), get_path("linear"), "velocity", NetworkTime.sit())


def states(*size: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([1, 5])


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("FiT-B/2", 158_664_224, 29.1),
        ("FiT-XL/2", 823_599_392, 153),
        ("FiTv2-B/2", 128_149_072, 27.3),
        ("FiTv2-XL/2", 671_045_776, 147),
        ("FiTv2-3B/2", 2_971_928_080, 653),
    ],
)
def test_published_sizes(name: str, parameters: int, gmacs: float) -> None:
    """Parameters exactly; the papers' "GFLOPs" at 256 tokens within 0.5 %; our FLOPs as counted, exactly."""
    with torch.device("meta"):
        made = FiT(FiTConfig.named(name))
        x, t, y = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        counted = counted_flops(lambda: made(x, t, y))
    shape = made.config.shape()
    assert sum(p.numel() for p in made.parameters()) == parameters == parameter_count(shape)
    assert macs(shape, FIT_PUBLISHED) / 1e9 == pytest.approx(gmacs, rel=5e-3)
    assert counted == 2 * macs(shape)
    assert made.config.name == name
    assert FiTConfig.from_dict(made.config.to_dict()) == made.config


@pytest.mark.parametrize("options", [{}, FIRST], ids=["v2", "v1"])
def test_a_new_network_answers_zero(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = FiT(FiTConfig(**TINY, **options))
    assert not made(states(8, 8), torch.tensor([0.1, 0.9]), LABELS).any()
    assert made.patch_embed.weight.std() > 0.1


@pytest.mark.parametrize("options", [{}, FIRST], ids=["v2", "v1"])
@pytest.mark.parametrize("size", [(8, 8), (4, 14), (2, 2)])
def test_flops_are_those_counted_at_any_size(options: dict[str, Any], size: tuple[int, int]) -> None:
    model = denoiser(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sized = model.at_size(size)
    x = states(*size, batch=1)
    assert counted_flops(lambda: sized(x, 0.4, LABELS[:1])) == sized.flops()


def test_positions_matter_along_both_axes() -> None:
    """Without them a transformer does not see where its tokens are: swapping two patches would swap the outputs."""
    made, x = network(), states(8, 8, batch=1)
    t, y = torch.tensor([0.4]), LABELS[:1]
    for axis in (2, 3):
        assert (made(x.roll(2, axis), t, y).roll(-2, axis) - made(x, t, y)).abs().max() > 1e-2


def test_extrapolation_changes_only_what_is_beyond_training() -> None:
    made, t, y = network(), torch.tensor([0.4, 0.6]), LABELS
    inside, beyond = states(8, 6), states(12, 8)
    for name in ("vision-ntk", "vision-yarn", "linear", "vision-ntk+paper"):
        assert torch.allclose(made(inside, t, y, None, name), made(inside, t, y), atol=1e-6)
        assert (made(beyond, t, y, None, name) - made(beyond, t, y)).abs().max() > 1e-3
    # Post-trained with it: the network's own way, which callers who ask for nothing get.
    tuned = FiT(replace(made.config, extrapolation="vision-ntk")).eval()
    tuned.load_state_dict(made.state_dict())
    assert torch.equal(tuned(beyond, t, y), made(beyond, t, y, None, "vision-ntk"))


@pytest.mark.parametrize("options", [{}, FIRST], ids=["v2", "v1"])
def test_plans_run_at_any_size(options: dict[str, Any]) -> None:
    """Image k alone, in a batch and through the whole plan machinery; guided; with kept branches."""
    model = denoiser(**options)
    with pytest.warns(UserWarning, match="outside what this model was trained on"):
        wide = model.at_size((8, 12), "vision-ntk")
    plan = Plan.uniform(wide, 3, "euler", guidance=1.5)
    pictures = sample(wide, plan, [1, 2], seeds=[3, 4])
    assert pictures.shape == (2, 4, 8, 12)
    assert torch.allclose(pictures[1:], sample(wide, plan, [2], seeds=[4]), atol=1e-5)
    with pytest.warns(UserWarning, match="without position extrapolation"):
        plain = sample(model.at_size((8, 12)), plan, [1, 2], seeds=[3, 4])
    assert (plain - pictures).abs().max() > 1e-3
    keep = plan.with_steps(replace(s, compute=Compute(write=("branch",))) for s in plan.steps)
    assert torch.equal(sample(wide, keep, [1, 2], seeds=[3, 4]), pictures)
    skipped = plan.with_steps(replace(s, compute=Compute(sites="R2K2R2")) for s in plan.steps)
    assert not torch.equal(sample(wide, skipped, [1, 2], seeds=[3, 4]), pictures)
    assert skipped.cost(wide).flops < plan.cost(wide).flops


def test_precision_variants_and_views_share_weights() -> None:
    made = network()
    view = made.plain((2, 2), extrapolation="vision-ntk")
    assert view.head.weight is made.head.weight
    assert made.extrapolation == "none"
    half = view.in_dtype(torch.bfloat16)
    x, t = states(12, 8), torch.tensor([0.4, 0.6])
    exact = made(x, t, LABELS, None, "vision-ntk")
    assert (half(x, t, LABELS).float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert half.dtype == torch.bfloat16


def test_native_folder(tmp_path: Path) -> None:
    model = denoiser(extrapolation="vision-ntk")
    pliant.save(model, tmp_path / "m")
    back = pliant.load(tmp_path / "m")
    assert back.fingerprint() == model.fingerprint()
    x = states(8, 8)
    assert torch.equal(back(x, 0.3, LABELS).value, model(x, 0.3, LABELS).value)


def test_gradients_reach_every_weight() -> None:
    made = network().requires_grad_(True)
    made(states(8, 8), torch.tensor([0.4, 0.6]), torch.tensor([0, 5])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


# Batches of tokens ---------------------------------------------------------------------------------------------------


def test_token_batches_hold_images_and_give_them_back() -> None:
    xs = [torch.arange(4 * h * w, dtype=torch.float32).view(4, h, w) for h, w in ((4, 6), (2, 2), (8, 2))]
    batch = TokenBatch.packed([xs[:2], xs[2:]], (2, 2), length=9)
    assert batch.tokens.shape == (2, 9, 16)
    assert batch.ids.tolist() == [[1] * 6 + [2] + [0] * 2, [1] * 4 + [0] * 5]
    assert batch.positions[0, :7].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0]]
    assert batch.lengths[0, 6].tolist() == [1, 1]
    assert batch.lengths[1, 0].tolist() == [4, 1]
    assert not batch.single
    mask = batch.mask
    assert mask is not None
    assert mask[0, 0, 0].tolist() == [True] * 6 + [False] * 3
    assert mask[0, 0, 7].tolist() == [False] * 7 + [True] * 2  # padding sees padding
    # `images` reads heads' outputs, channel fastest; `tokens` is channel slowest.
    outputs = batch.tokens.view(2, 9, 4, 4).transpose(2, 3).reshape(2, 9, 16)
    assert all(torch.equal(a, b) for a, b in zip(batch.images(outputs), xs, strict=True))
    assert TokenBatch.padded(xs[:1], (2, 2)).mask is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one image"),
        ([[]], "at least one image"),
        ([[torch.zeros(4, 4, 4), torch.zeros(3, 4, 4)]], r"equal C, got channels \[3, 4\]"),
        ([[torch.zeros(4, 4)]], "are \\(C, H, W\\)"),
        ([[torch.zeros(4, 5, 4)]], "does not divide"),
        ([[torch.zeros(4, 1, 4)]], "does not divide"),
        ([[torch.zeros(4, 0, 4)]], "smaller than the patch"),
        ([[torch.zeros(4, 40, 4)]], "does not fit the 16"),
    ],
)
def test_impossible_batches(rows: list[list[Tensor]], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TokenBatch.packed(rows, (2, 2), length=16)


def test_what_is_refused() -> None:
    made, t = network(), torch.tensor([0.4, 0.6])
    with pytest.raises(ShapeError, match="nearest that is: 8x8"):
        made(states(8, 7), t, LABELS)
    with pytest.raises(ShapeError, match="nearest that is: 2x8"):
        made(states(1, 8), t, LABELS)
    with pytest.raises(ShapeError, match="nothing in states"):
        made(states(8, 8)[:0], t[:0], LABELS[:0])
    with pytest.raises(ShapeError, match=r"states of \(4, H, W\)"):
        made(states(8, 8)[:, :3], t, LABELS)
    with pytest.raises(ShapeError, match="at least one state"):
        made.forward_packed([], t, LABELS)
    with pytest.raises(ShapeError, match="3 states need as many"):
        made.forward_packed([states(8, 8), states(4, 4)[:1]], t, LABELS)
    with pytest.raises(ShapeError, match="1 images need as many"):
        made.forward_tokens(TokenBatch.padded(list(states(8, 8)[:1]), (2, 2)), t, LABELS)
    with pytest.raises(ShapeError, match="2 sides"):
        made.check_size((8, 8, 8))
    model = denoiser()
    with pytest.raises(ConfigError, match="vision-ntk"):
        model.at_size((8, 8), "vision-nkt")
    with pytest.raises(ConfigError, match="patch sizes 2x2, not 4x4"):
        model(states(8, 8), 0.3, LABELS, Compute.of(4))
    with pytest.raises(PlanError, match="no scale"):
        made.check_compute(Compute(scale=LowBand()))
    with pytest.raises(ConfigError, match="multiple of 4 features"):
        FiTConfig(width=36, heads=6)
    with pytest.raises(ConfigError, match="FiTv2-XL/2"):
        FiTConfig.named("FiTv2-XXL/2")
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        FiTConfig.from_dict({"widht": 3})


def test_a_long_thin_image_is_one_row_of_tokens() -> None:
    """No special case: a 2 x 512 latent costs its 256 tokens, and is warned about where training saw fewer."""
    model = denoiser()
    with pytest.warns(UserWarning, match="at most 16 tokens"):
        thin = model.at_size((2, 512), "vision-ntk")
    out = thin(states(2, 512), 0.3, LABELS).value
    assert bool(torch.isfinite(out).all())
    assert math.prod(thin.sample_size) == 1024
