"""Guidance algebra (sheet A, 1.8 and 1.13(5))."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant import Compute, flexify
from pliant.errors import PlanError
from pliant.guidance import Guidance, guide, weak_scale
from pliant.paths import PREDICTION_TYPES, get_path
from support.networks import batch, tiny_denoiser, tiny_dit

WEAK = Compute.of(patch=4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(st.floats(-2, 10), st.sampled_from([None, 1, 3, 4, 7]))
def test_away_from_the_reference(scale: float, channels: int | None) -> None:
    conditional, reference = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    out = guide(conditional, reference, scale, channels)
    expected = reference + scale * (conditional - reference)
    if channels is not None and channels < 4:  # the rest stays conditional, as the official DiT leaves it
        assert torch.equal(out[:, channels:], conditional[:, channels:])
        out, expected = out[:, :channels], expected[:, :channels]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_scale_1_is_the_conditional_prediction_itself() -> None:
    conditional = normal(2, 4, 3, 3).float()
    assert guide(conditional, normal(2, 4, 3, 3).float(), 1.0) is conditional


@given(st.floats(-3, 20, allow_nan=False))
def test_equal_networks_guide_nowhere(scale: float) -> None:
    """Weak-model guidance with a weak mode that agrees with the powerful one: no scale changes anything."""
    conditional = normal(2, 4).float()
    assert torch.equal(guide(conditional, conditional.clone(), scale), conditional)


def test_scale_0_is_the_reference() -> None:
    reference = normal(2, 4)
    assert torch.equal(guide(normal(2, 4, seed=1), reference, 0.0), reference)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.95), st.floats(0, 8), st.sampled_from(PREDICTION_TYPES))
def test_any_prediction_kind_may_be_guided(t: float, scale: float, kind: str) -> None:
    """Guidance is affine with weights that sum to 1, so it commutes with every conversion."""
    x, a, b = normal(5), normal(5, seed=1), normal(5, seed=2)
    for path in (get_path("linear"), get_path("vp")):
        convert = lambda v, p=path: p.convert(v, x, t, "velocity", kind)  # noqa: E731
        expected = guide(convert(a), convert(b), scale)
        torch.testing.assert_close(convert(guide(a, b, scale)), expected, rtol=1e-9, atol=1e-9)


def test_on_networks() -> None:
    """The unconditional and the weak call of one flexible model as references; all four predictions differ."""
    denoiser = flexify(tiny_denoiser(), [4], rank=2)
    x, _, _ = batch(tiny_dit())
    y = torch.zeros(3, dtype=torch.long)
    null = torch.full((3,), denoiser.null_label)
    with torch.no_grad():
        conditional, unconditional = denoiser(x, 0.5, y).value, denoiser(x, 0.5, null).value
        weak = denoiser(x, 0.5, y, WEAK).value
    for reference in (unconditional, weak):
        assert (conditional - reference).abs().max() > 1e-2
        out = guide(conditional, reference, 3.0)
        torch.testing.assert_close(out, 3 * conditional - 2 * reference, rtol=1e-4, atol=1e-4)


def test_transfer_of_the_scale() -> None:
    """`(1-s1)/(1-s2) = 2.5`."""
    assert weak_scale(1.5) == pytest.approx(1.2)
    assert weak_scale(4.0) == pytest.approx(2.2)
    assert weak_scale(1.0) == 1.0


@pytest.mark.parametrize(
    "guidance",
    [Guidance.cfg(1.5), Guidance.cfg(4.0, WEAK, 3), Guidance.weak_model(1.2, WEAK), Guidance.weak_model(2.0, WEAK, 1)],
)
def test_round_trip(guidance: Guidance) -> None:
    assert Guidance.from_dict(guidance.to_dict()) == guidance
    assert hash(guidance) == hash(Guidance.from_dict(guidance.to_dict()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 2.0, "against": "weak"}, "needs that call's compute"),
        ({"scale": 2.0, "against": "nul"}, "did you mean 'null'"),
        ({"scale": 2.0, "channels": 0}, "at least 1 channel"),
        ({"scale": 2.0, "factor": 1}, "takes scale, against"),
        ({}, "takes scale, against"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Guidance.from_dict(fields)
