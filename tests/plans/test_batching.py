"""Several requests together give what each gives alone, with fewer network passes, and keep out of each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.compute import Compute, Gate, LowBand, Merge, Reuse
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance, Zero
from pliant.models import DiT
from pliant.plans import Batcher, Plan, Request, sample, sample_together, steps_together, together
from pliant.plans.evaluator import Evaluator

FP32 = Compute(precision="fp32")


def alone(model: Denoiser, requests: Sequence[Request]) -> list[Tensor]:
    return [sample(model, r.plan, r.cond, r.seeds, x=r.x, origin=r.origin) for r in requests]


def assert_equal_runs(model: Denoiser, requests: Sequence[Request], **options: int) -> None:
    for got, want in zip(sample_together(model, requests, **options), alone(model, requests), strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def with_computes(plan: Plan, computes: Sequence[Compute], guidance: Guidance | None = None) -> Plan:
    return plan.with_steps(replace(s, compute=c, guidance=guidance) for s, c in zip(plan.steps, computes, strict=True))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of a plain network."""
    seen: list[int] = []
    forward = DiT.forward_modulated

    def counted(self: DiT, x: Tensor, modulations: Tensor) -> Tensor:
        seen.append(len(x))
        return forward(self, x, modulations)

    monkeypatch.setattr(DiT, "forward_modulated", counted)
    return seen


def mixed(model: Denoiser) -> list[Request]:
    """Guided and not, different steps, orders, noise, patch sizes, images."""
    weak = Compute.of(4, precision="fp32")
    two = {"solver": "ddpm"} if model.prediction == "epsilon" else {"solver": "heun"}
    return [
        Request(Plan.uniform(model, 5, "dpmpp-2m", FP32, 2.0), [0, 3], [10, 11]),
        Request(Plan.uniform(model, 3, compute=FP32, **two), [1], [12]),
        Request(Plan.uniform(model, 4, {"name": "ddim", "eta": 1.0}, FP32), [2, 2, 4], [13, 14, 15]),
        Request(Plan.weak_to_powerful(model, 6, 0.6, guidance=1.5, weak=weak), [4], [16]),
        Request(Plan.uniform(model, 2, "dpmpp-2m", weak, Guidance.cfg(3.0)), [3]),
    ]


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_mixtures_equal_separate_runs(make, kind: str, passes: list[int]) -> None:  # type: ignore[no-untyped-def]
    model = make(kind)
    requests = mixed(model)
    alone(model, requests)
    separate = len(passes)
    passes.clear()
    assert_equal_runs(model, requests)
    assert len(passes) - separate < 0.6 * separate  # `assert_equal_runs` makes the separate runs, too
    assert max(passes) > 6


def test_equal_requests_run_as_one_batch(make, passes: list[int]) -> None:  # type: ignore[no-untyped-def]
    """As many passes as one request makes; results by step, in the order of requests."""
    model = make()
    plan = Plan.uniform(model, 4, "euler", FP32, 2.0)
    steps = list(steps_together(model, [Request(plan, [k], [k]) for k in range(3)]))
    assert passes == [6] * 4
    assert [(p.request, p.result.index, p.last) for p in steps] == [(k, i, i == 3) for i in range(4) for k in range(3)]


def test_a_request_alone_is_bit_equal(make) -> None:  # type: ignore[no-untyped-def]
    model = make("ddpm")
    for request in mixed(model):
        assert torch.equal(sample_together(model, [request])[0], alone(model, [request])[0])


def test_requests_without_a_common_network_are_bit_equal(make) -> None:  # type: ignore[no-untyped-def]
    """Different patch sizes and precisions: never the same pass."""
    model = make()
    computes = [FP32, Compute.of(2, precision="fp32"), Compute.of(4, precision="fp32"), Compute(precision="bf16")]
    requests = [Request(Plan.uniform(model, 3, "dpmpp-2m", c), [1, 2], [3, 4]) for c in computes]
    for got, want in zip(sample_together(model, requests), alone(model, requests), strict=True):
        assert torch.equal(got, want)


def test_max_rows_splits_passes(make, passes: list[int]) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = Plan.uniform(model, 2, "euler", FP32)
    requests = [Request(plan, [1, 2], [2 * k, 2 * k + 1]) for k in range(3)] + [Request(plan, [0] * 5)]
    sample_together(model, requests, max_rows=4)
    assert sorted(passes) == [2, 2, 4, 4, 5, 5]
    assert_equal_runs(model, requests, max_rows=4)
    with pytest.raises(PlanError, match="at least 1 row"):
        Batcher(model, max_rows=0)


CACHED = {
    "branch": ([Compute(write=("branch",)), Compute(sites="C4", reuse=Reuse("branch"))] * 3),
    "forecast": [Compute(write=("branch",))] * 2 + [Compute(write=("branch",), sites="R1C3", reuse=Reuse("branch", 1))]
    * 2 + [Compute(sites="R1C3", reuse=Reuse("branch", 1))] * 2,
    "span": ([Compute(write=("span(1,4)",)), Compute(sites="R1C3", reuse=Reuse("span"))] * 3),
    "state": ([Compute(write=("state",)), Compute(sites="C4", reuse=Reuse("state"))] * 3),
    "out": ([Compute(write=("out",)), Compute(sites="C4", reuse=Reuse("out"))] * 3),
    "drift": ([Compute(write=("drift",)), Compute(sites="C4", reuse=Reuse("drift"))] * 3),
    "gate": [Compute(write=("span(1,4)",), reuse=Reuse("span"), gate=Gate(0.3, "R1C3", 1))] * 6,
    "output gate": [Compute(write=("out",), reuse=Reuse("out"), gate=Gate(0.3, "C4", signal="output", reference=
    "last_step"))] * 6,
    "merge": [Compute(tokens=Merge(0.5))] * 6,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CACHED))
def test_cached_requests_keep_their_own_values(make, name: str) -> None:  # type: ignore[no-untyped-def]
    """Same program, one of them guided, offset by a step: a batch of three requests whose histories differ."""
    model = make()
    base = Plan.uniform(model, 6, "dpmpp-2m")
    computes = [replace(c, precision="fp32") for c in CACHED[name]]
    cached = with_computes(base, computes)
    guided = with_computes(base, computes, Guidance.cfg(2.0))
    late = Plan.uniform(model, 7, "dpmpp-2m")
    late = with_computes(late, [computes[0], *computes])
    requests = [
        Request(cached, [1], [3]),
        Request(guided, [2, 4], [4, 5]),
        Request(late, [0], [6]),
        Request(Plan.uniform(model, 4, "euler", FP32), [1], [7]),
    ]
    assert_equal_runs(model, requests)


@pytest.mark.parametrize("preset", ["teacache", "taylorseer", "fora", "ras"])
def test_presets(make, preset: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = Plan.uniform(model, 8, "euler", FP32, 2.0)
    options = {"threshold": 0.1, "polynomial": (1.0, 0.0)} if preset == "teacache" else {}
    cached = plan.cached(model, preset, **options)
    requests = [Request(cached, [1], [1]), Request(cached, [2], [2]), Request(plan, [3], [3])]
    assert_equal_runs(model, requests)


def test_joined_cached_calls_share_passes(make, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Static programs of several requests are one call of the executor, gated ones are not."""
    model = make()
    seen: list[int] = []
    call = together.SiteCall.__call__

    def counted(self, *inputs):  # type: ignore[no-untyped-def]
        seen.append(len(inputs[0]) if inputs else 0)
        return call(self, *inputs)

    monkeypatch.setattr(together.SiteCall, "__call__", counted)
    base = Plan.uniform(model, 6, "euler")
    for name, expected in (("branch", [2] * 6), ("gate", [1] * 12)):
        seen.clear()
        plan = with_computes(base, [replace(c, precision="fp32") for c in CACHED[name]])
        sample_together(model, [Request(plan, [k], [k]) for k in (1, 2)])
        assert seen == expected


def test_guides_exits_still_steps_and_origins(make) -> None:  # type: ignore[no-untyped-def]
    model, guide = make(), make()
    for p in guide.network.parameters():
        p.data.mul_(0.9)
    model = model.autoguided(guide)
    base = Plan.uniform(model, 4, "euler", FP32)
    still = base.with_steps(
        replace(s, guidance=Guidance(2.0, rule=Zero(still=i == 0))) for i, s in enumerate(base.steps)
    )
    origin = torch.randn(1, *model.sample_shape)
    requests = [
        Request(Plan.uniform(model, 4, "euler", FP32, Guidance.auto(1.4)), [1], [1]),
        Request(still, [2], [2]),
        Request(Plan.uniform(model, 3, "euler", FP32, Guidance(1.5, "origin")), [3], [3], origin=origin),
        Request(base, [4], [4], x=torch.randn(1, *model.sample_shape)),
    ]
    assert_equal_runs(model, requests)


def test_low_bands_of_several_requests(make) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    low = Compute(scale=LowBand.of(2), precision="fp32")
    requests = [Request(Plan.uniform(model, n, "euler", low), [n], [n]) for n in (2, 3)]
    assert_equal_runs(model, [*requests, Request(Plan.uniform(model, 3, "euler", FP32), [0], [9])])


@pytest.mark.parametrize(
    ("approach", "patches", "runs"),
    [
        ("separate", (None, 2, 4), []),
        ("rows", (None, 2, 4, 4), ["rows"] * 3),
        ("joined", (None, 2, 4), ["joined"] * 3),
        ("joined", (None, 2, 4, 4), ["rows"] * 3),  # unequal numbers cannot be paired
    ],
)
def test_unmerged_patch_sizes(make, monkeypatch, approach: str, patches, runs: list[str]) -> None:  # type: ignore[no-untyped-def]
    """Different token grids of the same weights: groups, or one packed pass where that is faster."""
    model = make()
    monkeypatch.setattr(together, "choose_packing", lambda *a: approach)
    packed: list[str] = []
    pack = together.packed_forward
    monkeypatch.setattr(together, "packed_forward", lambda n, c, a: packed.append(a) or pack(n, c, a))
    computes = [Compute.of(p, merged=False, precision="fp32") for p in patches]
    # Two steps of the first, three of the second, ...: from the fourth round on a single length is left.
    requests = [Request(Plan.uniform(model, 2 + k, "euler", c), [k], [k]) for k, c in enumerate(computes)]
    assert isinstance(model.network, FlexiDiT)
    assert_equal_runs(model, requests)
    assert packed == runs


def test_int8_rows_share_a_scale_so_requests_do_not_share_passes(make, passes: list[int]) -> None:  # type: ignore[no-untyped-def]
    model = make(flexible=False)
    try:
        plan = Plan.uniform(model, 2, "euler", Compute(precision="int8d"))
        sample(model, plan, [0])
    except PlanError:
        pytest.skip("no 8-bit products on this machine")
    passes.clear()
    requests = [Request(plan, [k], [k]) for k in range(2)]
    together_, separate = sample_together(model, requests), alone(model, requests)
    assert passes[:4] == [1] * 4
    assert all(torch.equal(a, b) for a, b in zip(together_, separate, strict=True))


def test_requests_may_join_late_and_leave_early(make) -> None:  # type: ignore[no-untyped-def]
    model = make("ddpm")
    requests = mixed(model)
    batcher = Batcher(model)
    final: dict[int, Tensor] = {}
    batcher.add(requests[0])
    cancelled = batcher.add(requests[2])
    rounds = 0
    while batcher.waiting:
        if rounds == 2:
            batcher.cancel(cancelled)
            batcher.add(requests[3])
        for progress in batcher.advance():
            if progress.last:
                final[progress.request] = progress.result.x
        rounds += 1
    assert sorted(final) == [0, 2]
    for number, request in ((0, requests[0]), (2, requests[3])):
        (want,) = alone(model, [request])
        assert (final[number] - want).abs().max() <= 1e-5 * want.abs().max()
    with pytest.raises(PlanError, match="request 1 is not waiting"):
        batcher.cancel(cancelled)


@pytest.mark.parametrize("name", ["forecast", "branch", "state"])
def test_a_late_request_forecasts_from_its_own_clock(make, monkeypatch, name: str) -> None:  # type: ignore[no-untyped-def]
    """The same program at the same round, but at different steps of the two requests."""
    model = make()
    plan = with_computes(Plan.uniform(model, 6, "euler"), [replace(c, precision="fp32") for c in CACHED[name]])
    shared: list[tuple[int, ...]] = []
    joint = together.JointCache
    monkeypatch.setattr(
        together, "JointCache", lambda shares: shared.append(tuple(s.moment.step for s in shares)) or joint(shares)
    )
    requests = [Request(plan, [k], [k]) for k in (1, 2)]
    batcher = Batcher(model)
    final: dict[int, Tensor] = {}
    batcher.add(requests[0])
    for round_ in range(8):
        if round_ == (1 if name == "forecast" else 2):
            batcher.add(requests[1])
        final.update({p.request: p.result.x for p in batcher.advance() if p.last})
    assert shared and all(a != b for a, b in shared)
    for k, want in enumerate(alone(model, requests)):
        assert (final[k] - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_bad_request_is_named_before_anything_runs(make, passes: list[int]) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = Plan.uniform(model, 3, "euler", FP32)
    good = Request(plan, [1])
    missing = replace(plan.steps[0], compute=Compute(sites="C4", reuse=Reuse("branch")))
    bad = [
        (Request(plan, [9]), "class 9 does not exist"),
        (Request(plan, [1, 2], [0]), "2 labels need 2 seeds"),
        (Request(plan, []), "nothing to sample"),
        (Request(plan, [1], x=torch.zeros(1, 2, 4, 4)), "start state must be"),
        (Request(plan.with_steps([missing]), [1]), r"step 0 .*reuses the branch"),
        (Request(plan, [1], mu=torch.zeros(1, 2, 8, 8)), "mu is for paths with an offset"),
    ]
    for request, words in bad:
        with pytest.raises(PlanError, match=rf"request 1: .*{words}") as error:
            sample_together(model, [good, request, good])
        assert "\n" not in str(error.value)
    assert passes == []
    assert sample_together(model, []) == []


def test_one_failing_request_does_not_harm_the_others(make, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = make()
    plan = with_computes(Plan.uniform(model, 6, "euler"), CACHED["branch"])
    batcher = Batcher(model)
    for k in range(3):
        batcher.add(Request(plan, [k], [k]))
    finish, calls = Evaluator.finish, []

    def failing(self, x, evaluation, answers):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 5:  # second round, second request
            raise PlanError("no more")
        return finish(self, x, evaluation, answers)

    monkeypatch.setattr(Evaluator, "finish", failing)
    done = batcher.advance()
    with pytest.raises(PlanError, match="request 1: no more"):
        batcher.advance()
    assert batcher.waiting == [0, 2]
    while batcher.waiting:
        done += batcher.advance()
    monkeypatch.undo()
    assert [p.result.index for p in done if p.request == 2] == list(range(6))
    for k in (0, 2):
        want = sample(model, plan, [k], [k])
        got = next(p.result.x for p in done if p.request == k and p.last)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
