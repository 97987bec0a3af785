"""Predicted bytes against those of the tensors that are really alive while the engine runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pliant.adapters.flexify import flexify
from pliant.compute import Compute, Pool
from pliant.denoiser import Denoiser
from pliant.plans import Plan, Sampler
from pliant.plans.memory import plan_memory
from support.memory import LiveBytes, stored_bytes
from support.networks import tiny_denoiser

TOLERANCE = 0.06
"""Largest relative error of a predicted peak; measured errors are at most 4.2 %."""


@pytest.fixture(scope="module")
def model() -> Denoiser:
    shape = {"input_size": (16, 16), "patch_size": (1, 1), "width": 64, "depth": 3, "num_classes": 5}
    found = flexify(tiny_denoiser(**shape), [2], rank=2)
    found.network.requires_grad_(False)
    return found


def measured_peak(model: Denoiser, plan: Plan, batch: int) -> tuple[int, int]:
    """Bytes alive at most while a prepared sampler runs, and the engine's own copies of weights."""
    with LiveBytes() as live:
        sampler = Sampler(model, plan)
        copies = live.now
        live.peak = 0
        sampler([i % model.num_classes for i in range(batch)], list(range(batch)))
    return live.peak + stored_bytes(model.network), copies


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "plain", "guided", "weak", "fora", "taylorseer", "delta-dit", "icc", "tome", "ras", "deepcache", "spectrum",
        "teacache", "fbc", "dbcache", "easycache", "pool",
    ],
)  # fmt: skip
def test_predicted_peak(model: Denoiser, name: str, precision: str) -> None:
    compute, weak = Compute(precision=precision), Compute(patch=(2, 2), precision=precision)
    plain = Plan.uniform(model, 6, compute=compute)
    options = {
        "fora": {"interval": 2}, "icc": {"interval": 2, "rank": 4}, "tome": {"ratio": 0.5}, "spectrum": {"warmup": 2},
        "teacache": {"threshold": 0.3}, "dbcache": {"front": 1, "warmup": 1, "order": 2}, "easycache": {"warmup": 2},
    }  # fmt: skip
    if name == "plain":
        plan = plain
    elif name == "guided":
        plan = Plan.uniform(model, 6, compute=compute, guidance=2.0)
    elif name == "pool":
        plan = Plan.uniform(model, 6, compute=replace(compute, tokens=Pool.of(2, 4)))
    elif name == "weak":
        plan = Plan.weak_to_powerful(model, 6, weak_steps=3, weak=weak, powerful=compute, guidance=2.0)
    else:
        plan = plain.cached(model, name, **options.get(name, {}))
    predicted = plan_memory(plan, model, 4)
    peak, copies = measured_peak(model, plan, 4)
    assert predicted.peak == pytest.approx(peak, rel=TOLERANCE)
    assert predicted.copies == pytest.approx(copies, rel=0.1, abs=1000)


def test_what_grows_with_what(model: Denoiser) -> None:
    plan = Plan.uniform(model, 6)
    one, four = plan_memory(plan, model, 1), plan_memory(plan, model, 4)
    assert one.weights == four.weights == stored_bytes(model.network)
    assert one.copies == four.copies and one.cache == four.cache == 0
    assert four.activations > 3.9 * one.activations and four.states == 4 * one.states
    assert one.moved < four.moved < 4 * one.moved  # weights are read once for all images
    kept = plan_memory(plan.cached(model, "fora", interval=3), model, 4)
    assert kept.cache > 0 and kept.moved < four.moved
    higher = plan_memory(plan.cached(model, "taylorseer", order=2), model, 4)
    assert higher.cache == pytest.approx(3 * kept.cache)


def test_a_guide_has_weights_of_its_own(model: Denoiser) -> None:
    from pliant.guidance import Guidance

    guided = model.autoguided(replace(model))
    both = plan_memory(Plan.uniform(guided, 4, guidance=Guidance.auto(2.0)), guided, 1)
    assert both.weights == 2 * plan_memory(Plan.uniform(model, 4), model, 1).weights
