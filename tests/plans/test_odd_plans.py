"""Every caching preset on plans that switch something under way: grid, precision, guidance, several calls per step."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from pliant import Denoiser
from pliant.adapters.flexify import flexify
from pliant.compute import WITHOUT_CONDITIONING, Compute, Gate, LowBand, Reuse, Subset, counted_flops
from pliant.compute.gate import mean_change
from pliant.compute.reuse import forecast_weights
from pliant.errors import ConfigError, PlanError
from pliant.guidance import Guidance
from pliant.guidance.rules import Projected
from pliant.plans import Plan, sample
from pliant.plans.caching import CACHING
from pliant.plans.caching.learned import calibrate_learning_to_cache
from pliant.plans.caching.magcache import calibrate_magcache
from pliant.plans.caching.measure import run_plan, watch
from pliant.plans.caching.rows import target_of
from pliant.plans.caching.taken import spent_flops, taken_flops
from pliant.plans.cost import plan_cost
from pliant.plans.guiding import guided_between, zero_star
from support.networks import randomize, tiny_denoiser

STEPS = 9
OPTIONS: dict[str, dict[str, object]] = {
    "spectrum": {"warmup": 2},
    "teacache": {"threshold": 0.3, "calibrate": 2},
    "fbc": {"threshold": 0.3},
    "dbcache": {"front": 1, "warmup": 1, "threshold": 0.4, "order": 1},
    "easycache": {"warmup": 2, "threshold": 0.5},
    "magcache": {"calibrate": 2, "threshold": 3.0},
    "l2c": {"calibrate": 1, "iterations": 5},
    "ras": {"start": 2},
}


@pytest.fixture(scope="module")
def model() -> Denoiser:
    found = flexify(tiny_denoiser(depth=3, patch_size=(1, 1), input_size=(4, 6)), [2], rank=2)
    randomize(found.network)
    return found


def switching(model: Denoiser, what: str) -> Plan:
    """A plan whose first four steps differ in one thing from the rest."""
    plan = Plan.uniform(model, STEPS, "heun" if what == "heun" else "dpmpp-2m")
    if what == "still":
        return zero_star(plan, Guidance(2.0), 1)
    if what == "interval":
        return guided_between(plan, Guidance(2.0), 0.3, 1.6)
    early = {
        "scale": Compute(scale=LowBand.of(2)), "patch": Compute.of(patch=2), "precision": Compute(precision="bf16"),
    }.get(what, Compute())  # fmt: skip
    steps = [replace(s, compute=early, guidance=Guidance(2.0)) if i < 4 else s for i, s in enumerate(plan.steps)]
    return plan.with_steps(steps)


@pytest.mark.parametrize("what", ["scale", "patch", "precision", "still", "interval", "heun"])
@pytest.mark.parametrize("name", list(CACHING))
def test_presets_fit_plans_that_switch(name: str, what: str, model: Denoiser) -> None:
    """They are made, saved, priced and sampled, and a sample is the same in a batch and alone."""
    plan = switching(model, what).cached(model, name, **OPTIONS.get(name, {}))  # type: ignore[arg-type]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    cost = plan.cost(model)
    assert cost.least_flops <= spent_flops(plan, model, [0, 1], [5, 6]) <= cost.flops
    together, alone = sample(model, plan, [0, 1], [5, 6])[1], sample(model, plan, [1], [6])[0]
    assert torch.isfinite(together).all()
    limit = 0.1 if what == "precision" else 1e-3
    torch.testing.assert_close(together, alone, atol=limit, rtol=limit)


def test_a_cache_begins_anew_where_the_scale_changes(model: Denoiser) -> None:
    """The first plain step after low-band ones runs in full, whatever the rule says, and later ones reuse it."""
    plan = switching(model, "scale").cached(model, "deepcache", interval=3)
    sites = [s.compute.sites for s in plan.steps]
    assert sites == [None, "R2C2R2", "R2C2R2", None, None, "R2C2R2", None, "R2C2R2", "R2C2R2"]
    regions = switching(model, "scale").cached(model, "ras", start=2, resets=[])
    subsets = [isinstance(s.compute.tokens, Subset) for s in regions.steps]
    assert subsets == [False] * 5 + [True] * 4
    assert regions.steps[4].compute.write == ("kv",) and not any(s.compute.write for s in regions.steps[:4])


def test_subsets_are_chosen_on_the_states_own_grid(model: Denoiser) -> None:
    """A subset at a scale counts the tokens of one grid and runs on another: refused with the step, not a crash."""
    plan = Plan.uniform(model, 3, "euler")
    low = LowBand.of(2)
    computes = [Compute(scale=low, write=("kv",)), Compute(scale=low, tokens=Subset(0.5)), Compute()]
    bad = plan.with_steps(replace(s, compute=c) for s, c in zip(plan.steps, computes, strict=True))
    with pytest.raises(PlanError, match=r"step 1 \(t=0.66.*subset of tokens is chosen on the state's own grid"):
        bad.check(model)


def test_measurements_compare_steps_of_one_grid(model: Denoiser) -> None:
    """Ratios and routers belong to steps: 1 and "all run" where there is no neighbour to compare with."""
    patches = switching(model, "patch")
    ratios = calibrate_magcache(patches, model, [1], [4]).options["ratios"]
    assert len(ratios) == STEPS and ratios[4] == 1.0 and 1.0 not in ratios[1:4] + ratios[5:]
    still = switching(model, "still")
    ratios = calibrate_magcache(zero_star(still, Guidance(2.0), 2), model, [1], [4]).options["ratios"]
    assert len(ratios) == STEPS and ratios[:3] == [1.0] * 3 and 1.0 not in ratios[3:]
    routers = calibrate_learning_to_cache(still, model, [1], [4], iterations=3).options["routers"]
    assert list(routers) == ["1", "3", "5", "7"] and routers["1"] == "R6"  # step 0 calls no network
    odd = patches.with_steps(replace(s, compute=Compute()) if i == 3 else s for i, s in enumerate(patches.steps))
    assert calibrate_learning_to_cache(odd, model, [1], [4], iterations=3).options["routers"]["3"] == "R6"
    assert len({s.grid for s in watch(patches, model, [1], [4])}) == 2


def test_the_gain_is_learned_across_precisions(model: Denoiser) -> None:
    """EasyCache's gate compares outputs of calls in bf16 and in float32."""
    plan = switching(model, "precision").cached(model, "easycache", warmup=6, threshold=1e-9)
    request = run_plan(plan, model, [1], [6])
    (memory,) = [m for (_, _, streams), m in request.gates.items() if streams == ("cond",)]
    assert memory.full is not None and memory.full[1].dtype == torch.float32
    assert math.isfinite(memory.rows[0].gain) and float(mean_change(*memory.full)) > 0


def test_forecasts_skip_moments_they_cannot_use() -> None:
    """Weights by hand: equal and infinite nodes have none, and the others make the polynomial that is left."""
    never = float("inf")
    assert forecast_weights(2.0, [1.0, 0.0, -never]) == pytest.approx((2.0, -1.0, 0.0))
    assert forecast_weights(2.0, [1.0, 1.0, 0.0]) == pytest.approx((2.0, 0.0, -1.0))
    assert forecast_weights(2.0, [1.0, 1.0, 0.0], "taylor") == pytest.approx((2.0, 0.0, -1.0))
    assert forecast_weights(2.0, [-never]) == pytest.approx((1.0,))
    assert forecast_weights(never, [1.0, 0.0]) == pytest.approx((1.0, 0.0))
    far = forecast_weights(2.0, [1.0, 0.0, -1e9])  # the limit that an infinite node stands for
    assert forecast_weights(2.0, [1.0, 0.0, -never]) == pytest.approx(far, abs=1e-6)


@pytest.mark.parametrize("on", ["time", "logsnr"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_forecasts_by_the_clock_are_finite(solver: str, on: str, model: Denoiser) -> None:
    """Pure noise is at an infinite log-SNR; Heun's steps end at the time at which the next one starts."""
    plan = Plan.uniform(model, 5, solver)
    kept = Compute(write=("branch",))
    computes = [kept, kept, *[Compute(sites="C6", reuse=Reuse(order=1, on=on))] * 2, kept]  # type: ignore[arg-type]
    if solver == "heun":
        computes[3] = Compute(sites="C6", reuse=Reuse(order=3, on=on))  # type: ignore[arg-type]
    plan = plan.with_steps(replace(s, compute=c) for s, c in zip(plan.steps, computes, strict=True))
    assert torch.isfinite(sample(model, plan, [1], [6])).all()


def test_regressions_run_on_the_step_clock(model: Denoiser) -> None:
    from pliant.compute import Chebyshev

    with pytest.raises(ConfigError, match="'chebyshev' runs on the clock 'step', not 'time'"):
        Reuse("state", 1, "chebyshev", "time", Chebyshev(9.0))
    plan = Plan.uniform(model, STEPS, "heun")
    spectrum = plan.cached(model, "spectrum", warmup=2)
    (over,) = {s.compute.reuse.fit.over for s in spectrum.steps if s.compute.reuse and s.compute.reuse.fit}
    assert over == target_of(plan, model).calls == 2 * STEPS - 1  # that clock counts evaluations


def test_momentum_begins_anew_with_other_channels(model: Denoiser) -> None:
    """A remembered difference of one channel is no part of one of two."""
    plan = Plan.uniform(model, 4, "euler")
    rule = Projected(momentum=-0.5)
    one, both = Guidance(3.0, channels=1, rule=rule), Guidance(3.0, rule=rule)
    for first, second in ((one, both), (both, one)):
        mixed = plan.with_steps(replace(s, guidance=first if i < 2 else second) for i, s in enumerate(plan.steps))
        assert torch.isfinite(sample(model, mixed, [1, 2], [6, 7])).all()
    d = torch.ones(1, 2, 2, 2)
    from pliant.guidance.rules import Memory

    memory = Memory(momentum=torch.ones(1, 1, 2, 2))
    fresh = rule.combine(d, 0 * d, 3.0, Memory())
    assert torch.equal(rule.combine(d, 0 * d, 3.0, memory), fresh)


def test_the_least_is_what_the_most_generous_gates_cost(model: Denoiser) -> None:
    """Every stream, grid and reference call has a first call of its own, which cannot hit."""
    reuse, write = Reuse("span"), ("span(2,6)",)
    open_gate = Compute(write=write, reuse=reuse, gate=Gate(99.0, "R2C4", 2, max_run=99), precision="fp32")
    plain = Plan.uniform(model, STEPS, "euler", Compute(precision="fp32"))
    gated = plain.with_steps(replace(s, compute=open_gate) for s in plain.steps)
    interval = guided_between(gated, Guidance(2.0), 0.3, 1.6)
    exit_gate = replace(open_gate, patch=(2, 2))
    reference = plain.with_steps(replace(s, guidance=Guidance(2.0, "null", exit_gate)) for s in plain.steps)
    weak_first = gated.with_steps(
        replace(s, compute=replace(open_gate, patch=(2, 2))) if i < 4 else s for i, s in enumerate(gated.steps)
    )
    for plan in (gated, interval, reference, weak_first):
        cost = plan_cost(plan, model, WITHOUT_CONDITIONING)
        spent = taken_flops(plan, model, run_plan(plan, model, [1], [6]).decisions, WITHOUT_CONDITIONING)
        assert spent == cost.least_flops < cost.flops
    assert spent_flops(reference, model, [1], [6]) < reference.cost(model).flops
    assert "gates decide" in reference.describe(model)


def test_a_limit_on_what_was_seen_survives_an_unknown_gain(model: Denoiser) -> None:
    """The second call of a gate on the output knows no gain; that is no change that was seen."""
    gate = Gate(0.9, "C6", 0, "output", "last_step", max_seen=50.0)
    compute = Compute(write=("drift",), reuse=Reuse("drift"), gate=gate)
    plan = Plan.uniform(model, STEPS, "euler", compute)
    assert any(any(d.hit) for d in run_plan(plan, model, [1], [6]).decisions)


@pytest.mark.parametrize("early", [Compute(patch=(1, 1)), Compute(patch=(2, 2)), Compute(scale=LowBand.of(2))])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fbc", {"threshold": 5.0, "max_run": 2}),
        ("teacache", {"threshold": 2.9}),
        ("easycache", {"threshold": 2.9, "warmup": 2}),
    ],
)
def test_frozen_plans_find_what_was_kept_on_their_grid(
    name: str, options: dict[str, object], early: Compute, model: Denoiser
) -> None:
    """The model's own patch size, named or not, is one grid: what was kept before is still there."""
    plan = Plan.uniform(model, STEPS, "dpmpp-2m")
    plan = plan.with_steps(replace(s, compute=early) if i < 4 else s for i, s in enumerate(plan.steps))
    gated = plan.cached(model, name, **options)  # type: ignore[arg-type]
    reused = [d.step for d in run_plan(gated, model, [1], [6]).decisions if d.hit[0]]
    frozen = gated.freeze(model, [1], [6])
    assert [i for i, s in enumerate(frozen.steps) if "C" in (s.compute.sites or "")] == reused != []
    assert torch.equal(sample(model, frozen, [1], [6]), sample(model, gated, [1], [6]))


def test_rows_that_disagree_may_mix_precisions(model: Denoiser) -> None:
    """One row's answer was kept in bf16, the other's is computed in float32: the batch is float32, rows as alone."""
    gate = Gate(0.9, "C6", 0, "output", "last_step")
    early = Compute(write=("drift",), reuse=Reuse("drift"), gate=gate, precision="bf16")
    plan = Plan.uniform(model, STEPS, "euler")
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        late = replace(early, precision="fp32", gate=replace(gate, threshold=threshold))
        mixed = plan.with_steps(replace(s, compute=early if i < 3 else late) for i, s in enumerate(plan.steps))
        decided = run_plan(mixed, model, [0, 1, 2], [5, 6, 7]).decisions
        if any(0 < sum(d.hit) < 3 for d in decided[3:]):
            break
    else:
        pytest.fail("no rows disagreed, so that nothing was mixed")
    together = sample(model, mixed, [0, 1, 2], [5, 6, 7])
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[1], sample(model, mixed, [1], [6])[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("signal", "reference"), [("output", "last_step"), ("input", "last_full")])
def test_a_hit_of_the_whole_output_costs_what_it_looked_at(signal: str, reference: str) -> None:
    """A gate on the output decides before anything runs; one on the first site's input has embedded the tokens."""
    wide = tiny_denoiser(depth=1, in_channels=64, width=16, patch_size=(1, 1), input_size=(4, 4))
    gate = Gate(0.99, "C2", 0, signal, reference, max_run=9)  # type: ignore[arg-type]
    compute = Compute(write=("out",), reuse=Reuse("out"), gate=gate, precision="fp32")
    plan = Plan.uniform(wide, STEPS, "euler", compute)
    hits: list[int] = []
    counted = counted_flops(lambda: hits.append(sum(sum(d.hit) for d in run_plan(plan, wide, [1], [6]).decisions)))
    plain = Plan.uniform(wide, STEPS, "euler", Compute(precision="fp32"))
    tables = counted_flops(lambda: run_plan(plain, wide, [1], [6]))
    full = wide.flops(compute, WITHOUT_CONDITIONING)
    least = wide.least_flops(compute, WITHOUT_CONDITIONING)
    assert hits[0] > 2 and least == (0 if signal == "output" else 2 * 16 * 64 * 16)
    assert tables - counted == hits[0] * (full - least)
