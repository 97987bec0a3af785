"""Guidance rules against their formulas (sheet H, section 6)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.guidance import Banded, Damped, Guidance, Linear, Memory, Projected, Rule, Tangential, Zero, guide, guided
from pliant.guidance.rules import RULES, bands, rescaled, rule_from_dict, rule_to_dict

RULES_HERE: tuple[Rule, ...] = (
    Linear(), Projected(), Projected(0.3, -0.5, 0.1), Zero(), Damped(), Tangential(), Banded(2.0), Banded(1.0, 0.3)
)  # fmt: skip


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    c = torch.randn(3, 4, 8, 8)
    return c, c + 0.5 * torch.randn(3, 4, 8, 8)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


@pytest.mark.parametrize("rule", RULES_HERE, ids=repr)
def test_no_difference_no_guidance(rule: Rule, pair: tuple[Tensor, Tensor]) -> None:
    c = pair[0]
    torch.testing.assert_close(rule.combine(c, c, 4.0, Memory()), c)


@pytest.mark.parametrize("rule", [Linear(), Projected(), Projected(0.5, -0.5, 0.1), Damped(), Banded(1.0)], ids=repr)
def test_a_scale_of_one_is_the_conditional_prediction(rule: Rule, pair: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(rule.combine(*pair, 1.0, Memory()), pair[0])


def test_linear_is_guide(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    torch.testing.assert_close(Linear().combine(c, u, 3.0, Memory()), u + 3.0 * (c - u))
    assert torch.equal(guided(Guidance(3.0), c, u, Memory()), guide(c, u, 3.0))


def test_projected(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    assert dot(Projected(0.0).combine(c, u, 5.0, Memory()) - c, c).abs().max() < 1e-3 * dot(c, c).min()
    torch.testing.assert_close(Projected(1.0).combine(c, u, 5.0, Memory()), u + 5.0 * (c - u))  # plain guidance
    limit = 0.1
    step = Projected(1.0, norm=limit).combine(c, u, 2.0, Memory()) - c
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((3,), limit * math.sqrt(c[0].numel())))
    far = Projected(1.0, norm=100.0).combine(c, u, 2.0, Memory())
    torch.testing.assert_close(far, u + 2.0 * (c - u))  # a limit that is not reached changes nothing


def test_projected_momentum_is_a_running_sum_per_request(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    memory, rule = Memory(), Projected(1.0, momentum=-0.5)
    running = torch.zeros_like(c)
    for k in range(4):
        reference = u * (1 + 0.1 * k)
        running = (c - reference) - 0.5 * running
        torch.testing.assert_close(rule.combine(c, reference, 3.0, memory), c + 2.0 * running)
    torch.testing.assert_close(rule.combine(c, u, 3.0, Memory()), c + 2.0 * (c - u))


def test_zero_star(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    s = dot(c, u) / dot(u, u)
    own = s.view(-1, 1, 1, 1).float() * u
    assert (dot(c - own, u).abs() <= 1e-6 * dot(u, u)).all()
    torch.testing.assert_close(Zero().combine(c, u, 3.0, Memory()), own + 3.0 * (c - own))
    assert torch.equal(Zero(still=True).combine(c, u, 3.0, Memory()), torch.zeros_like(c))


def test_rescale(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    x = u + 7.5 * (c - u)
    axes = (1, 2, 3)
    torch.testing.assert_close(rescaled(x, c, 1.0).std(axes), c.std(axes))
    assert torch.equal(rescaled(x, c, 0.0), x)
    want = 0.7 * x * (c.std(axes) / x.std(axes)).view(-1, 1, 1, 1) + 0.3 * x
    torch.testing.assert_close(guided(Guidance(7.5, rescale=0.7), c, u, Memory()), want)


def test_damped(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    ratio = (c - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    scale = 1 + 2.0 * torch.exp(-8.0 * ratio).view(-1, 1, 1, 1)
    torch.testing.assert_close(Damped().combine(c, u, 3.0, Memory()), u + scale * (c - u))
    torch.testing.assert_close(Damped(0.0).combine(c, u, 3.0, Memory()), u + 3.0 * (c - u))


def test_tangential_is_the_first_singular_vector(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    for k in range(3):
        _, _, directions = torch.linalg.svd(torch.stack([c[k].flatten(), u[k].flatten()]).double(), full_matrices=False)
        first = directions[0]
        common = ((u[k].flatten().double() @ first) * first).float().view_as(u[k])
        want = common + 3.0 * (c[k] - common)
        torch.testing.assert_close(Tangential().combine(c, u, 3.0, Memory())[k], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (7, 8), (8, 7), (5, 9)])
def test_bands_add_up_and_split_waves(shape: tuple[int, int]) -> None:
    h, w = shape
    x = torch.randn(2, 3, h, w)
    low, high = bands(x, 0.5)
    torch.testing.assert_close(low + high, x)
    wave = torch.cos(2 * math.pi * torch.arange(w) / w).expand(1, 1, h, w)  # one period: below half of Nyquist
    torch.testing.assert_close(bands(wave, 0.5)[0], wave, atol=1e-5, rtol=0)
    fast = torch.cos(2 * math.pi * (w // 2) * torch.arange(w) / w).expand(1, 1, h, w)
    torch.testing.assert_close(bands(fast, 0.5)[1], fast, atol=1e-5, rtol=0)
    c, u = x, x.flip(0)
    torch.testing.assert_close(Banded(3.0).combine(c, u, 3.0, Memory()), u + 3.0 * (c - u), atol=1e-5, rtol=1e-5)


def test_channels_keep_the_rest_conditional(pair: tuple[Tensor, Tensor]) -> None:
    c, u = pair
    for rule in RULES_HERE:
        out = guided(Guidance(3.0, channels=2, rule=rule, rescale=0.5), c, u, Memory())
        assert torch.equal(out[:, 2:], c[:, 2:]) and not torch.equal(out[:, :2], c[:, :2])


def test_rules_survive_json_and_bad_ones_are_named() -> None:
    for rule in RULES_HERE:
        assert rule_from_dict(rule_to_dict(rule)) == rule
        g = Guidance(2.0, rule=rule, rescale=0.3, channels=2)
        assert Guidance.from_dict(g.to_dict()) == g
    assert Guidance.from_dict(Guidance(2.0, "origin", moderation=0.5).to_dict()).moderation == 0.5
    assert set(RULES) == {"linear", "projected", "zero", "damped", "tangential", "banded"}
    for make, words in (
        (lambda: rule_from_dict({"name": "projectd"}), "did you mean 'projected'"),
        (lambda: rule_from_dict({"name": "zero", "stil": 1}), "zero"),
        (lambda: Projected(momentum=-1.0), "within"),
        (lambda: Projected(norm=0.0), "> 0"),
        (lambda: Banded(1.0, 0.0), "Nyquist"),
        (lambda: Damped(-1.0), ">= 0"),
        (lambda: Guidance(2.0, "nul"), "did you mean 'null'"),  # type: ignore[arg-type]
        (lambda: Guidance(2.0, rescale=1.5), r"\[0, 1\]"),
        (lambda: Guidance(2.0, moderation=0.5), "virtual negatives"),
        (lambda: Guidance(2.0, gain=(1.1, 1.0)), "difference"),
    ):
        with pytest.raises(PlanError, match=words):
            make()
