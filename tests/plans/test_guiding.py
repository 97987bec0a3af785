"""Guidance in plans: where references come from, what is called, what it costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PlanError
from pliant.guidance import Guidance, Projected, Zero
from pliant.models import DiT
from pliant.plans import Plan, Sampler, sample
from pliant.plans.guiding import cfg_plus_plus, computed_every, computed_once, guided_between, guided_plan, zero_star


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every network call."""
    rows: list[int] = []
    inner = DiT.forward_modulated

    def counting(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        rows.append(len(x))
        return inner(self, x, modulations)

    monkeypatch.setattr(DiT, "forward_modulated", counting)
    return rows


def by_hand(model: Denoiser, plan: Plan, labels: Tensor, x: Tensor, reference) -> Tensor:  # type: ignore[no-untyped-def]
    """Euler on the linear path, with the guided velocity of `reference(i, x, t, conditional)`."""
    times = plan.times
    for i, step in enumerate(plan.steps):
        c = model(x, step.t, labels).value
        g = step.guidance
        v = c if g is None else (lambda u, s=g.scale: u + s * (c - u))(reference(i, x, step.t, c))
        x = x + (times[i + 1] - step.t) * v
    return x


def test_the_interval_holds_its_ends(make) -> None:  # type: ignore[no-untyped-def]
    """As in the published code: steps that start at a noise ratio of exactly 1 or 3 are guided."""
    model = make(flexible=False)
    plan = Plan.uniform(model, 4, "euler")
    guided = guided_between(plan, Guidance.cfg(2.0), 1.0, 3.0)
    assert [s.t for s in guided.steps if s.guidance is not None] == [0.75, 0.5]


def test_no_reference_calls_outside_the_interval(make, counted: list[int]) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    plan = guided_between(Plan.uniform(model, 10, "euler"), Guidance.cfg(3.0), 0.283, 1.609)
    inside = [s.guidance is not None for s in plan.steps]
    assert inside == [0.22 <= s.t <= 0.62 for s in plan.steps] and 0 < sum(inside) < 10
    counted.clear()
    sample(model, plan, [1, 2])
    assert counted == [4 if here else 2 for here in inside]
    assert plan.cost(model).calls == 10 + sum(inside)


def test_still_steps_call_nothing_and_move_nothing(make, counted: list[int]) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    plan = zero_star(Plan.uniform(model, 25, "euler"), Guidance.cfg(3.0))
    assert [s.guidance.still for s in plan.steps if s.guidance] == [True] + [False] * 24
    counted.clear()
    x = torch.randn(1, 2, 8, 8)
    states = [r.x for r in Sampler(model, plan).steps([1], [0], x=x)]
    assert torch.equal(states[0], x) and not torch.equal(states[1], x)
    assert counted == [2] * 24
    assert plan.cost(model).step_flops[0] == 0


def test_the_remembered_negative_is_the_virtual_one(make, counted: list[int]) -> None:  # type: ignore[no-untyped-def]
    """One unconditional call; later references say that the clean data is what it saw."""
    model = make(flexible=False)
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    plan = computed_once(Plan.uniform(model, 5, "euler"), Guidance.cfg(2.0))
    counted.clear()
    got = sample(model, plan, labels, x=x)
    assert counted == [4, 2, 2, 2, 2] and plan.cost(model).calls == 6
    clean: list[Tensor] = []

    def reference(i: int, x: Tensor, t: float, c: Tensor) -> Tensor:
        if i == 0:
            u = model(x, t, torch.full_like(labels, model.null_label)).value
            clean.append(x - t * u)
            return u
        return (x - clean[0]) / t

    torch.testing.assert_close(got, by_hand(model, plan, labels, x, reference), atol=1e-4, rtol=1e-4)


def test_the_origin_as_negative(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    labels, x, origin = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    base = Plan.uniform(model, 4, "euler")
    plan = base.with_steps(replace(s, guidance=Guidance(1.7, "origin")) for s in base.steps)
    want = by_hand(model, plan, labels, x, lambda i, x, t, c: (x - origin) / t)
    torch.testing.assert_close(sample(model, plan, labels, x=x, origin=origin), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(PlanError, match="pass origin="):
        sample(model, plan, labels)
    with pytest.raises(PlanError, match="states' shape"):
        sample(model, plan, labels, origin=origin[:, :1])


def test_the_difference_is_reused_and_never_compounds(make, counted: list[int]) -> None:  # type: ignore[no-untyped-def]
    """Sheet E 9, defect 2: 1.1 stays 1.1 at every reused step."""
    model = make(flexible=False)
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    plan = computed_every(Plan.uniform(model, 6, "euler"), Guidance.cfg(2.0), 3, gain=(1.1, 1.1))
    counted.clear()
    got = sample(model, plan, labels, x=x)
    assert counted == [4, 2, 2, 4, 2, 2]
    kept: list[Tensor] = []

    def reference(i: int, x: Tensor, t: float, c: Tensor) -> Tensor:
        if i % 3 == 0:
            u = model(x, t, torch.full_like(labels, model.null_label)).value
            kept.append(c - u)
            return u
        return c - 1.1 * kept[-1]

    torch.testing.assert_close(got, by_hand(model, plan, labels, x, reference), atol=1e-4, rtol=1e-4)


def test_fastercache_s_windows(make) -> None:  # type: ignore[no-untyped-def]
    """Its rule as diffusers states it, in time steps of 1000: skip where iteration % 5 != 0 inside (-1, 641); gains of
    1.1 on low frequencies inside (99, 901), on high ones inside (-1, 301)."""
    model = make(flexible=False)
    plan = guided_plan(Plan.uniform(model, 40, "euler"), Guidance.cfg(2.0), "fastercache")
    reused = 0
    for iteration, step in enumerate(plan.steps):
        timestep, guidance = 1000 * step.t, step.guidance
        assert guidance is not None
        skips = iteration > 0 and -1 < timestep < 641 and iteration % 5 != 0
        assert (guidance.against == "difference") == skips
        if skips:
            reused += 1
            assert guidance.gain == (1.1 if 99 < timestep < 901 else 1.0, 1.1 if -1 < timestep < 301 else 1.0)
    assert reused > 15 and len({s.guidance.gain for s in plan.steps if s.guidance is not None}) == 4
    labels = torch.tensor([1, 2])
    assert bool(sample(model, plan, labels).isfinite().all())
    once = model.flops()
    assert plan.cost(model).flops == (2 * 40 - reused) * once
    with pytest.raises(PlanError, match="at least 1"):
        guided_plan(plan, Guidance.cfg(2.0), "fastercache", period=0)


def test_reusing_every_step_is_plain_guidance(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    plain = Plan.uniform(model, 4, "heun", guidance=2.0)
    assert computed_every(plain, Guidance.cfg(2.0), 1) == plain


def test_another_network_guides(make, counted: list[int]) -> None:  # type: ignore[no-untyped-def]
    model, worse = make(flexible=False), make(flexible=False, depth=1)
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    base = Plan.uniform(model, 4, "euler")
    plan = base.with_steps(replace(s, guidance=Guidance.auto(1.5)) for s in base.steps)
    with pytest.raises(PlanError, match=r"step 0 .*has none"):
        plan.check(model)
    both = model.autoguided(worse)
    want = by_hand(model, plan, labels, x, lambda i, x, t, c: worse(x, t, labels).value)
    torch.testing.assert_close(sample(both, plan, labels, x=x), want, atol=1e-4, rtol=1e-4)
    one, other = model.flops(), worse.flops()
    assert plan.cost(both).flops == 4 * (one + other)
    with pytest.raises(ConfigError, match="same states and classes"):
        model.autoguided(make(flexible=False, num_classes=7))


def test_projection_works_on_clean_data_estimates(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    base = Plan.uniform(model, 3, "euler")
    plan = base.with_steps(replace(s, guidance=Guidance.cfg(3.0, rule=Projected())) for s in base.steps)
    null = torch.full_like(labels, model.null_label)
    state, times = x, plan.times
    for i in range(3):
        t = times[i]
        c, u = (state - t * model(state, t, y).value for y in (labels, null))
        d = c - u
        along = ((d * c).sum((1, 2, 3)) / (c * c).sum((1, 2, 3))).view(-1, 1, 1, 1) * c
        clean = c + 2.0 * (d - along)
        state = state + (times[i + 1] - t) * (state - clean) / t
    torch.testing.assert_close(sample(model, plan, labels, x=x), state, atol=1e-4, rtol=1e-4)


def test_a_weaker_call_of_any_kind_guides(make) -> None:  # type: ignore[no-untyped-def]
    """Skipped sites are a worse model of the same condition; the same call is not."""
    model = make(flexible=False)
    base = Plan.uniform(model, 3, "euler")
    skip = Guidance.weak_model(1.5, Compute(sites="R2K2"))
    plan = base.with_steps(replace(s, guidance=skip) for s in base.steps)
    assert plan.cost(model).flops < 2 * base.cost(model).flops
    assert not torch.equal(sample(model, plan, [1]), sample(model, base, [1]))
    for same in (Compute(), Compute(patch=(1, 1))):
        nowhere = base.with_steps(replace(s, guidance=Guidance.weak_model(1.5, same)) for s in base.steps)
        with pytest.raises(PlanError, match="guides nowhere"):
            nowhere.check(model)


@pytest.mark.parametrize("against", ["remembered", "difference"])
def test_memory_needs_something_to_remember(make, against: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    base = Plan.uniform(model, 3, "euler")
    plan = base.with_steps(replace(s, guidance=Guidance(2.0, against)) for s in base.steps)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"step 0 .*earlier step that computes"):
        plan.check(model)


def test_bad_guiding_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    model, ddpm = make(), make("ddpm")
    plan = Plan.uniform(model, 5, "euler")
    with pytest.raises(PlanError, match="empty"):
        guided_between(plan, Guidance.cfg(2.0), 2.0, 1.0)
    with pytest.raises(PlanError, match="no step starts"):
        guided_between(plan, Guidance.cfg(2.0), 1e-9, 1e-8)
    with pytest.raises(PlanError, match="some step must move"):
        zero_star(plan, Guidance.cfg(2.0), still=5)
    with pytest.raises(PlanError, match="at least 1"):
        computed_every(plan, Guidance.cfg(2.0), 0)
    other = Plan.uniform(ddpm, 5, "ddim")
    with pytest.raises(PlanError, match=r"step 0 .*zero velocity"):
        zero_star(other, Guidance.cfg(2.0), still=1).check(ddpm)
    still = Guidance.cfg(2.0, rule=Zero(still=True))
    assert Guidance.from_dict(still.to_dict()) == still


def test_ways_to_guide_by_name(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan, g = Plan.uniform(model, 6, "euler"), Guidance.cfg(2.0)
    named = guided_plan(plan, g, "every", period=2)
    assert named.steps == computed_every(plan, g, 2).steps
    assert named.provenance["guiding"] == {"name": "every", "period": 2}
    projected = guided_plan(plan, g, "projected", momentum=-0.5, rescale=0.7)
    assert projected.steps[3].guidance == Guidance.cfg(2.0, rule=Projected(momentum=-0.5), rescale=0.7)
    for name, options, words in (
        ("intervall", {}, "did you mean 'interval'"),
        ("every", {"periode": 2}, "takes period, first, gain"),
        ("projected", {"moment": 1}, "projected"),
    ):
        with pytest.raises(PlanError, match=words):
            guided_plan(plan, g, name, **options)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_cfg_plus_plus_is_the_published_step(make, strength: float) -> None:  # type: ignore[no-untyped-def]
    """x_s = (1-s) x0 + s n_u, with n_u = x + (1-t) u and x0 = x - t (u + strength (c - u)), on the linear path."""
    model = make(flexible=False)
    full = Compute(precision="fp32")
    plan = cfg_plus_plus(Plan.uniform(model, 5, "euler", compute=full), Guidance.cfg(7.0), strength)
    labels, null = torch.tensor([1, 2]), torch.full((2,), model.null_label)
    start = x = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    for t, s in pairwise(plan.times):
        c, u = model(x, t, labels).value, model(x, t, null).value
        clean, noise = x - t * (u + strength * (c - u)), x + (1 - t) * u
        x = (1 - s) * clean + s * noise
    torch.testing.assert_close(sample(model, plan, labels, x=start), x, atol=2e-5, rtol=2e-5)


def test_cfg_plus_plus_is_for_first_order_steps(make) -> None:  # type: ignore[no-untyped-def]
    model, ddpm = make(flexible=False), make("ddpm", flexible=False)
    scales = [s.guidance.scale for s in cfg_plus_plus(Plan.uniform(ddpm, 20, "ddim"), Guidance.cfg(3.0), 0.6).steps]
    assert all(g >= 0.6 for g in scales) and scales[-1] == pytest.approx(0.6) and max(scales) > 1.5
    assert guided_plan(Plan.uniform(model, 4, "ddim"), Guidance.cfg(3.0), "cfg++", strength=1).steps[0].guidance
    for bad, words in (("dpmpp-2m", "ddim"), ("heun", "ddim")):
        with pytest.raises(PlanError, match=words):
            cfg_plus_plus(Plan.uniform(model, 4, bad), Guidance.cfg(3.0))
    with pytest.raises(PlanError, match="0 to 1"):
        cfg_plus_plus(Plan.uniform(model, 4, "ddim"), Guidance.cfg(3.0), 1.5)
    with pytest.raises(PlanError, match="unconditional"):
        cfg_plus_plus(Plan.uniform(model, 4, "ddim"), Guidance.auto(3.0))
