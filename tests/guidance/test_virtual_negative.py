"""RCFG as formulas: recursion, closed form, and the same rule in every prediction kind."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import ConfigError
from pliant.guidance import guide
from pliant.guidance.virtual_negative import (
    guided_noise,
    moderated_rows,
    next_virtual_noise,
    virtual_noise,
    virtual_rows,
)
from pliant.paths import PREDICTION_TYPES, AlphaSigma, get_path
from pliant.tasks.streaming.guidance import StreamGuidance

LEVELS = (0.9, 0.65, 0.4, 0.15)


def at(path: str, t: float) -> AlphaSigma:
    return get_path(path).alpha_sigma(t)


def draws(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("path", ["linear", "vp-discrete", "cosine"])
@pytest.mark.parametrize(("scale", "delta"), [(1.2, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("onetime", [False, True])
def test_the_recursion_is_the_closed_form(path: str, scale: float, delta: float, onetime: bool) -> None:
    frame, *noises = draws(6)
    points = [at(path, t) for t in LEVELS]
    x = points[0].alpha * frame + points[0].sigma * noises[0]
    if onetime:  # a real unconditional prediction at the first level
        s = torch.tanh(x)
        reference = (x - points[0].sigma * s) / points[0].alpha
    else:
        s, reference = noises[0], frame
    for k, (here, there) in enumerate(pairwise(points)):
        torch.testing.assert_close(s, virtual_noise(x, reference, here.alpha, here.sigma), rtol=0, atol=1e-10)
        eps = guided_noise(torch.sin(x) + 0.1 * k, s, scale, delta)
        clean = (x - here.sigma * eps) / here.alpha
        x = there.alpha * clean + there.sigma * noises[k + 1]
        s = next_virtual_noise(s, eps, noises[k + 1], here, there)
    torch.testing.assert_close(s, virtual_noise(x, reference, points[-1].alpha, points[-1].sigma), rtol=0, atol=1e-10)


@given(scale=st.floats(0.0, 20.0), t=st.floats(0.05, 0.95), seed=st.integers(0, 10))
@settings(max_examples=30)
def test_perfect_agreement_is_left_alone(scale: float, t: float, seed: int) -> None:
    """A network whose clean image is the reference already: nothing to push away from, whatever the scale."""
    x, reference = draws(2, seed)
    s = at("linear", t)
    eps = (x - s.alpha * reference) / s.sigma
    guided = guided_noise(eps, virtual_noise(x, reference, s.alpha, s.sigma), scale)
    torch.testing.assert_close(guided, eps, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("path", ["linear", "vp-discrete"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("delta", [1.0, 0.6])
def test_every_kind_follows_the_rule_for_epsilon(path: str, kind: str, delta: float) -> None:
    x, reference, eps = draws(3)
    for t in LEVELS:
        s, p = at(path, t), get_path(path)
        wanted = guided_noise(eps, virtual_noise(x, reference, s.alpha, s.sigma), 1.7, delta)
        on_state, on_reference = virtual_rows(kind, s, delta)
        value = p.convert(eps, x, t, "epsilon", kind)
        found = guide(value, on_state * x + on_reference * reference, 1.7)
        torch.testing.assert_close(p.convert(found, x, t, kind, "epsilon"), wanted, rtol=1e-9, atol=1e-9)
        # One-time guidance's first level: the negative is an output of the network itself.
        null = torch.cos(x)
        on_state, on_output = moderated_rows(kind, s, delta)
        negative = on_state * x + on_output * p.convert(null, x, t, "epsilon", kind)
        wanted = guided_noise(eps, null, 1.7, delta)
        found = guide(value, negative, 1.7)
        torch.testing.assert_close(p.convert(found, x, t, kind, "epsilon"), wanted, rtol=1e-9, atol=1e-9)


def test_velocity_at_pure_noise() -> None:
    """At t=1 of the linear path the plain rule is finite, `v = s - reference`; a moderated one is not defined."""
    x, reference = draws(2)
    on_state, on_reference = virtual_rows("velocity", at("linear", 1.0))
    torch.testing.assert_close(on_state * x + on_reference * reference, x - reference)
    with pytest.raises(ConfigError, match="start below t=1"):
        virtual_rows("velocity", at("linear", 1.0), 0.5)
    with pytest.raises(ConfigError, match="start below t=1"):
        virtual_rows("epsilon", at("linear", 0.0))


def test_scales_below_and_at_one_work() -> None:
    eps, s = draws(2)
    assert guided_noise(eps, s, 1.0, 0.3) is eps
    torch.testing.assert_close(guided_noise(eps, s, 0.0, 0.5), 0.5 * s)
    torch.testing.assert_close(guided_noise(eps, s, 0.5), 0.5 * (s + eps))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative": "selv"}, "did you mean 'self'"),
        ({"negative": "self", "scale": float("nan")}, "scale"),
        ({"negative": "self", "delta": -1.0}, "delta"),
        ({"negative": "full", "delta": 0.5}, "leave it out"),
    ],
)
def test_bad_guidance_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StreamGuidance(**options)  # type: ignore[arg-type]
