"""Plans whose calls run on a smaller grid, and models whose width depends on the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pliant.adapters.low_band_denoiser import low_band
from pliant.adapters.width_slicing import width_macs, width_variants
from pliant.compute import Compute, LowBand, Reuse, counted_flops
from pliant.compute.spectra import PowerLaw
from pliant.errors import ConfigError, PlanError
from pliant.guidance import Guidance
from pliant.plans import Plan, Sampler, sample


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m"])
@pytest.mark.parametrize(
    "low", [LowBand.of(2), LowBand.of(2, band="dct", missing="wiener", spectrum=PowerLaw(2.0, 1.5))], ids=repr
)
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_steps_on_a_smaller_grid(make, kind: str, low: LowBand, solver: str) -> None:  # type: ignore[no-untyped-def]
    """The engine's calls are `LowBandDenoiser`'s, guided or not, with any solver."""
    if kind == "ddpm" and solver == "euler":
        solver = "ddim"
    model = make(kind, flexible=False)
    base = Plan.uniform(model, 4, solver)
    computes = [Compute(scale=low, precision="fp32")] * 2 + [Compute(precision="fp32")] * 2
    plan = base.with_steps(replace(s, compute=c) for s, c in zip(base.steps, computes, strict=True))
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    calls = low_band(model, low.ratio, low.band, low.missing, low.spectrum)
    if solver != "heun":  # whose step ends with an evaluation elsewhere
        first = next(Sampler(model, plan).steps(labels, [0, 1], x=x))
        want = calls(x, plan.steps[0].t, labels).to("sample")
        torch.testing.assert_close(first.x0, want, atol=2e-4, rtol=2e-4)
    out = sample(model, plan, labels, x=x)
    assert out.shape == x.shape and bool(torch.isfinite(out).all())
    cost = plan.cost(model)
    assert cost.share < 1 and cost.step_flops[0] == calls.flops() * (2 if solver == "heun" else 1)
    guided = plan.with_steps(replace(s, guidance=Guidance.cfg(2.0)) for s in plan.steps)
    assert not torch.equal(sample(model, guided, labels, x=x), out)


def test_a_ratio_of_one_is_the_plain_call(make) -> None:  # type: ignore[no-untyped-def]
    assert Compute(scale=LowBand.of(1)) == Compute()


def test_scales_survive_files_and_bad_ones_are_named(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    base = Plan.uniform(model, 3, "euler")
    low = LowBand.of(2, band="dct", missing="wiener", spectrum=PowerLaw(2.0, 1.5), positions="center")
    plan = base.with_steps(replace(s, compute=Compute(scale=low)) for s in base.steps)
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan
    assert "scale 1/2 dct wiener" in plan.describe(model)
    wrong = base.with_steps(replace(s, compute=Compute(scale=LowBand.of(3))) for s in base.steps)
    with pytest.raises(PlanError, match=r"step 0 .*no whole number of pixels"):
        wrong.check(model)
    with pytest.raises(ConfigError, match="together with a patch"):
        Compute(patch=(2, 2), scale=LowBand.of(2))


def test_caches_of_another_grid_are_not_read(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    base = Plan.uniform(model, 3, "euler")
    low = LowBand.of(2)
    cheap = Compute(sites="C4", reuse=Reuse("branch"))
    computes = [Compute(scale=low, write=("branch",)), cheap, Compute()]
    plan = base.with_steps(replace(s, compute=c) for s, c in zip(base.steps, computes, strict=True))
    with pytest.raises(PlanError, match=r"step 1 .*same token grid"):
        plan.check(model)
    computes[1] = replace(cheap, scale=low)
    plan = base.with_steps(replace(s, compute=c) for s, c in zip(base.steps, computes, strict=True))
    assert bool(torch.isfinite(sample(model, plan, [1])).all())


@pytest.fixture
def routed(make):  # type: ignore[no-untyped-def]
    """A network whose routers leave something out at some times."""
    import pliant

    model = pliant.route_width(make(flexible=False, heads=4))
    torch.manual_seed(3)
    for router in (model.network.routers.heads, model.network.routers.groups):
        router.linear.weight.data.normal_(std=3.0)
        router.linear.bias.data.zero_()
    for router in model.network.routers.tokens:
        router.fc2.bias.data.fill_(1.0)
    return model


def test_a_routed_width_is_cut_out_at_every_time(routed) -> None:  # type: ignore[no-untyped-def]
    model = routed
    plan = Plan.uniform(model, 6, "euler", compute=Compute(precision="fp32"))
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    times = model.encode(torch.tensor(plan.times[:-1], dtype=torch.float64)).float()
    variants = width_variants(model.network, times)
    assert len({id(v) for v in variants}) > 1, "the routers of this test decide the same everywhere"
    state = x
    grid = plan.times
    for k, network in enumerate(variants):
        rows = model.network.base.modulations(times[k].expand(2), labels)
        state = state + (grid[k + 1] - grid[k]) * network.forward_modulated(state, rows)
    torch.testing.assert_close(sample(model, plan, labels, x=x), state, atol=1e-4, rtol=1e-4)
    cost = plan.cost(model)
    assert list(cost.step_flops) == [2 * width_macs(v) for v in variants]
    with pytest.raises(PlanError, match="routed width"):
        Sampler(model, plan.with_steps(replace(s, compute=Compute(write=("branch",))) for s in plan.steps))


def test_a_full_router_is_the_plain_network(make) -> None:  # type: ignore[no-untyped-def]
    import pliant

    plain = make(flexible=False)
    model = pliant.route_width(plain)
    plan, own = (Plan.uniform(m, 3, "heun", compute=Compute(precision="fp32")) for m in (model, plain))
    torch.testing.assert_close(sample(model, plan, [1, 2]), sample(plain, own, [1, 2]))


def test_counted_flops_of_a_smaller_grid(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    compute = Compute(scale=LowBand.of(2))
    network = model.low_band(compute).coarse.network
    counted = counted_flops(lambda: network(torch.zeros(1, 2, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)))
    assert abs(counted / model.flops(compute) - 1) < 0.01


def test_a_smaller_grid_may_guide(make) -> None:  # type: ignore[no-untyped-def]
    """Guidance against the same network on a smaller grid: c + (s - 1) (c - weak)."""
    model = make("flow", flexible=False)
    weak = Compute(scale=LowBand.of(2), precision="fp32")
    plan = Plan.weak_to_powerful(
        model, 3, weak_steps=0, weak_guidance_steps=3, weak=weak, powerful=Compute(precision="fp32"),
        guidance=2.0, solver="euler",
    )  # fmt: skip
    guidance = plan.steps[0].guidance
    assert guidance is not None and guidance.against == "weak" and guidance.compute == weak
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    first = next(Sampler(model, plan).steps(labels, [0, 1], x=x))
    t = plan.steps[0].t
    full, low = model(x, t, labels).value, low_band(model, 2)(x, t, labels).value
    velocity = full + (guidance.scale - 1.0) * (full - low)
    torch.testing.assert_close(first.x, x + (plan.times[1] - t) * velocity, atol=2e-4, rtol=2e-4)
    with pytest.raises(PlanError, match="as strong as the conditional one"):
        same = Guidance.weak_model(2.0, Compute(precision="fp32"))
        plan.with_steps(replace(s, guidance=same) for s in plan.steps).check(model)
