"""Checks of sheets E and H and bad plans that no other file makes: docs/compute-checks.md lists them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant import Denoiser
from pliant.adapters.low_band import scale_alignment
from pliant.compute import Cache, Compute, Gate, Moment, Reuse, Subset
from pliant.compute.deciding import GateMemory
from pliant.compute.executor import Call
from pliant.compute.lowering import lower
from pliant.compute.scale import LowBand
from pliant.compute.sites import State
from pliant.errors import PlanError, PliantError
from pliant.guidance import Guidance, Memory, Projected
from pliant.models import DiT, DiTConfig
from pliant.models.dit_sites import DiTSites
from pliant.paths import get_path
from pliant.plans import Plan, Sampler, sample
from pliant.plans.guiding import guided_plan
from support.cli import refused, run_here
from support.networks import randomize, tiny_denoiser

SITES = 4
FULL, CHEAP = Compute(write=("branch",)), Compute(sites="C4", reuse=Reuse("branch"))


def planned(model: Denoiser, *computes: Compute, guidance: Guidance | None = None) -> Plan:
    base = Plan.uniform(model, len(computes), "euler")
    return base.with_steps(replace(s, compute=c, guidance=guidance) for s, c in zip(base.steps, computes, strict=True))


def with_exits() -> Denoiser:
    model = pliant.attach_exits(tiny_denoiser(depth=3), [1, 2])
    randomize(model.network, 6, 0.1)
    return model


def routed() -> Denoiser:
    model = pliant.route_width(tiny_denoiser())
    randomize(model.network.routers, 5, 0.6)  # type: ignore[union-attr]
    return model


# Two requests on one model (issue 4, done-when 5) ---------------------------------------------------------------------


def test_requests_in_turn_are_requests_alone() -> None:
    """Every kind of memory at once: two exits, branches, gates, tokens, guidance from memory, a smaller grid."""
    model = with_exits()
    m = 6
    branches = Compute(write=("branch",)), Compute(sites=f"C{m}", reuse=Reuse("branch"))
    gated = Compute(write=(f"span(1,{m})",), reuse=Reuse("span"), gate=Gate(0.3, f"R1C{m - 1}", 1))
    base = Plan.uniform(model, 4, "dpmpp-2m")
    plans = [
        planned(model, *branches, *branches, guidance=Guidance.cfg(2.0)),
        base.with_steps(replace(s, compute=gated) for s in base.steps),
        planned(model, Compute(write=("kv",)), *[Compute(tokens=Subset(0.5, starvation=1.0))] * 3),
        guided_plan(base, Guidance.cfg(2.0), "projected", momentum=-0.5),
        guided_plan(base, Guidance.cfg(2.0), "once"),
        planned(model, Compute(exit=1), Compute(exit=2), Compute(), Compute()),
        planned(model, Compute(scale=LowBand()), Compute(scale=LowBand()), Compute(), Compute()),
    ]
    samplers = [Sampler(model, plan) for plan in plans]
    alone = [list(s.steps([1, 2], [3, 4])) for s in samplers]
    again = [*samplers, *samplers]  # the same sampler twice at once, too
    runs = [s.steps([1, 2], [3, 4]) for s in again]
    for k in range(4):
        for r, run in enumerate(runs):
            assert torch.equal(next(run).x, alone[r % len(plans)][k].x), (k, r)


# Bad plans are refused when checked, with the step (done-when 6) ------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "computes", "words"),
    [
        (tiny_denoiser, [FULL, Compute(sites="R2C2", reuse=Reuse("span"))], r"step 1 .*span\(2,4\).*write="),
        (tiny_denoiser, [FULL, Compute(tokens=Subset(0.5))], r"step 1 .*keys and values"),
        (tiny_denoiser, [FULL, Compute(sites="R6")], r"step 1 .*6 sites, this model has 4"),
        (tiny_denoiser, [FULL, Compute(write=("span(2,6)",))], r"step 1 .*span\(2,6\).*only 4 sites"),
        (tiny_denoiser, [FULL, Compute(scale=LowBand.of(3.0))], "step 1 .*whole number"),
        (tiny_denoiser, [FULL, Compute(scale=LowBand.of(8.0))], "step 1 "),  # no patch fits on one pixel
        # A cache of one depth is not one of another, and a span ends before the exit.
        (with_exits, [Compute(write=("span(1,4)",)), Compute(exit=1, sites="R1C3", reuse=Reuse("span"))], "step 1 "),
        (with_exits, [FULL, Compute(exit=1, write=("span(2,6)",))], r"step 1 .*span\(2,6\).*only 4 sites"),
        (with_exits, [Compute(), Compute(exit=1, sites="R6")], r"step 1 .*6 sites, this model has 4"),
        (routed, [Compute(), FULL], "step 1 .*routed width"),
        (routed, [Compute(), Compute(scale=LowBand())], "step 1 .*routed width"),
        (
            lambda: pliant.flexify(tiny_denoiser(), [4], rank=2),
            [Compute(), replace(FULL, merged=False)],
            "step 1 .*merged adapters",
        ),
        (tiny_denoiser, [Compute(), Compute(write=("increment(8)",), precision="int8d")], "step 1 .*int8d"),
        (tiny_denoiser, [Compute(write=("increment(8)",), precision="bf16-mixed")], "step 0 .*bf16-mixed.* lacks"),
        (tiny_denoiser, [Compute(write=("increment(8)",), precision="0:1=int8d")], "step 0 .*int8d.* lacks"),
        (tiny_denoiser, [Compute(write=("kv",), precision="bf16-compiled")], "step 0 .*not compiled; use .*bf16"),
        (
            tiny_denoiser,
            [Compute(write=("increment(8)",)), Compute(sites="C4", reuse=Reuse("increment", rank=4))],
            r"step 1 .*write=..increment\(4\)",
        ),
    ],
)
def test_refused_when_checked(make: Callable[[], Denoiser], computes: list[Compute], words: str) -> None:
    model = make()
    with pytest.raises(PlanError, match=words) as error:
        planned(model, *computes).check(model)
    assert "\n" not in str(error.value)


def changed(plan: Plan, step: int, field: str, value: object) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(plan.to_dict()))
    *way, last = field.split(".")
    place: Any = data["steps"][step]
    for key in way:
        place = place[key]
    place[last] = value
    return data


GATE = {"threshold": 0.1, "on_hit": "R1C3", "probe": 1}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("compute.sites", "R6", ["step 2", "6 sites", "has 4"]),
        ("compute.sites", 5, ["step 2", "5", "runs such as"]),
        ("compute.sites", "R2C2", ["step 2", "no reuse"]),
        ("compute.reuse", "branch", ["step 2", "reuse is 'branch'"]),
        ("compute.tokens", {"kind": "subset", "ratio": 1.5}, ["step 2", "1.5", "(0, 1]"]),
        ("compute.tokens", {"kind": "merge", "ratio": 0.9}, ["step 2", "0.75"]),
        ("compute.tokens", 0.5, ["step 2", "tokens is 0.5"]),
        ("compute.scale", 2, ["step 2", "scale is 2"]),
        ("compute.gate", {**GATE, "threshold": 1e9}, ["step 2", "never recomputes"]),
        ("compute.gate", {**GATE, "threshold": float("inf")}, ["step 2", "never recomputes"]),
        ("compute.gate", {**GATE, "threshold": float("nan")}, ["step 2", "number >= 0"]),
        ("compute.gate", {**GATE, "accumulate": {}}, ["step 2", "true or false"]),
        ("compute.exit", 1, ["step 2", "no exit"]),
        ("compute.precision", "fp8", ["step 2", "fp8"]),
        ("guidance", {"scale": float("nan")}, ["step 2", "scale nan"]),
        ("guidance", {"scale": "2"}, ["step 2", "scale '2'"]),
        ("guidance", {"scale": 2.0, "rule": {"name": "banded", "low": "x"}}, ["step 2", "low 'x'"]),
        ("guidance", {"scale": 2.0, "rule": "zero"}, ["step 2", "'zero'"]),
        ("compute.gate", {**GATE, "polynomial": ["x"]}, ["step 2", "polynomial ['x']"]),
        ("compute.gate", {**GATE, "max_seen": "x"}, ["step 2", "max_seen 'x'"]),
        ("compute.gate", {**GATE, "max_run": True}, ["step 2", "max_run True"]),
        ("compute.tokens", {"kind": "subset", "ratio": 0.5, "starvation": "x"}, ["step 2", "starvation 'x'"]),
        ("compute.tokens", {"kind": "pool", "spans": ""}, ["step 2", "spans ''"]),
        ("compute.write", "", ["step 2", "write ''"]),
        ("compute.reuse", {"kind": "state", "basis": "chebyshev", "fit": [1]}, ["step 2", "fit [1]"]),
        (
            "compute.reuse",
            {"kind": "state", "basis": "chebyshev", "fit": {"over": 4, "ridge": float("inf")}},
            ["step 2", "ridge inf"],
        ),
        ("compute", "", ["step 2", "compute is ''"]),
        ("guidance", [], ["step 2", "guidance"]),
        ("guidance", {"scale": 2.0, "channels": True}, ["step 2", "channel", "True"]),
        ("t", 1.0, ["time"]),
        ("t", "x", ["step 2", "t is 'x'"]),
        ("t", 3.0, ["times lie between", "step 2"]),
        ("solver.lower_order_final", {}, ["step 2", "lower_order_final"]),
    ],
)
def test_damaged_plan_files_are_one_line(field: str, value: object, words: list[str], tmp_path: Path) -> None:
    """`pliant sample MODEL --plan bad.json`: exit code 2, nothing written."""
    pliant.save(tiny_denoiser(), tmp_path / "model")
    plan = Plan.uniform(pliant.load(tmp_path / "model"), 4, "dpmpp-2m")
    (tmp_path / "bad.json").write_text(json.dumps(changed(plan, 2, field, value)))
    target = tmp_path / "out.png"
    done = run_here("sample", tmp_path / "model", "--plan", tmp_path / "bad.json", "-o", target)
    refused(done, *words)
    assert not target.exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("path", 0, ["path", "0"]),
        ("path", {"name": []}, ["unknown path []"]),
        ("end", float("nan"), ["end nan"]),
        ("end", True, ["end True"]),
        ("version", True, ["version True"]),
        ("model", "", ["'model'", "''"]),
        ("model", {"fingerprint": 0}, ["fingerprint", "0"]),
        ("reset_history_on_switch", "no", ["true or false", "'no'"]),
    ],
)
def test_damaged_plans_are_one_line(field: str, value: object, words: list[str], tmp_path: Path) -> None:
    """The fields of a plan beside its steps."""
    data = Plan.uniform(pliant.load("digits"), 4, "dpmpp-2m").to_dict()
    (tmp_path / "bad.json").write_text(json.dumps({**data, field: value}))
    refused(run_here("sample", "digits", "--plan", tmp_path / "bad.json", "-o", tmp_path / "out.png"), *words)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cache", "nonsense"], ["no caching preset 'nonsense'"]),
        (["--cache", "fora:interval=[1"], ["cannot read the value '[1'"]),
        (["--cache", "magcache:ratios=3"], ["ratios are 3"]),
        (["--cache", "ras:resets=99"], ["reset"]),
        (["--cache", "ras:resets=1.5"], ["resets are 1.5"]),
        (["--cache", "ras:metric=[]"], ["metric is []"]),
        (["--cache", "ras:starvation=x"], ["starvation 'x'"]),
        (["--cache", "ras:starvation=.nan"], ["starvation nan"]),
        (["--cache", "spectrum:ridge=x"], ["ridge 'x'"]),
        (["--cache", "spectrum:blend=null"], ["blend None"]),
        (["--cache", "spectrum:degree=true"], ["degree True"]),
        (["--cache", "dbcache:front=1,warmup=2,max_seen=x"], ["max_seen 'x'"]),
        (["--cache", "dbcache:front=1,warmup=2,basis=nonsense"], ["basis 'nonsense'"]),
        (["--cache", "l2c:routers=3"], ["routers are 3"]),
        (["--cache", "l2c:calibrate=1,iterations=2,lr=-1"], ["lr is -1"]),
        (["--cache", "l2c:calibrate=true"], ["calibrate is True"]),
        (["--cache", "teacache:threshold=0.2,polynomial={}"], ["polynomial is {}"]),
        (["--cache", "teacache:threshold=99"], ["step 0 (t=1)", "never recomputes", "come to 6"]),
        (["--cache", "easycache:warmup=2,threshold=99"], ["step 2 (t=0.75)", "never recomputes"]),
        (["--cache", "magcache:ratios=[1, 1],threshold=9,max_run=99"], ["nothing would be recomputed"]),
        (["--cache", "ras:ratio=2"], ["(0, 1]"]),
        (["--cache", "fora:interval=99"], ["none would be recomputed"]),
        (["--precision", "fp8"], ["unknown precision 'fp8'"]),
        (["--guidance", "nan"], ["scale nan"]),
        (["--guidance", "2", "--guide", "nonsense"], ["unknown way to guide"]),
        (["--guidance", "2", "--guide", "every:period=x"], ["period 'x'"]),
        (["--guidance", "2", "--guide", "every:period=2.5"], ["whole number"]),
        (["--guidance", "2", "--guide", "interval:least=x"], ["least 'x'"]),
        (["--guidance", "2", "--guide", "projected:momentum=x"], ["momentum 'x'"]),
        (["--guidance", "2", "--guide", "projected:radius=1"], ["radius"]),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: list[str]) -> None:
    refused(run_here("plan", "digits", "--steps", "8", *options), *words)


def test_options_take_scientific_numbers() -> None:
    """YAML 1.1 reads 5e-2 as a text."""
    texts = "fbc:threshold=0.05", "fbc:threshold=5e-2"
    plain, short = (run_here("plan", "digits", "--steps", "8", "--cache", text) for text in texts)
    assert plain.code == short.code == 0 and plain.out == short.out


def test_options_take_lists(tmp_path: Path) -> None:
    """TeaCache's coefficients and MagCache's ratios as their papers give them."""
    spec = "teacache:threshold=0.2,polynomial=[2.5, -1e-1, 0]"
    done = run_here("plan", "digits", "--steps", "8", "--cache", spec, "-o", tmp_path / "plan.json")
    assert done.code == 0, done
    gate = Plan.load(tmp_path / "plan.json").steps[0].compute.gate
    assert gate is not None and gate.threshold == 0.2 and gate.polynomial == (2.5, -0.1, 0.0)


# Precisions meet each other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "once", "every", "projected", "zero-star", "banded"])
def test_a_reference_of_another_precision(name: str) -> None:
    """The guidance call in bf16, the conditional one in fp32: nearly what both in fp32 give."""
    model = tiny_denoiser()
    base = Plan.uniform(model, 4, "euler")
    options: dict[str, Any] = {"banded": {"low": 1.5}, "every": {"period": 2}}.get(name, {})
    one = guided_plan(base, Guidance.cfg(2.0, Compute(precision="fp32")), name, **options)
    two = guided_plan(base, Guidance.cfg(2.0, Compute(precision="bf16")), name, **options)
    a, b = sample(model, one, [1, 2]), sample(model, two, [1, 2])
    assert a.dtype == b.dtype == torch.float32
    assert 0 < float((a - b).norm() / a.norm()) < 0.05


@pytest.mark.parametrize(("kept", "read"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "int8d")])
@pytest.mark.parametrize("kind", ["kv", "branch", "span", "out", "drift", "state"])
def test_what_is_kept_in_one_precision_is_read_in_another(kind: str, kept: str, read: str) -> None:
    model = tiny_denoiser()
    if kind == "kv":
        first, second = Compute(write=("kv",)), Compute(tokens=Subset(0.5))
    elif kind == "span":
        first, second = Compute(write=("span(1,4)",)), Compute(sites="R1C3", reuse=Reuse("span"))
    else:
        first, second = Compute(write=(kind,)), Compute(sites="C4", reuse=Reuse(kind))  # type: ignore[arg-type]
    found = [
        sample(model, planned(model, replace(first, precision=a), replace(second, precision=b)), [1, 2])
        for a, b in (("fp32", "fp32"), (kept, read))
    ]
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.1


def test_int8_with_a_gate() -> None:
    """Limits of the threshold: never a hit is the plain int8 network; always hits cost less."""
    model = tiny_denoiser()

    def gated(threshold: float, **limits: int) -> Plan:
        gate = Gate(threshold, "R1C3", 1, **limits)  # type: ignore[arg-type]
        compute = Compute(precision="int8d", write=("span(1,4)",), reuse=Reuse("span"), gate=gate)
        return planned(model, *[compute] * 4, guidance=Guidance.cfg(2.0))

    plain = sample(model, planned(model, *[Compute(precision="int8d")] * 4, guidance=Guidance.cfg(2.0)), [1, 2])
    assert torch.equal(sample(model, gated(0.0), [1, 2]), plain)
    always = gated(float("inf"), max_run=3)
    assert not torch.equal(sample(model, always, [1, 2]), plain)
    assert always.cost(model).least_flops < always.cost(model).flops


def test_int8_of_no_tokens() -> None:
    """DyDiT's token routers may skip the MLP of every token; 8-bit products of nothing are nothing."""
    model = pliant.route_width(tiny_denoiser(), routes=("tokens",))
    for router in model.network.routers.tokens:  # type: ignore[union-attr]
        torch.nn.init.constant_(router.fc2.bias, -1e4)
    a, b = (sample(model, planned(model, Compute(precision=p)), [1]) for p in ("fp32", "int8d"))
    assert float((a - b).norm() / a.norm()) < 0.1


# Exits, caches and guidance together ----------------------------------------------------------------------------------


def test_exits_caches_and_guidance_together(tmp_path: Path) -> None:
    """A shallow call guides a cached one; cost is what runs, and the plan survives its file and the command line."""
    model = with_exits()
    kept = Compute(write=("branch",))
    guidance = Guidance(1.5, "weak", Compute(exit=1))
    plan = planned(model, kept, Compute(sites="C6", reuse=Reuse("branch")), kept, guidance=guidance)
    cost = plan.cost(model)
    weak, full = model.flops(Compute(exit=1)), model.flops()
    assert cost.step_flops[0] == pytest.approx(weak + full) and cost.step_flops[1] < cost.step_flops[0]
    before = sample(model, plan, [1, 2])
    plan.save(tmp_path / "plan.json")
    assert torch.equal(sample(model, Plan.load(tmp_path / "plan.json"), [1, 2]), before)
    # An exit's cache is its own: kept by an exit, read by the same exit only.
    own = Compute(exit=1, write=("branch",)), Compute(exit=1, sites="C4", reuse=Reuse("branch"))
    assert sample(model, planned(model, *own), [1]).isfinite().all()
    with pytest.raises(PliantError, match="step 1 "):
        planned(model, own[0], Compute(exit=2, sites="C6", reuse=Reuse("branch"))).check(model)


# Numbers of the sheets ------------------------------------------------------------------------------------------------


def test_branches_beat_spans_where_gates_move() -> None:
    """Sheet E, 10.4 (3) with a time that moves: kept spans hold old gates, kept branches go through those of now."""
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(2, 2), in_channels=4, width=64, depth=6, heads=4, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config).requires_grad_(False)
    for p in network.parameters():
        p.normal_(std=0.06)

    class Tokens(DiTSites):
        def head(self, state: State, context: Tensor) -> Tensor:
            return state[0].clone()

    sites, steps = Tokens(network), 12
    a, b = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = [
        (a + 0.02 * i * b, network.modulations(torch.full((4,), 502.5 - 5 * i / 11), torch.arange(4)))
        for i in range(steps)
    ]

    def tokens(computes: list[Compute]) -> list[Tensor]:
        cache = Cache(3)
        return [
            Call(lower(c, 12), sites, cache, "net", ("cond",), Moment(i, 1 - i / steps, 0.0))(*seen[i])
            for i, c in enumerate(computes)
        ]

    dense = tokens([Compute()] * steps)
    start = [sites.begin(*inputs)[0][0] for inputs in seen]

    def error(period: int, reuse: Reuse, cheap: str, write: str) -> float:
        """Mean relative error of what the blocks add, over the steps that reuse."""
        full, less = Compute(write=(write,)), Compute(sites=cheap, reuse=reuse)
        plan = [full if i % period == 0 or i <= period * reuse.order else less for i in range(steps)]
        found = [
            float((g - w).norm() / (w - s).norm())
            for g, w, s, c in zip(tokens(plan), dense, start, plan, strict=True)
            if c.reuse is not None
        ]
        return sum(found) / len(found)

    branch = {(n, q): error(n, Reuse("branch", q), "C12", "branch") for n in (2, 3) for q in (0, 1, 2)}
    for n in (2, 3):
        assert branch[n, 0] > branch[n, 1] > branch[n, 2]
        first_block = error(n, Reuse("span"), "R2C10", "span(2,12)")
        rear = error(n, Reuse("span"), "R6C6", "span(6,12)")
        assert first_block > rear > 2 * branch[n, 0]
    assert all(branch[3, q] > branch[2, q] for q in (0, 1, 2))


def test_teacache_s_polynomial_for_flux() -> None:
    """Sheet E, 9: .264 at no change, least .180 at .053, below .25 only for inputs in (.0039, .167)."""
    flux = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    gate = Gate(0.25, "C2", signal="input", reference="last_step", polynomial=flux, accumulate=True)
    then = torch.ones(1, 1, 1)

    def at(d: float) -> float:
        return gate.rescaled(GateMemory(then).changes(then + d)[0])

    assert at(0.0) == pytest.approx(0.264, abs=5e-4)
    values = {d: at(d) for d in (k / 1000 for k in range(1, 200))}
    least = min(values, key=values.__getitem__)
    assert least == pytest.approx(0.053, abs=1.5e-3) and values[least] == pytest.approx(0.180, abs=1e-3)
    assert at(0.0038) > 0.25 > at(0.0041) and at(0.1665) < 0.25 < at(0.1680)


def test_aligned_times() -> None:
    """Sheet H, 0 (3): `a_2(t) = t/(2-t)` and its inverse, by the operator that runs."""
    linear = get_path("linear")

    def aligned(t: float) -> float:
        return float(scale_alignment(linear, "velocity", torch.tensor(t, dtype=torch.float64), 4).time)

    assert aligned(0.92067) == pytest.approx(0.8530, abs=5e-5)
    assert aligned(1.0) == 1.0 and aligned(0.0) == 0.0
    for t in (0.05, 0.3, 0.7, 0.99):
        assert aligned(2 * t / (1 + t)) == pytest.approx(t, abs=1e-12)


def test_purely_perpendicular_guidance_is_perpendicular() -> None:
    """Sheet H, 6: `<out - c, c>` = 0, to rounding."""
    c, u = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    out = Projected(0.0).combine(c, u, 5.0, Memory())
    product, size = ((out - c) * c).flatten(1).sum(1), c.square().flatten(1).sum(1)
    assert bool((product.abs() <= 1e-12 * size).all())
    assert bool(((out - c).flatten(1).norm(dim=1) > 1.0).all())
