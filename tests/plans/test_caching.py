"""Caching presets: published decision sequences, exactness where nothing is reused, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.compute import Compute
from pliant.compute.sites import parse_sites
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PlanError, PliantError
from pliant.guidance import Guidance
from pliant.models import DiT, DiTConfig
from pliant.paths import NetworkTime, get_path
from pliant.plans import Plan, Step, sample
from pliant.plans.caching import Target, with_caching
from pliant.plans.caching.forecasts import spectrum, taylorseer, taylorseer_diffusers
from pliant.plans.caching.intervals import crowded, deepcache, delta_dit, fastercache, fora, pab
from pliant.plans.caching.magcache import resampled
from pliant.plans.caching.rows import Row
from pliant.plans.guiding import computed_every

BLOCKS, SITES, STEPS = 4, 8, 12
CALIBRATED = {"magcache": {"ratios": [1.0] * STEPS}, "l2c": {"routers": {str(i): "R2C6" for i in range(1, STEPS, 2)}}}
OPTIONS = {**CALIBRATED, "teacache": {"threshold": 0.1}, "dbcache": {"front": 1, "warmup": 3}, "icc": {"rank": 4}}
OPTIONS["easycache"] = {"warmup": 3, "threshold": 0.3}
EXACT = {  # options under which a preset reuses nothing
    **{name: {"interval": 1} for name in ("fora", "deepcache", "delta-dit", "fastercache", "taylorseer", "icc")},
    "taylorseer-diffusers": {"interval": 1},
    "pab": {"attention": 1},
    "spectrum": {"window": 1.0, "growth": 0.0},
    "teacache": {"threshold": 0.0},
    "fbc": {"threshold": 0.0},
    "dbcache": {"threshold": 0.0, "front": 1},
    "easycache": {"threshold": 0.0},
    "magcache": {"threshold": 0.0, "ratios": [1.0] * STEPS},
    "l2c": {"routers": {str(i): f"R{SITES}" for i in range(1, STEPS, 2)}},
    "ras": {"ratio": 1.0},
    "tome": {"ratio": 1e-3},
}


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(2, 2), in_channels=2, width=32, depth=BLOCKS, heads=2, num_classes=5,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    return Denoiser(network.requires_grad_(False), get_path("linear"), "velocity", NetworkTime(scale=1000.0))


def target(steps: int, sites: int = SITES) -> Target:
    return Target(tuple(1 - i / steps for i in range(steps)), sites)


def full_steps(rows: Sequence[Row]) -> list[int]:
    return [i for i, row in enumerate(rows) if "C" not in (row.sites or "")]


def letters(plan: Plan) -> str:
    """Per step: g may decide, w only remembers, C reuses, F is full."""
    found = ""
    for compute in (step.compute for step in plan.steps):
        if compute.gate is not None:
            found += "w" if compute.gate.never_hits else "g"
        else:
            found += "C" if "C" in (compute.sites or "") else "F"
    return found


# Published sequences ------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.integers(1, 60))
@settings(max_examples=30)
def test_fora_counts_down(steps: int, interval: int) -> None:
    """The official loop runs j = S-1..0 and is full where j == S-1 or j % N == 0."""
    if interval > steps:
        with pytest.raises(PlanError, match="none would be recomputed"):
            fora(target(steps), interval=interval)
        return
    expected = [i for i, j in enumerate(range(steps - 1, -1, -1)) if j == steps - 1 or j % interval == 0]
    found = full_steps(fora(target(steps), interval=interval))
    assert found == expected and found[-1] == steps - 1


def test_taylorseer_of_diffusers_is_full_at_the_published_steps() -> None:
    assert full_steps(taylorseer_diffusers(target(20))) == [0, 1, 2, 4, 9, 14, 19]
    assert full_steps(taylorseer_diffusers(target(20), cooldown=17)) == [0, 1, 2, 4, 9, 14, 17, 18, 19]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(8, 50))
@settings(max_examples=30)
def test_taylorseer_counts_calls_since_the_last_full_step(interval: int, warmup: int, steps: int) -> None:
    counter, expected = 0, []
    for i in range(steps):
        if i < warmup or counter == interval - 1:
            expected.append(i)
            counter = 0
        else:
            counter += 1
    assert full_steps(taylorseer(target(steps), interval=interval, warmup=warmup)) == expected


def test_spectrum_is_full_at_the_published_steps() -> None:
    """Sheet H, 7: 14 and 10 passes of 50."""
    mild = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    assert full_steps(spectrum(target(50))) == mild
    assert full_steps(spectrum(target(50), growth=3.0)) == [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]


def test_spectrum_forecasts_from_all_full_steps_in_the_window() -> None:
    orders = [r.reuse.order for r in spectrum(target(50), keep=8) if r.reuse is not None]
    assert orders[0] == 4 and max(orders) == 7 and orders == sorted(orders)


def test_deepcache_and_delta_dit() -> None:
    rows = deepcache(target(7), interval=3)
    assert full_steps(rows) == [0, 3, 6] and rows[1].sites == "R2C4R2" and rows[0].write == ("span(2,6)",)
    uneven = deepcache(target(50), interval=5, center=15)
    assert full_steps(uneven) == crowded(50, 10, 15) and uneven[1].sites == "R2C4R2"
    rows = delta_dit(target(10), interval=3, cut=5)
    assert full_steps(rows) == [0, 3, 5, 8]  # the cut itself is full: the other span begins there
    assert rows[1].sites == "R4C4" and rows[6].sites == "C4R4"
    assert rows[0].write == ("span(4,8)",) and rows[5].write == ("span(0,4)",)


def test_uneven_intervals_crowd_around_their_center() -> None:
    """By hand: linspace((-15)^(1/1.2), 35^(1/1.2), 11)^1.2, truncated, plus 15."""
    ends = -(15 ** (1 / 1.2)), 35 ** (1 / 1.2)
    points = [ends[0] + (ends[1] - ends[0]) * j / 10 for j in range(1, 10)]
    by_hand = [15 + int(abs(p) ** 1.2 * (1 if p > 0 else -1)) for p in points]
    found = crowded(50, 10, 15)
    assert found == [0, *by_hand]
    gaps = [b - a for a, b in pairwise(found)]
    assert min(gaps[2:5]) < 5 < gaps[-1], "dense around the center, sparse far from it"
    assert crowded(20, 4, 0)[0] == 0 and len(crowded(20, 4, 0)) == 4
    with pytest.raises(ConfigError, match="center 2 leaves no 10 distinct"):
        crowded(10, 10, 2)


def test_a_stream_that_missed_a_full_step_runs_in_full(model: Denoiser) -> None:
    """FORA is full at 0, 2, 5, 8 of 9; the reference, every second step, misses 5 and 8 and must not reuse step 2's."""
    plan = computed_every(Plan.uniform(model, 9, "euler"), Guidance.cfg(2.0), 2)
    cached = plan.cached(model, "fora", interval=3)
    runs = [s.guidance is not None and s.guidance.against == "null" for s in plan.steps]
    reads = ["C" in (s.compute.sites or "") for s in cached.steps]
    assert runs == [i % 2 == 0 for i in range(9)]
    assert reads == [False, True, False, True, True, False, False, True, False]
    sample(model, cached, [1], [0])


def test_pab_reuses_inside_its_window_by_kind() -> None:
    times = target(20).times
    rows = pab(target(20), attention=2, mlp=3)
    for i, (t, row) in enumerate(zip(times, rows, strict=True)):
        inside = 0.1 < t < 0.8
        expected = ("C" if inside and i % 2 else "R") + ("C" if inside and i % 3 else "R")
        assert parse_sites(row.sites or f"R{SITES}") == expected * BLOCKS
    assert all("C" not in (row.sites or "")[1:2] for row in pab(target(20)))


def test_fastercache_extrapolates_attention_with_weight_a_half() -> None:
    from pliant.compute.reuse import forecast_weights

    rows = fastercache(target(20))
    reused = [i for i, row in enumerate(rows) if "C" in (row.sites or "")]
    assert reused == [i for i, t in enumerate(target(20).times) if t < 0.681 and i % 2]
    assert rows[reused[0]].reuse is not None and rows[reused[0]].reuse.order == 1
    assert forecast_weights(5, (4, 2)) == pytest.approx((1.5, -0.5))


FLUX = [1, 1.211, 1.117, 1.078, 1.0625, 1.039, 1.031, 1.039, 1.023, 1.031, 1.023, 0.980, 1.016, 1.008, 1, 1.008, 1]
FLUX += [1.008, 1, 1, 0.996, 0.996, 0.980, 0.988, 0.965, 0.957, 0.934, 0.891]


def test_ratios_belong_to_gaps() -> None:
    """Resampling keeps the change from the first step to the last, which taking neighbours does not."""
    for steps in (9, 28, 55, 100):
        found = resampled(FLUX, steps)
        assert len(found) == steps and found[0] == 1.0
        assert torch.tensor(found).double().log().sum().item() == pytest.approx(
            torch.tensor(FLUX).double().log().sum().item(), abs=1e-6
        )
    assert resampled(FLUX, 28) == FLUX


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_reusing_nothing_is_plain_sampling_bit_for_bit(model: Denoiser, name: str, guidance: float | None) -> None:
    plan = Plan.uniform(model, STEPS, "euler", guidance=guidance)
    cached = plan.cached(model, name, **EXACT[name])
    assert torch.equal(sample(model, cached, [1, 2], [0, 1]), sample(model, plan, [1, 2], [0, 1]))
    if name not in ("teacache", "fbc", "dbcache", "easycache", "ras", "tome"):
        assert all(step.compute.plain for step in cached.steps), "what nobody reads is not kept"


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun"])
def test_every_preset_runs_saves_and_survives_a_file(model: Denoiser, name: str, solver: str) -> None:
    plan = Plan.uniform(model, STEPS, solver, guidance=2.0)
    cached = plan.cached(model, name, **OPTIONS.get(name, {}))
    assert Plan.from_dict(cached.to_dict()) == cached
    assert cached.provenance["caching"]["name"] == name
    cost = cached.cost(model)
    assert cost.least_flops < plan.cost(model).flops
    out = sample(model, cached, [1, 2], [0, 1])
    base = sample(model, plan, [1, 2], [0, 1])
    assert torch.isfinite(out).all() and (out - base).norm() < 0.5 * base.norm()


@pytest.mark.parametrize("name", ["fora", "taylorseer", "spectrum", "icc", "delta-dit", "magcache"])
def test_image_k_does_not_depend_on_its_batch(model: Denoiser, name: str) -> None:
    plan = Plan.uniform(model, STEPS, "euler", guidance=2.0).cached(model, name, **OPTIONS.get(name, {}))
    together = sample(model, plan, [1, 2, 3], [0, 1, 2])
    torch.testing.assert_close(together[1:2], sample(model, plan, [2], [1]), atol=1e-5, rtol=1e-4)


def test_longer_intervals_stray_further(model: Denoiser) -> None:
    plan = Plan.uniform(model, 24, "euler")
    base = sample(model, plan, [1, 2], [0, 1])
    errors = [
        float((sample(model, plan.cached(model, "fora", interval=n), [1, 2], [0, 1]) - base).norm()) for n in (2, 4, 8)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


# Increments ---------------------------------------------------------------------------------------------------------


def test_increments_of_full_rank_are_the_dense_network(model: Denoiser) -> None:
    """Sheet H, 7: full rank equals dense for any input; rank 0 equals plain reuse of branches; in between, between."""
    plan = Plan.uniform(model, STEPS, "euler", guidance=2.0)
    base = sample(model, plan, [1, 2], [0, 1])
    error = {}
    for rank in (0, 16, 32):
        out = sample(model, plan.cached(model, "icc", interval=3, rank=rank), [1, 2], [0, 1])
        error[rank] = float((out - base).abs().max())
    assert error[32] < 1e-5 < error[16] < error[0]
    reuse = [r if r.sites is None else replace(r, reuse=fora(target(STEPS))[1].reuse) for r in _icc_rows()]
    reuse = [replace(r, write=("branch",)) if r.write else r for r in reuse]
    from pliant.plans.caching.rows import apply_rows

    plain = sample(model, apply_rows(plan, model, reuse), [1, 2], [0, 1])
    ours = sample(model, plan.cached(model, "icc", interval=3, rank=0), [1, 2], [0, 1])
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def _icc_rows() -> Sequence[Row]:
    from pliant.plans.caching.increments import icc

    return icc(target(STEPS), interval=3, rank=0)


def test_increments_cost_their_rank(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    shares = [plan.cached(model, "icc", interval=2, rank=rank).cost(model).share for rank in (0, 2, 8, 1000)]
    assert shares == sorted(shares) and shares[0] < 0.6 and shares[-1] == 1.0


# Plans that change under way ----------------------------------------------------------------------------------------


def test_a_switch_of_the_patch_size_forces_a_full_step(make) -> None:  # type: ignore[no-untyped-def]
    flexible = make("flow", depth=2)
    weak = Compute.of(2, precision="fp32")
    plan = Plan.uniform(flexible, 10, "euler", Compute(precision="fp32"))
    mixed = plan.with_steps(replace(s, compute=weak) if i < 4 else s for i, s in enumerate(plan.steps))
    cached = mixed.cached(flexible, "fora", interval=3)
    assert letters(cached) == "FCCFFCFCCF"  # 0, 3, 6 and 9 by the rule, 4: the first powerful step
    cached = mixed.cached(flexible, "taylorseer", interval=4, order=2)
    assert letters(cached) == "FFCCFFCCCF"  # what the rule calls for at 5 and 9, and the switch at 4
    orders = [s.compute.reuse.order if s.compute.reuse else None for s in cached.steps]
    assert orders == [None, None, 1, 1, None, None, 1, 1, 1, None]
    gated = mixed.cached(flexible, "teacache", threshold=0.5)
    assert letters(gated) == "ggggwggggF"
    sample(flexible, gated, [1], [0])


def test_guidance_that_begins_late_finds_its_own_values(model: Denoiser) -> None:
    plan = Plan.uniform(model, 8, "euler")
    guided = plan.with_steps(replace(s, guidance=Guidance.cfg(2.0)) if i >= 3 else s for i, s in enumerate(plan.steps))
    cached = guided.cached(model, "fora", interval=5)
    assert letters(cached) == "FCFFCCCF"  # 2 by the rule (j = 5), 3: nothing is known of the unconditional stream
    sample(model, cached, [1], [0])


def test_a_reference_call_of_its_own_compute_runs_in_full(make) -> None:  # type: ignore[no-untyped-def]
    flexible = make("flow", depth=2)
    weak = Guidance.weak_model(1.5, Compute.of(2, precision="fp32"))
    plan = Plan.uniform(flexible, 6, "euler", Compute(precision="fp32"), weak)
    cached = plan.cached(flexible, "fora", interval=3)
    assert all(s.guidance == weak for s in cached.steps) and letters(cached) == "FCFCCF"
    sample(flexible, cached, [1], [0])


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("teacash", {}, "did you mean 'teacache'"),
        ("fora", {"intervall": 2}, "did you mean 'interval'"),
        ("fora", {"interval": 0}, "interval is 0"),
        ("fora", {"interval": 2.5}, "interval is 2.5"),
        ("fora", {"interval": 13}, "none would be recomputed"),
        ("fora", {"calibrate": 3}, "nothing to calibrate"),
        ("deepcache", {"blocks": 2}, "nothing is left"),
        ("delta-dit", {"cut": 13}, "cut is 13"),
        ("delta-dit", {"blocks": 4}, "blocks is 4"),
        ("pab", {"low": 0.8, "high": 0.2}, "window"),
        ("pab", {"high": 1.5}, "high is 1.5"),
        ("taylorseer", {"order": 4}, "order is 4"),
        ("taylorseer", {"warmup": 12}, "only 12"),
        ("taylorseer", {"basis": "fourier"}, "basis"),
        ("spectrum", {"window": 0.5}, "window is 0.5"),
        ("spectrum", {"window": 9.0, "warmup": 5}, "none of the 7 steps"),
        ("spectrum", {"ridge": 0.0}, "ridge"),
        ("spectrum", {"blend": 1.5}, "blend"),
        ("teacache", {}, "needs the option 'threshold'"),
        ("teacache", {"threshold": -0.1}, "threshold is -0.1"),
        ("teacache", {"threshold": float("inf")}, "threshold is inf"),
        ("teacache", {"threshold": 0.1, "polynomial": "x"}, "polynomial"),
        ("fbc", {"threshold": 1.0}, "nothing would be recomputed"),
        ("dbcache", {"front": 4}, "nothing is left"),
        ("dbcache", {"front": 1, "mask": "101"}, "mask"),
        ("dbcache", {"front": 1, "warmup": 12}, "only 12"),
        ("dbcache", {"front": 1, "max_run": 0}, "max_run"),
        ("dbcache", {"front": 1, "max_seen": 0.0}, "max_seen"),
        ("easycache", {"warmup": 20}, "only 12"),
        ("magcache", {}, "measure them"),
        ("magcache", {"ratios": [1.0, -1.0]}, "positive number"),
        ("magcache", {"ratios": [1.0, 1.0], "retention": 1.0}, "keeps all"),
        ("l2c", {}, "learn them"),
        ("l2c", {"routers": {"1": "R8"}}, "needs 1, 3, 5, 7, 9, 11"),
        ("l2c", {"routers": {str(i): "C6" for i in range(1, 12, 2)}}, "for 6 sites"),
        ("icc", {"rank": -1}, "rank is -1"),
    ],
)
def test_bad_options_are_refused_when_the_plan_is_made(
    model: Denoiser, name: str, options: dict[str, object], words: str
) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    with pytest.raises(PliantError, match=words):
        with_caching(plan, model, name, **options)  # type: ignore[arg-type]


def test_a_plan_is_cached_once(model: Denoiser) -> None:
    cached = Plan.uniform(model, STEPS, "euler").cached(model, "fora")
    with pytest.raises(PlanError, match="already"):
        cached.cached(model, "teacache", threshold=0.1)


def test_a_cached_plan_is_for_its_number_of_sites(model: Denoiser) -> None:
    step = Plan.uniform(model, STEPS, "euler").cached(model, "fora").steps[1]
    wrong = replace(step, compute=replace(step.compute, sites="C6"))
    plan = Plan((Step(1.0, step.solver, Compute(write=("branch",))), replace(wrong, t=0.5)), model.path)
    with pytest.raises(PlanError, match=r"step 1.*6 sites, this model has 8"):
        plan.check(model)


def test_options_and_names_are_checked_before_anything_runs(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    with pytest.raises(ConfigError, match="no option 'iterations'"):
        plan.cached(model, "l2c", iterations=3)  # an option of the calibration, which was not asked for


# Cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_cost_is_what_runs(model: Denoiser, name: str) -> None:
    """Counted operations of a sampling run lie between the plan's least and most, and are exact for static plans.

    The embedders and modulation tables run once per plan, not once per step, and are left out on both sides.
    """
    from pliant.compute import WITHOUT_CONDITIONING, counted_flops
    from pliant.plans.cost import plan_cost
    from pliant.plans.engine import ModulationTable

    plan = Plan.uniform(model, STEPS, "euler", guidance=2.0).cached(model, name, **OPTIONS.get(name, {}))
    cost = plan_cost(plan, model, WITHOUT_CONDITIONING)
    sample(model, plan, [1], [0])  # low-rank factors are made once
    tables: list[int] = []
    real = ModulationTable.at

    def counted(table: ModulationTable, k: int) -> torch.Tensor:
        out: list[torch.Tensor] = []
        tables.append(counted_flops(lambda: out.append(real(table, k))))
        return out[0]

    patch = pytest.MonkeyPatch()
    patch.setattr(ModulationTable, "at", counted)
    try:
        total = counted_flops(lambda: sample(model, plan, [1], [0])) - sum(tables)
    finally:
        patch.undo()
    least, most = cost.least_flops, cost.flops
    assert least * 0.99 <= total <= most * 1.01, (least, total, most)
    if least == most:
        assert total == pytest.approx(most, rel=0.01)


def test_the_published_rank_follows_the_width(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    by_itself, told = plan.cached(model, "icc"), plan.cached(model, "icc", rank=round(model.config.width / 9))
    assert [s.compute for s in by_itself.steps] == [s.compute for s in told.steps]
    assert by_itself.cost(model).share < 0.9
    assert Target((1.0,), 8).width == 9 * 128
