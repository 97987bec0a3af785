"""Every technique's price is what runs: `cost` against counted operations to 1 %, gates with the decisions taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pliant.adapters.exits import attach_exits
from pliant.adapters.flexify import flexify
from pliant.adapters.route_width import route_width
from pliant.compute import WITHOUT_CONDITIONING, Compute, LowBand, counted_flops
from pliant.compute.cache import Cache
from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path
from pliant.plans import Plan
from pliant.plans.caching import CACHING
from pliant.plans.caching.measure import run_plan
from pliant.plans.caching.taken import spent_flops, taken_flops
from pliant.plans.cost import plan_cost
from pliant.plans.engine import ModulationTable
from pliant.plans.guiding import computed_every, computed_once, guided_between

BLOCKS, STEPS = 4, 10
ROUTERS = {str(i): "R2C6" for i in range(1, STEPS, 2)}
OPTIONS: dict[str, dict[str, object]] = {
    "delta-dit": {"interval": 2},
    "spectrum": {"warmup": 3},
    "teacache": {"threshold": 0.3},
    "fbc": {"threshold": 0.8},
    "dbcache": {"front": 1, "back": 1, "warmup": 2, "threshold": 0.8},
    "easycache": {"warmup": 3, "threshold": 0.3},
    "magcache": {"ratios": [1.0] * STEPS},
    "l2c": {"routers": ROUTERS},
    "icc": {"rank": 4},
}
GATED = ("teacache", "fbc", "dbcache", "easycache")


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(1, 1), in_channels=2, width=32, depth=BLOCKS, heads=2, num_classes=5,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    return Denoiser(network.requires_grad_(False), get_path("linear"), "velocity", NetworkTime(scale=1000.0))


def counted_run(plan: Plan, model: Denoiser) -> tuple[int, Cache]:
    """Operations of sampling one image, without the modulation tables, and the request's cache."""
    tables: list[int] = []
    caches: list[Cache] = []
    real = ModulationTable.at

    def at(table: ModulationTable, k: int) -> torch.Tensor:
        out: list[torch.Tensor] = []
        tables.append(counted_flops(lambda: out.append(real(table, k))))
        return out[0]

    run_plan(plan, model, [1], [0])  # what is made once (low-rank factors) is made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModulationTable, "at", at)
        total = counted_flops(lambda: caches.append(run_plan(plan, model, [1], [0])))
    return total - sum(tables), caches[0]


def check(plan: Plan, model: Denoiser) -> None:
    cost = plan_cost(plan, model, WITHOUT_CONDITIONING)
    counted, _ = counted_run(plan, model)
    assert cost.flops == cost.least_flops
    assert counted == pytest.approx(cost.flops, rel=0.01)


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", [name for name in CACHING if name not in GATED])
def test_static_presets(model: Denoiser, name: str, guidance: float | None) -> None:
    plan = Plan.uniform(model, STEPS, "euler", guidance=guidance)
    cached = plan.cached(model, name, **OPTIONS.get(name, {}))
    assert cached.cost(model).flops < plan.cost(model).flops
    check(cached, model)


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", GATED)
def test_gated_presets_cost_what_they_decided(model: Denoiser, name: str, guidance: float | None) -> None:
    plan = Plan.uniform(model, STEPS, "euler", guidance=guidance).cached(model, name, **OPTIONS[name])
    counted, cache = counted_run(plan, model)
    cost = plan_cost(plan, model, WITHOUT_CONDITIONING)
    taken = taken_flops(plan, model, cache.decisions, WITHOUT_CONDITIONING)
    assert counted == pytest.approx(taken, rel=0.01)
    assert cost.least_flops <= taken <= cost.flops
    hits = [h for d in cache.decisions for h in d.hit]
    assert any(hits) and not all(hits), "a gate that always decides the same tests nothing"


def test_decisions_of_several_runs_are_averaged(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler").cached(model, "teacache", threshold=0.3)
    runs = [run_plan(plan, model, [label], [label]).decisions for label in range(3)]
    each = [taken_flops(plan, model, decisions) for decisions in runs]
    together = taken_flops(plan, model, [d for decisions in runs for d in decisions])
    assert together == pytest.approx(sum(each) / 3)
    assert taken_flops(plan, model, ()) == plan.cost(model).flops


def _skip(model: Denoiser) -> Plan:
    return _half(Plan.uniform(model, STEPS, "euler"), Compute(sites="R2K4R2"))


def _scale(model: Denoiser) -> Plan:
    return _half(Plan.uniform(model, STEPS, "euler"), Compute(scale=LowBand.of(2, band="dct")))


def _half(plan: Plan, compute: Compute) -> Plan:
    return plan.with_steps(replace(s, compute=compute) if i < STEPS // 2 else s for i, s in enumerate(plan.steps))


def _guided(model: Denoiser) -> Plan:
    return Plan.uniform(model, STEPS, "euler", guidance=2.0)


PLANS: dict[str, Callable[[Denoiser], Plan]] = {
    "layers skipped": _skip,
    "low band": _scale,
    "guidance in an interval": lambda m: guided_between(_guided(m), Guidance.cfg(2.0), 0.3, 2.0),
    "reference computed once": lambda m: computed_once(_guided(m), Guidance.cfg(2.0)),
    "reference every third": lambda m: computed_every(_guided(m), Guidance.cfg(2.0), 3),
}


@pytest.mark.parametrize("name", PLANS)
def test_other_techniques(model: Denoiser, name: str) -> None:
    plan = PLANS[name](model)
    assert plan.cost(model).flops < _guided(model).cost(model).flops
    check(plan, model)


def test_weak_patches_first(model: Denoiser) -> None:
    flexible = flexify(model, [2], rank=2)
    check(Plan.weak_to_powerful(flexible, STEPS, weak_steps=5, solver="euler"), flexible)
    check(Plan.weak_to_powerful(flexible, STEPS, weak_steps=3, weak_guidance_steps=4, guidance=2.0), flexible)


def test_exits(model: Denoiser) -> None:
    leaving = attach_exits(model, depths=(1, 2))
    check(_half(Plan.uniform(leaving, STEPS, "euler"), Compute(exit=2)), leaving)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_precision_changes_no_count(model: Denoiser, precision: str) -> None:
    check(Plan.uniform(model, 3, "euler", Compute(precision=precision)), model)


@pytest.mark.parametrize(("bias", "bound"), [(50.0, "flops"), (-50.0, "least_flops")])
def test_token_routers_cost_between_the_least_and_the_most(model: Denoiser, bias: float, bound: str) -> None:
    routed = route_width(model, routes=("tokens",))
    plan = Plan.uniform(routed, 3, "euler", Compute(precision="fp32"))
    for router in routed.network.routers.tokens:  # type: ignore[union-attr]
        router.fc2.bias.data.fill_(bias)  # all tokens take every MLP, or none does
    cost = plan_cost(plan, routed, WITHOUT_CONDITIONING)
    assert cost.least_flops < 0.75 * cost.flops
    assert counted_run(plan, routed)[0] == pytest.approx(getattr(cost, bound), rel=0.01)
    for router in routed.network.routers.tokens:  # type: ignore[union-attr]
        router.fc2.bias.data.zero_()
        router.fc2.weight.data.normal_()
    own = plan.cost(routed)
    assert 1.02 * own.least_flops < spent_flops(plan, routed, [1, 2], [0, 1]) < 0.98 * own.flops
    assert "token routers decide" in plan.describe(routed)
