"""Plans whose steps compute some of the tokens, or merge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pliant.compute import Compute, Merge, Subset
from pliant.compute.subset import choose, token_scores
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PlanError
from pliant.guidance import Guidance, Zero
from pliant.plans import Plan, Sampler, sample
from pliant.plans.calls import calls_of

KEEP = Compute(write=("kv",), precision="fp32")
SOME = Compute(tokens=Subset(0.5), precision="fp32")
RULES = ("cfg", "rescaled", "interval", "weak", "none")


def with_computes(plan: Plan, computes: Sequence[Compute], guidance: Guidance | None = None) -> Plan:
    return plan.with_steps(replace(s, compute=c, guidance=guidance) for s, c in zip(plan.steps, computes, strict=True))


def network_calls(model: Denoiser, plan: Plan, cond: list[int], seeds: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """States after every step, and the active tokens of every step that has some."""
    from pliant.plans.evaluator import Evaluator
    from pliant.plans.sampling import check_labels, start_state
    from pliant.solvers import run

    sampler = Sampler(model, plan)
    evaluate = Evaluator(model, plan, sampler.program, sampler.lowered, check_labels(cond, model))
    x = start_state(sampler.program.start, seeds, model.sample_shape, model.device, model.path)
    states, active = [], []
    with torch.no_grad():
        for result in run(sampler.program, x, evaluate):
            states.append(result.x)
            if evaluate.regions.regions.active is not None:
                active.append(evaluate.regions.regions.active)
    return states, active


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_all_tokens_are_the_dense_sampler_bit_for_bit(make, solver: str, guidance: float | None) -> None:  # type: ignore[no-untyped-def]
    """RAS, check 1."""
    model = make()
    plain = Plan.uniform(model, 6, solver, guidance=guidance)
    whole = plain.cached(model, "ras", ratio=1.0, start=2, resets=(4,))
    assert [s.compute.tokens is not None for s in whole.steps] == [False, False, True, True, False, True]
    assert torch.equal(sample(model, plain, [1, 2]), sample(model, whole, [1, 2]))
    assert whole.cost(model) == plain.cost(model)


def test_a_step_by_hand(make) -> None:  # type: ignore[no-untyped-def]
    """Euler: the active pixels follow the network, the others their last prediction, both streams alike."""
    model = make(learn_sigma=False)
    plan = with_computes(Plan.uniform(model, 3, "euler", guidance=2.0), [KEEP, SOME, SOME], Guidance.cfg(2.0))
    states, active = network_calls(model, plan, [1, 2], [5, 6])
    start = Sampler(model, plan)
    from pliant.plans.noise import seeded_noise

    x = torch.stack([seeded_noise(s, -1, model.sample_shape) for s in (5, 6)])
    t = plan.times
    assert start.program.num_evaluations == 3
    first = (states[0] - x) / (t[1] - t[0])
    want = choose(token_scores(first, (1, 1), "update_std"), torch.zeros(2, 64), Subset(0.5))
    assert torch.equal(active[0], want)
    second = ((states[1] - states[0]) / (t[2] - t[1])).flatten(2)
    kept = torch.ones(2, 64, dtype=torch.bool).scatter(1, want, False)[:, None].expand_as(second)
    torch.testing.assert_close(second[kept], first.flatten(2)[kept], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(second[~kept], first.flatten(2)[~kept], atol=1e-3)
    # The next choice reads the merged field, with one drop for those left out.
    drops = kept[:, 0].float()
    scores = token_scores(second.view_as(first), (1, 1), "update_std")
    agree = (active[1] == choose(scores, drops, Subset(0.5))).float().mean()
    assert float(agree) > 0.95  # the field was divided back here, so nearly equal scores may swap


def test_samples_of_a_batch_have_their_own_tokens(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = Plan.uniform(model, 7, "dpmpp-2m", guidance=1.5).cached(model, "ras", ratio=0.4, start=2, resets=(5,))
    together, active = network_calls(model, plan, [0, 1, 2], [7, 8, 9])
    assert any(not torch.equal(a[0], a[1]) for a in active)
    for k in range(3):
        alone, own = network_calls(model, plan, [k], [7 + k])
        assert all(torch.equal(a[k], b[0]) for a, b in zip(active, own, strict=True))
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[k : k + 1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["heun", "dpm-2s", "rk4"])
def test_solvers_that_evaluate_often_choose_each_time(make, solver: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    try:
        plain = Plan.uniform(model, 5, solver)
    except ConfigError:
        pytest.skip(f"no solver {solver}")
    plan = plain.cached(model, "ras", ratio=0.5, start=2, resets=())
    dense, got = sample(model, plain, [1, 2]), sample(model, plan, [1, 2])
    assert torch.isfinite(got).all() and not torch.equal(dense, got)
    assert plan.cost(model).share < 0.9


def test_interleaved_requests_are_separate(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    base = Plan.uniform(model, 6, "dpmpp-2m", guidance=2.0)
    plans = [
        base.cached(model, "ras", ratio=0.3, start=2, resets=(4,)),
        base.cached(model, "ras", ratio=0.6, start=1, resets=()),
        base.cached(model, "tome", ratio=0.5),
    ]
    alone = [list(Sampler(model, p).steps([1, 2], [3, 4])) for p in plans]
    runs = [Sampler(model, p).steps([1, 2], [3, 4]) for p in plans]
    for k in range(6):
        for r in range(3):
            assert torch.equal(next(runs[r]).x, alone[r][k].x)


@pytest.mark.parametrize("kind", RULES)
def test_guidance_of_every_sort(make, kind: str) -> None:  # type: ignore[no-untyped-def]
    """Rules that look at the whole image see the last prediction of what was not computed; null may come and go."""
    model = make()
    guidance = {
        "cfg": Guidance.cfg(2.0),
        "rescaled": Guidance(2.0, rescale=0.7, rule=Zero()),
        "interval": Guidance.cfg(2.0),
        "weak": Guidance.weak_model(1.5, Compute.of(2, precision="fp32")),
        "none": None,
    }[kind]
    plain = with_computes(Plan.uniform(model, 8, "euler"), [Compute(precision="fp32")] * 8, guidance)
    if kind == "interval":
        plain = plain.with_steps(
            replace(s, guidance=None if i in (1, 2, 3) else guidance) for i, s in enumerate(plain.steps)
        )
    for ratio in (1.0, 0.98):
        plan = plain.cached(model, "ras", ratio=ratio, start=2, resets=())
        got, want = sample(model, plan, [1, 2]), sample(model, plain, [1, 2])
        off = float((got - want).norm() / want.norm())
        # On an interval the two kinds of call share their table of modulations, whose last bits are then others.
        assert off <= (1e-5 if kind == "interval" else 0) if ratio == 1 else 1e-5 < off < 0.2
    if kind == "interval":  # keys of the null stream are needed where guidance comes back
        assert [i for i, s in enumerate(plan.steps) if s.compute.tokens is None] == [0, 1, 4]


def test_guidance_that_begins_late_runs_one_full_step(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plain = Plan.uniform(model, 8, "euler")
    late = Guidance.cfg(2.0)
    plain = plain.with_steps(replace(s, guidance=late if i >= 5 else None) for i, s in enumerate(plain.steps))
    plan = plain.cached(model, "ras", start=2, resets=())
    assert [s.compute.tokens is None for s in plan.steps] == [True, True, False, False, False, True, False, False]
    sample(model, plan, [1])


def test_learned_variance_is_kept_too(make) -> None:  # type: ignore[no-untyped-def]
    model = make("ddpm", flexible=False)
    plan = Plan.uniform(model, 5, "ddpm").cached(model, "ras", ratio=0.5, start=2, resets=())
    assert torch.isfinite(sample(model, plan, [1, 2])).all()


def test_patches_of_several_pixels_and_switches(make) -> None:  # type: ignore[no-untyped-def]
    """Weak patches first: the subset begins anew on the finer grid, after a full step there."""
    model = make()
    steps = list(Plan.uniform(model, 8, "euler").steps)
    steps[:4] = [replace(s, compute=Compute.of(2)) for s in steps[:4]]
    plan = Plan.uniform(model, 8, "euler").with_steps(steps).cached(model, "ras", start=2, resets=())
    assert [s.compute.tokens is None for s in plan.steps] == [True, True, False, False, True, False, False, False]
    assert torch.isfinite(sample(model, plan, [1, 2])).all()


def test_the_ramp_moves_the_share_around_its_mean(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = Plan.uniform(model, 12, "euler").cached(model, "ras", ratio=0.5, start=4, resets=(), ramp=0.1, every=2)
    shares = [s.compute.tokens.ratio for s in plan.steps if s.compute.tokens is not None]  # type: ignore[union-attr]
    assert shares == pytest.approx([0.7, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4])


def test_resets_are_full_and_keep(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = Plan.uniform(model, 28, "euler").cached(model, "ras")
    assert [i for i, s in enumerate(plan.steps) if s.compute.tokens is None] == [0, 1, 2, 3, 12, 20]
    assert [i for i, s in enumerate(plan.steps) if s.compute.write] == [3, 12, 20]
    assert Plan.uniform(model, 28, "euler").cached(model, "ras", resets="12 20").steps == plan.steps
    assert all(calls_of(s)[0].compute.tokens in (None, Subset(0.5)) for s in plan.steps)


def test_merged_plans_cost_less_and_change_the_sample(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plain = Plan.uniform(model, 4, "euler", guidance=2.0)
    merged = plain.cached(model, "tome", ratio=0.5)
    assert merged.cost(model).share < 1
    a, b = sample(model, plain, [1, 2]), sample(model, merged, [1, 2])
    assert not torch.equal(a, b)
    assert torch.equal(b, sample(model, merged, [1, 2]))
    torch.testing.assert_close(b[:1], sample(model, merged, [1]), atol=1e-5, rtol=1e-5)
    assert "50% merged" in merged.describe(model)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ratio": 0.0}, ConfigError, r"step 2 the share .* \(0, 1\]"),
        ({"ratio": 1.5}, ConfigError, r"step 2 the share"),
        ({"ratio": -1}, ConfigError, "ratio is -1"),
        ({"start": 0}, PlanError, "step 0.*start at 1"),
        ({"start": 9}, PlanError, "step 9.*only 6 steps"),
        ({"resets": (7,)}, ConfigError, "a reset is 7"),
        ({"resets": "3 x"}, ConfigError, "a reset is 'x'"),
        ({"metric": "sdt"}, ConfigError, "expected 'std' or 'norm'"),
        ({"sign": 2}, ConfigError, "sign 2"),
        ({"ramp": 0.5, "every": 1}, ConfigError, r"at step \d the share"),
        ({"rato": 0.5}, ConfigError, "ratio"),
    ],
)
def test_bad_options_are_refused(make, options: dict, error: type, words: str) -> None:  # type: ignore[no-untyped-def, type-arg]
    model = make()
    with pytest.raises(error, match=words) as found:
        Plan.uniform(model, 6, "euler").cached(model, "ras", **{"start": 2, **options})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("computes", "words"),
    [
        ([SOME, KEEP, KEEP], r"step 0 \(t=1\): .*keys and values.*write=\[\"kv\"\]"),
        ([KEEP, Compute(), SOME], r"step 2 .*last full step"),
        ([KEEP, Compute(patch=(2, 2), tokens=Subset(0.5)), KEEP], r"step 1 .*same token grid"),
        ([KEEP, Compute(patch=(4, 4), tokens=Merge(0.5, 3)), KEEP], r"step 1 .*windows of 3x3.*2x2 tokens"),
    ],
)
def test_plans_that_cannot_run_are_refused_with_the_step(make, computes: list[Compute], words: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = with_computes(Plan.uniform(model, 3, "euler"), computes)
    with pytest.raises(PlanError, match=words) as error:
        Sampler(model, plan)
    assert "\n" not in str(error.value)


def test_one_channel_has_no_spread(make) -> None:  # type: ignore[no-untyped-def]
    model = make(in_channels=1)
    plan = with_computes(Plan.uniform(model, 2, "euler"), [KEEP, SOME])
    with pytest.raises(PlanError, match=r"step 1 .*use 'update_norm'"):
        plan.check(model)
    own = Plan.uniform(model, 6, "euler").cached(model, "ras", start=2, resets=())
    assert own.steps[2].compute.tokens == Subset(0.5, "update_norm")
    sample(model, own, [1])


def test_another_subset_for_the_reference_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    guidance = Guidance.weak_model(1.5, Compute(tokens=Subset(0.25), precision="fp32"))
    plan = with_computes(Plan.uniform(model, 2, "euler"), [KEEP, SOME])
    plan = plan.with_steps([plan.steps[0], replace(plan.steps[1], guidance=guidance)])
    with pytest.raises(PlanError, match=r"step 1 .*another subset"):
        plan.check(model)
