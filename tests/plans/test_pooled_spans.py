"""Plans whose calls run some depths on averaged tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest
import torch

from pliant.compute import Compute, Gate, LowBand, Pool, Pooled, Reuse, counted_flops
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.models.sparse_span import pooled_span
from pliant.plans import Plan, Sampler, sample
from pliant.plans.schema import plan_schema

POOL = Compute(tokens=Pool.of(2, 4), precision="fp32")


def euler(model, plan: Plan, labels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The plan of a flow model with block 1 of 2 pooled where a step asks for it, by hand."""
    network, grid = model.network, plan.times

    def velocity(z: torch.Tensor, k: int, y: torch.Tensor) -> torch.Tensor:
        times = model.encode(torch.full((len(z),), grid[k], dtype=torch.float64)).float()
        rows = network.modulations(times, y)
        tokens = network.blocks[0](network.embed(z), rows[:, :6])
        few = (4, 4) if plan.steps[k].compute.tokens else (8, 8)
        tokens = pooled_span(lambda v: network.blocks[1](v, rows[:, 6:12]), tokens, (8, 8), few)
        return network.read(tokens, rows)

    for k, step in enumerate(plan.steps):
        value = velocity(x, k, labels)
        if step.guidance is not None:
            null = velocity(x, k, torch.full_like(labels, model.null_label))
            value = null + step.guidance.scale * (value - null)
        x = x + (grid[k + 1] - grid[k]) * value
    return x


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_plan_runs_the_model_s_spans(make, guidance: float | None) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    base = Plan.uniform(model, 4, "euler", guidance=guidance, compute=Compute(precision="fp32"))
    plan = base.with_steps(replace(s, compute=POOL) if i < 2 else s for i, s in enumerate(base.steps))
    labels, x = torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    out = sample(model, plan, labels, x=x)
    torch.testing.assert_close(out, euler(model, plan, labels, x), atol=2e-4, rtol=2e-4)
    assert float((out - sample(model, base, labels, x=x)).abs().max()) > 1e-3
    full, cheap = base.cost(model), plan.cost(model)
    streams = 1 if guidance is None else 2
    assert cheap.step_flops[0] == streams * model.flops(POOL) < full.step_flops[0]
    assert cheap.step_flops[3] == full.step_flops[3]


def test_planned_cost_is_what_is_counted(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False, width=64, depth=3)
    plan = Plan.uniform(model, 3, "euler", compute=Compute(tokens=Pool((Pooled(1, 3, (2, 4)), Pooled(4, 6)))))
    sampler = Sampler(model, plan)
    counted = counted_flops(lambda: sampler([1, 2], [0, 1]))
    assert abs(counted / (2 * plan.cost(model).flops) - 1) < 0.01


def test_files_schema_and_description(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    plan = Plan.uniform(model, 3, "euler", compute=Compute(tokens=Pool((Pooled(0, 1, (4, 4)), Pooled(2, 4)))))
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan
    jsonschema.validate(json.loads((tmp_path / "p.json").read_text()), plan_schema())
    text = plan.describe(model)
    assert "sites 0-0 on 1/16 of tokens" in text and "sites 2-3 on 1/4 of tokens" in text
    trivial = Plan.uniform(model, 3, "euler", compute=Compute(tokens=Pool.of(0, 4, 1)))
    assert trivial == Plan.uniform(model, 3, "euler")


def test_other_caches_and_coarser_calls_in_one_plan(make) -> None:  # type: ignore[no-untyped-def]
    """A step keeps what another reuses beside its averaged tokens; weak patches and scales have their own grid."""
    model = make()
    base = Plan.uniform(model, 4, "euler", guidance=1.5)
    computes = [
        Compute(tokens=Pool.of(0, 2), write=("span(2,4)",)),
        Compute(tokens=Pool.of(0, 2), sites="R2C2", reuse=Reuse("span")),
        Compute(patch=(2, 2), tokens=Pool.of(0, 4)),
        Compute(tokens=Pool.of(0, 2, 4)),
    ]
    plan = base.with_steps(replace(s, compute=c) for s, c in zip(base.steps, computes, strict=True))
    assert bool(torch.isfinite(sample(model, plan, [1, 2])).all())
    flops = plan.cost(model).step_flops
    assert flops[1] < flops[0] and flops[2] < flops[3]
    plain = make(flexible=False)
    scaled = Plan.uniform(plain, 2, "euler", compute=Compute(scale=LowBand.of(2), tokens=Pool.of(0, 4, 4)))
    assert bool(torch.isfinite(sample(plain, scaled, [1, 2])).all())


def test_a_pooled_call_can_be_the_weak_model_of_guidance(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    plan = Plan.uniform(model, 3, "euler", guidance=Guidance(2.0, "weak", Compute(tokens=Pool.of(0, 4))))
    plain = Plan.uniform(model, 3, "euler")
    assert not torch.equal(sample(model, plan, [1, 2]), sample(model, plain, [1, 2]))
    assert plain.cost(model).flops < plan.cost(model).flops < 2 * plain.cost(model).flops


def test_a_gate_around_averaged_tokens_can_be_frozen(make) -> None:  # type: ignore[no-untyped-def]
    """The hit reuses some of the averaged sites and still averages the others; frozen it makes the same image."""
    model = make(flexible=False, depth=4)
    pool = Pool((Pooled(2, 4), Pooled(6, 8)))
    gate = Gate(0.9, "R1C4R3", probe=1, max_run=1)
    compute = Compute(tokens=pool, write=("span(1,5)",), reuse=Reuse("span"), gate=gate, precision="fp32")
    plan = Plan.uniform(model, 16, "euler", guidance=1.5, compute=compute)
    frozen = plan.freeze(model, [1], [0])
    used = [step.compute for step in frozen.steps]
    assert any(c.sites == "R1C4R3" and c.tokens == Pool.of(6, 8) for c in used) and any(c.tokens == pool for c in used)
    assert torch.equal(Sampler(model, frozen)([1], [0]), Sampler(model, plan)([1], [0]))
    assert Plan.from_dict(frozen.to_dict()) == frozen


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (Compute(tokens=Pool.of(0, 4, 3)), r"step 1 .*3x3 tokens, which do not divide this call's grid of 8x8"),
        (Compute(tokens=Pool.of(2, 6)), r"step 1 .*only 4 sites"),
        (Compute(patch=(2, 2), tokens=Pool.of(0, 4, 8)), r"step 1 .*grid of 4x4"),
        (Compute(scale=LowBand.of(2), tokens=Pool.of(0, 4, 8)), r"step 1 .*grid of 4x4"),
        (
            Compute(tokens=Pool.of(0, 2), sites="R2C2", reuse=Reuse("branch")),
            r"step 1 .*the branch of site 2, but no earlier",
        ),
    ],
)
def test_bad_steps_are_named(make, compute: Compute, words: str) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=compute.scale is None)
    base = Plan.uniform(model, 3, "euler")
    plan = base.with_steps(replace(s, compute=compute) if i == 1 else s for i, s in enumerate(base.steps))
    with pytest.raises(PlanError, match=words):
        plan.check(model)


def test_pooled_sites_keep_no_branches(make) -> None:  # type: ignore[no-untyped-def]
    """Reusing one of them later is refused before anything runs."""
    model = make(flexible=False)
    base = Plan.uniform(model, 2, "euler")
    computes = [Compute(tokens=Pool.of(0, 2), write=("branch",)), Compute(sites="C2R2", reuse=Reuse("branch"))]
    plan = base.with_steps(replace(s, compute=c) for s, c in zip(base.steps, computes, strict=True))
    with pytest.raises(PlanError, match=r"step 1 .*the branch of site 0"):
        plan.check(model)
