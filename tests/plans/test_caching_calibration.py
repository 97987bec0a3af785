"""What presets measure on a model: against direct measurements, and what the measurement is for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.compute import Chebyshev
from pliant.compute.reuse import forecast_weights
from pliant.compute.sites import parse_sites
from pliant.denoiser import Denoiser
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path
from pliant.plans import Plan, sample
from pliant.plans.caching import CACHING
from pliant.plans.caching.learned import calibrate_learning_to_cache
from pliant.plans.caching.magcache import calibrate_magcache
from pliant.plans.caching.measure import watch
from pliant.plans.caching.tea_fit import calibrate_teacache

STEPS = 8


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(2, 2), in_channels=2, width=32, depth=3, heads=2, num_classes=5,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    return Denoiser(network, get_path("linear"), "velocity", NetworkTime(scale=1000.0))


def test_what_is_watched_is_what_the_network_sees(model: Denoiser) -> None:
    """States of a guided plan, conditional stream only, from the denoiser's own calls."""
    plan = Plan.uniform(model, STEPS, "euler", guidance=2.0)
    seen = watch(plan, model, [1, 3], [4, 5])
    assert [s.step for s in seen] == list(range(STEPS))
    states = [s.x for s in _steps(model, plan)]
    for k in (0, 3):
        x = states[k - 1] if k else _start(model)
        with torch.no_grad():
            out = seen[k].sites.head(seen[k].end(), seen[k].context)
            expected = model(x, plan.steps[k].t, torch.tensor([1, 3])).value
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def _steps(model: Denoiser, plan: Plan):  # type: ignore[no-untyped-def]
    from pliant.plans import sample_steps

    return list(sample_steps(model, plan, [1, 3], [4, 5]))


def _start(model: Denoiser) -> torch.Tensor:
    from pliant.plans.noise import seeded_noise

    return torch.stack([seeded_noise(s, -1, model.sample_shape) for s in (4, 5)])


def test_ratios_are_those_of_the_residuals(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    found = calibrate_magcache(plan, model, [1, 3], [4, 5]).options["ratios"]
    with torch.no_grad():
        norms = [(s.end()[0] - s.start[0]).norm(dim=-1) for s in watch(plan, model, [1, 3], [4, 5])]
    expected = [1.0, *(float((b / a).mean()) for a, b in pairwise(norms))]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_polynomial_is_the_least_squares_fit(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    found = calibrate_teacache(plan, model, [1, 3], [4, 5], degree=2)
    xs, ys = [], []
    with torch.no_grad():
        features = [(s.sites.norm(0, s.start, s.context)[0], s.end()[0]) for s in watch(plan, model, [1, 3], [4, 5])]
    for (a, b), (c, d) in pairwise(features):
        xs += ((c - a).abs().mean((1, 2)) / a.abs().mean((1, 2))).tolist()
        ys += ((d - b).abs().mean((1, 2)) / b.abs().mean((1, 2))).tolist()
    x, y = torch.tensor(xs).double(), torch.tensor(ys).double()

    def loss(c: torch.Tensor) -> float:
        return float(((c[0] * x**2 + c[1] * x + c[2] - y) ** 2).sum())

    best = torch.tensor(found.options["polynomial"], dtype=torch.float64)
    for k in range(3):  # no coefficient can be moved for the better
        for nudge in (-1e-3, 1e-3):
            moved = best.clone()
            moved[k] *= 1 + nudge
            assert loss(moved) > loss(best)
    assert found.facts["r2"] == pytest.approx(1 - loss(best) / float(((y - y.mean()) ** 2).sum()))


def test_calibration_goes_into_the_plan_and_its_provenance(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    cached = plan.cached(model, "teacache", calibrate=3, threshold=0.2)
    made = cached.provenance["caching"]
    assert made["measured"]["samples"] == 3 and len(made["polynomial"]) == 5
    gate = cached.steps[0].compute.gate
    assert gate is not None and list(gate.polynomial) == made["polynomial"]
    assert Plan.from_dict(cached.to_dict()) == cached
    again = plan.cached(model, "teacache", threshold=0.2, polynomial=made["polynomial"])
    assert again.steps == cached.steps


def test_no_preset_has_another_models_constants() -> None:
    """Rules that need to know a model either refuse or say nothing about it."""
    import inspect

    for name, preset in CACHING.items():
        for parameter in list(inspect.signature(preset.rule).parameters.values())[1:]:
            plain = parameter.default is None or isinstance(parameter.default, (int, float, str))
            assert plain or parameter.default in ((), parameter.empty), (name, parameter)


# Learning to cache --------------------------------------------------------------------------------------------------


def test_routers_reuse_what_costs_least(model: Denoiser) -> None:
    """A penalty of nothing runs what matters, a huge one reuses everything; in between reuse is monotone."""
    plan = Plan.uniform(model, 4, "euler")
    reused = []
    for penalty in (0.0, 1e-4, 10.0):
        found = calibrate_learning_to_cache(plan, model, [1, 3], [4, 5], penalty, iterations=40, lr=0.15)
        routers = found.options["routers"]
        assert sorted(routers) == ["1", "3"]
        reused.append(sum(parse_sites(text).count("C") for text in routers.values()))
    assert reused[0] < reused[1] <= reused[2] == 2 * 6
    assert all(p.grad is None for p in model.network.parameters()), "the weights are not touched"


def test_a_learned_choice_is_better_than_the_opposite_one(model: Denoiser) -> None:
    """At an equal number of reused sites, the router's choice strays less than reusing the sites that it runs."""
    plan = Plan.uniform(model, STEPS, "euler")
    found = calibrate_learning_to_cache(plan, model, [0, 1, 2, 3], [4, 5, 6, 7], 3e-4, iterations=80, lr=0.1)
    routers = {k: parse_sites(v) for k, v in found.options["routers"].items()}
    opposite = {}
    for k, text in routers.items():
        count = text.count("C")
        order = [s for s in range(6) if text[s] == "R"] + [s for s in range(6) if text[s] == "C"]
        opposite[k] = "".join("C1" if s in order[:count] else "R1" for s in range(6))
    assert any("C" in v and "R" in v for v in routers.values())
    base = sample(model, plan, [0, 1, 2, 3], [14, 15, 16, 17])
    errors = [
        float((sample(model, plan.cached(model, "l2c", routers=r), [0, 1, 2, 3], [14, 15, 16, 17]) - base).norm())
        for r in (found.options["routers"], opposite)
    ]
    assert errors[0] < errors[1]


# Chebyshev ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=5), st.integers(0, 4), st.floats(0.0, 1.0))
@settings(max_examples=30)
def test_without_a_penalty_polynomials_are_forecast_exactly(
    coefficients: list[float], shift: int, blend: float
) -> None:
    """Up to the regression's degree, and up to 2 where the local polynomial has a share."""
    degree = len(coefficients) - 1 if blend == 1.0 else 2
    fit = Chebyshev(50.0, 4, 1e-12, blend)
    nodes = [20.0 + shift, 15.0, 11.0, 8.0, 6.0, 4.0, 3.0, 2.0]

    def f(i: float) -> float:
        return sum(c * (i / 25 - 1) ** p for p, c in enumerate(coefficients[: degree + 1]))

    weights = forecast_weights(26.0, nodes, "chebyshev", fit)
    assert sum(w * f(n) for w, n in zip(weights, nodes, strict=True)) == pytest.approx(f(26.0), abs=1e-4)


def test_the_regression_is_the_published_one() -> None:
    """`(X^T X + ridge I)^-1 X^T H` on T_0..T_4 of 2i/50 - 1, by numpy's own Chebyshev polynomials."""
    numpy = pytest.importorskip("numpy")
    nodes = [11.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    values = numpy.sin(numpy.array(nodes) / 7)
    x = numpy.polynomial.chebyshev.chebvander(2 * numpy.array(nodes) / 50 - 1, 4)
    c = numpy.linalg.solve(x.T @ x + 0.1 * numpy.eye(5), x.T @ values)
    expected = float(numpy.polynomial.chebyshev.chebval(2 * 13 / 50 - 1, c))
    weights = forecast_weights(13.0, nodes, "chebyshev", Chebyshev(50.0, 4, 0.1, 1.0))
    assert float(numpy.dot(weights, values)) == pytest.approx(expected, abs=1e-12)


def test_the_penalty_shrinks_constants_unless_distances_are_regressed() -> None:
    """The published form's defect, and the way round it."""
    nodes = [6.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    shrunk = sum(forecast_weights(8.0, nodes, "chebyshev", Chebyshev(50.0)))
    assert abs(shrunk - 1) > 0.005
    kept = sum(forecast_weights(8.0, nodes, "chebyshev", Chebyshev(50.0, about="newest")))
    assert kept == pytest.approx(1.0, abs=1e-12)
