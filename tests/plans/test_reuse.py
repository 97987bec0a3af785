"""Plans whose steps keep, reuse or skip parts of the network."""

from __future__ import annotations

from dataclasses import replace

import jsonschema
import pytest
import torch

from pliant.compute import Compute, Gate, Merge, Reuse, Subset
from pliant.errors import PlanError
from pliant.guidance import Banded, Guidance, Projected, Zero
from pliant.plans import Plan, Sampler, sample
from pliant.plans.schema import plan_schema

FULL = Compute(write=("branch",))
CHEAP = Compute(sites="C4", reuse=Reuse("branch"))


GUIDANCES = (
    None,
    Guidance(2.0, rule=Projected(0.1, -0.5, 2.0), rescale=0.7, channels=1),
    Guidance(2.0, "remembered", moderation=0.5),
    Guidance(2.0, "difference", gain=(1.1, 0.9), rule=Banded(1.5)),
    Guidance.auto(1.4),
    Guidance.weak_model(1.4, Compute(sites="R2K2"), rule=Zero()),
)


def with_computes(plan: Plan, computes: list[Compute], guidance: Guidance | None = None) -> Plan:
    return plan.with_steps(
        replace(s, compute=c, guidance=guidance) for s, c in zip(plan.steps, computes, strict=True)
    )


def test_keeping_everything_changes_nothing(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plain = Plan.uniform(model, 4, "heun", guidance=2.0)
    keep = Compute(write=("branch", "span(1,3)", "out"))
    kept = plain.with_steps(replace(s, compute=keep) for s in plain.steps)
    assert torch.equal(sample(model, plain, [1, 2]), sample(model, kept, [1, 2]))
    assert kept.cost(model) == plain.cost(model)


def test_reuse_changes_the_cost_and_the_sample(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plain = Plan.uniform(model, 6, "euler")
    cheap = with_computes(plain, [FULL, CHEAP] * 3)
    a, b = sample(model, plain, [1, 2]), sample(model, cheap, [1, 2])
    assert not torch.equal(a, b)
    assert cheap.cost(model).share < 0.75
    assert cheap.cost(model).full_flops == plain.cost(model).flops


@pytest.mark.parametrize("guided", [False, True])
def test_interleaved_requests_are_separate(make, guided: bool) -> None:  # type: ignore[no-untyped-def]
    """Two requests with different plans on one model, step by step in turn."""
    model = make()
    guidance = Guidance.cfg(2.0) if guided else None
    base = Plan.uniform(model, 6, "dpmpp-2m")
    plans = [
        with_computes(base, [FULL, CHEAP] * 3, guidance),
        with_computes(
            base, [Compute(write=("span(1,4)",), reuse=Reuse("span"), gate=Gate(0.3, "R1C3", 1))] * 6, guidance
        ),
    ]
    alone = [list(Sampler(model, p).steps([1, 2], [3, 4])) for p in plans]
    runs = [Sampler(model, p).steps([1, 2], [3, 4]) for p in plans]
    for k in range(6):
        for r in (0, 1):
            assert torch.equal(next(runs[r]).x, alone[r][k].x)


def test_one_sampler_forgets_between_batches(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = with_computes(Plan.uniform(model, 4, "euler"), [FULL, CHEAP] * 2)
    sampler = Sampler(model, plan)
    first = sampler([1, 2], [3, 4])
    sampler([0], [7])
    assert torch.equal(first, sampler([1, 2], [3, 4]))


def test_guidance_on_an_interval_reads_its_own_stream(make) -> None:  # type: ignore[no-untyped-def]
    """A batch of two streams is kept; the unguided step after it reads the conditional half."""
    model = make()
    base = Plan.uniform(model, 3, "euler")
    steps = list(with_computes(base, [FULL, CHEAP, FULL]).steps)
    steps[0] = replace(steps[0], guidance=Guidance.cfg(1.0))  # guides nowhere, but runs both streams
    mixed = base.with_steps(steps)
    plain = with_computes(base, [FULL, CHEAP, FULL])
    torch.testing.assert_close(sample(model, mixed, [1, 2]), sample(model, plain, [1, 2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("computes", "words"),
    [
        ([CHEAP, FULL, FULL], r"step 0 \(t=1\): reuses the branch of site 0.*write=\[\"branch\"\]"),
        ([FULL, FULL, Compute(sites="R1C3", reuse=Reuse("span"))], r"step 2 .*reuses span\(1,4\)"),
        ([FULL, Compute(sites="C4", reuse=Reuse("branch", 1)), FULL], r"step 1 .*2 times \(it did 1\)"),
        ([Compute(write=("out",)), CHEAP, FULL], r"step 1 .*the branch"),
        ([FULL, Compute(patch=(2, 2), sites="C4", reuse=Reuse("branch")), FULL], r"step 1 .*same token grid"),
        ([FULL, Compute(sites="C6", reuse=Reuse("branch")), FULL], r"step 1 .*'C6' is for 6 sites, this model has 4"),
        ([FULL, Compute(sites="K2"), FULL], r"step 1 .*2 sites, this model has 4"),
        ([Compute(reuse=Reuse("span"), gate=Gate(0.1, "R1C3", 1)), FULL, FULL], r"step 0 .*on a hit of its gate"),
        ([FULL, Compute(tokens=Subset(0.5)), FULL], r"step 1 .*keys and values.*write=\[\"kv\"\]"),
        ([FULL, Compute(exit=1), FULL], r"step 1 .*no exit"),
    ],
)
def test_reads_before_writes_are_refused_with_the_step(make, computes: list[Compute], words: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = with_computes(Plan.uniform(model, 3, "euler"), computes)
    with pytest.raises(PlanError, match=words) as error:
        Sampler(model, plan)
    assert "\n" not in str(error.value)


def test_the_unconditional_stream_must_be_kept_too(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    steps = list(with_computes(Plan.uniform(model, 3, "euler"), [FULL, CHEAP, CHEAP]).steps)
    steps[2] = replace(steps[2], guidance=Guidance.cfg(2.0))
    plan = Plan.uniform(model, 3, "euler").with_steps(steps)
    with pytest.raises(PlanError, match=r"step 2 .*of the unconditional stream"):
        plan.check(model)


def test_plans_survive_files_and_follow_the_schema(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = make()
    computes = [
        Compute(write=("span(1,4)", "kv", "branch")),
        Compute(sites="R1C3", reuse=Reuse("span", 0, "taylor", "logsnr")),
        Compute(write=("out",), reuse=Reuse("span"), gate=Gate(0.1, "R1C3", 1, polynomial=(1, 0.5), max_run=3)),
        Compute(tokens=Merge(0.5)),
        Compute(tokens=Subset(0.25, sign=1)),
        Compute(sites="R2K2"),
    ]
    plan = with_computes(Plan.uniform(model, 6, "euler"), computes)
    steps = [replace(s, guidance=g) for s, g in zip(plan.steps, GUIDANCES, strict=True)]
    plan = plan.with_steps(steps)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    jsonschema.validate(plan.to_dict(), plan_schema())


def test_describe_says_what_runs_and_what_is_reused(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    gate = Compute(write=("span(1,4)",), reuse=Reuse("span"), gate=Gate(0.1, "R1C3", 1))
    plan = with_computes(Plan.uniform(model, 4, "euler"), [FULL, CHEAP, gate, gate])
    text = plan.describe(model)
    assert "reuses branch" in text and "keeps branch" in text and "C4" in text
    assert "or R1C3" in text and "if change < 0.1" in text and "the most it can cost" in text
    cost = plan.cost(model)
    assert cost.least_flops < cost.flops
    assert "runs" not in Plan.uniform(model, 4, "euler").describe(model)


def test_a_plan_may_change_the_precision_between_steps(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Sheet E 11, check 4: exactly the planned variant per step."""
    from pliant.models import precision
    from pliant.models.dit import DiT

    model = make(flexible=False)
    ran: list[str] = []
    for name, dtype in (("spy-a", torch.float32), ("spy-b", torch.bfloat16)):

        def build(network: DiT, name: str = name, dtype: torch.dtype = dtype) -> DiT:
            copy = network.in_dtype(dtype)
            inner = copy.forward_modulated

            def spy(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                ran.append(name)
                return inner(x, rows)

            copy.forward_modulated = spy  # type: ignore[method-assign]
            return copy

        monkeypatch.setitem(precision.VARIANTS, name, build)
    keys = ["spy-a", "spy-b", "spy-b", "spy-a"]
    sample(model, with_computes(Plan.uniform(model, 4, "euler"), [Compute(precision=k) for k in keys]), [1])
    assert ran == keys


def test_an_unknown_precision_is_refused_with_its_step(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = with_computes(Plan.uniform(model, 3, "euler"), [Compute(), Compute(precision="bf61"), Compute()])
    with pytest.raises(PlanError, match=r"step 1 .*did you mean .bf16."):
        plan.check(model)
