"""Gated presets against their published loops written out by hand, and frozen plans against gated ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.compute import Gate
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.models import DiT, DiTConfig
from pliant.models.dit_sites import DiTSites
from pliant.paths import NetworkTime, get_path
from pliant.plans import Plan, sample, sample_steps
from pliant.plans.caching import freeze
from pliant.plans.caching.measure import run_plan
from pliant.plans.noise import seeded_noise

BLOCKS, SITES, STEPS = 4, 8, 16


def build(sign: int = 1) -> Denoiser:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(2, 2), in_channels=2, width=32, depth=BLOCKS, heads=2, num_classes=5,
        learn_sigma=False,
    )  # fmt: skip
    network = DiT(config)
    for p in network.parameters():
        p.data.normal_(std=0.1)
    time = NetworkTime(scale=1000.0) if sign > 0 else NetworkTime.sit()
    return Denoiser(network.requires_grad_(False), get_path("linear"), "velocity", time)


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return build()


def rel(now: Tensor, then: Tensor) -> float:
    return float((now - then).abs().mean() / then.abs().mean())


class ByHand:
    """One stream's network and a published rule on it, one sample."""

    def __init__(self, model: Denoiser, **options: Any) -> None:
        assert isinstance(model.network, DiT)
        self.net, self.model, self.options = model.network, model, options
        self.sites = DiTSites(model.network)
        self.memory: dict[str, Any] = {"total": 0.0, "run": 0, "hits": 0, "seen": 0.0}
        self.hits: list[bool] = []

    def velocity(self, i: int, x: Tensor, t: float, label: int, decided: bool | None = None) -> Tensor:
        time = self.model.encode(torch.tensor([t], dtype=torch.float64)).float()
        context = self.net.modulations(time, torch.tensor([label]))
        state, _ = self.sites.begin(x, context)
        out, hit = self.rule(i, x, state, context, decided)
        self.hits.append(hit)
        return out * self.model.network_time.sign if self.model.network_time.sign < 0 else out

    def run(self, a: int, b: int, state: tuple[Tensor, ...], context: Tensor) -> tuple[Tensor, ...]:
        return self.sites.run(a, b, state, context)

    def rule(self, i: int, x: Tensor, state: Any, context: Tensor, decided: bool | None) -> tuple[Tensor, bool]:
        raise NotImplementedError


class TeaCache(ByHand):
    def rule(self, i, x, state, context, decided):  # type: ignore[no-untyped-def]
        m, o = self.memory, self.options
        u = self.sites.norm(0, state, context)[0]
        hit = False
        if 0 < i < STEPS - 1:
            d = rel(u, m["u"])
            total = 0.0
            for c in o.get("polynomial", (1.0, 0.0)):
                total = total * d + c
            m["total"] += total
            hit = m["total"] < o["threshold"]
        m["u"] = u
        if hit:
            return self.sites.head((state[0] + m["residual"],), context), True
        m["total"] = 0.0
        end = self.run(0, SITES, state, context)
        m["residual"] = end[0] - state[0]
        return self.sites.head(end, context), False


class Blocks(ByHand):
    """First-block cache and DBCache."""

    def rule(self, i, x, state, context, decided):  # type: ignore[no-untyped-def]
        m, o = self.memory, self.options
        first, last = 2 * o.get("front", 1), SITES - 2 * o.get("back", 0)
        probed = self.run(0, first, state, context)
        r = probed[0] - state[0]
        allowed = "r" in m and i >= o.get("warmup", 0)
        allowed = allowed and m["run"] < o.get("max_run", 99) and m["hits"] < o.get("max_hits", 99)
        allowed = allowed and m["seen"] < o.get("max_seen", 1e9)
        hit = False
        if allowed:
            d = rel(r, m["r"])
            m["seen"] += d
            hit = d < o["threshold"]
        if hit:
            m["run"], m["hits"] = m["run"] + 1, m["hits"] + 1
            middle: tuple[Tensor, ...] = (probed[0] + m["middle"],)
        else:
            m["run"], m["r"] = 0, r
            middle = self.run(first, last, probed, context)
            m["middle"] = middle[0] - probed[0]
        return self.sites.head(self.run(last, SITES, middle, context), context), hit


class EasyCache(ByHand):
    def rule(self, i, x, state, context, decided):  # type: ignore[no-untyped-def]
        m, o = self.memory, self.options
        hit = False
        if decided is not None:
            hit = decided
        elif o["warmup"] <= i < STEPS - 1 and "k" in m:
            m["total"] += m["k"] * float((x - m["x"]).abs().mean()) / float(m["out"].abs().mean())
            hit = m["total"] < o["threshold"]
        m["x"] = x
        sign = self.model.network_time.sign
        if hit:
            return sign * (x + m["drift"]), True
        m["total"] = 0.0
        out = self.sites.head(self.run(0, SITES, state, context), context)
        if "out" in m:
            m["k"] = float((out - m["out"]).abs().mean() / (x - m["full_x"]).abs().mean())
        m["out"], m["full_x"], m["drift"] = out, x, sign * out - x
        return out, False


def by_hand(
    rule: Callable[..., ByHand],
    model: Denoiser,
    plan: Plan,
    label: int,
    seed: int,
    shared: bool = False,
    **options: Any,
) -> tuple[Tensor, list[list[bool]]]:
    """The Euler loop, both streams of guided steps; shared: the conditional stream decides for both."""
    x = seeded_noise(seed, -1, model.sample_shape)[None]
    scale = plan.steps[0].guidance.scale if plan.steps[0].guidance else None
    streams = [rule(model, **options)] + ([rule(model, **options)] if scale else [])
    for i, (t, t_next) in enumerate(pairwise(plan.times)):
        v = streams[0].velocity(i, x, t, label)
        if scale is not None:
            decided = streams[0].hits[-1] if shared else None
            u = streams[1].velocity(i, x, t, model.num_classes, decided)
            v = u + scale * (v - u)
        x = x + (t_next - t) * v
    return x, [s.hits for s in streams]


def decisions(plan: Plan, model: Denoiser, labels: list[int], seeds: list[int]) -> list[list[bool]]:
    """Per row of the batch, a decision per step (False where there is no gate)."""
    rows: list[list[bool]] = []
    for d in run_plan(plan, model, labels, seeds).decisions:
        rows = rows or [[False] * len(plan.steps) for _ in d.hit]
        for row, hit in zip(rows, d.hit, strict=True):
            row[d.step] = hit
    return rows


CASES = [
    ("teacache", TeaCache, {"threshold": 0.12}),
    ("teacache", TeaCache, {"threshold": 0.08, "polynomial": (2.0, -0.3, 0.9, 0.002)}),
    ("fbc", Blocks, {"threshold": 0.7}),
    ("dbcache", Blocks, {"threshold": 0.7, "front": 1, "back": 1, "warmup": 4}),
    ("dbcache", Blocks, {"threshold": 0.7, "front": 2, "warmup": 2, "max_run": 2}),
    ("dbcache", Blocks, {"threshold": 0.9, "front": 1, "warmup": 2, "max_hits": 5}),
    ("dbcache", Blocks, {"threshold": 0.9, "front": 1, "warmup": 2, "max_seen": 4.0}),
    ("easycache", EasyCache, {"threshold": 0.25, "warmup": 4}),
]


@pytest.mark.parametrize(("name", "rule", "options"), CASES)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_gates_decide_as_published(
    model: Denoiser, name: str, rule: type[ByHand], options: dict[str, Any], guidance: float | None
) -> None:
    plan = Plan.uniform(model, STEPS, "euler", guidance=guidance)
    cached = plan.cached(model, name, **options)
    x, expected = by_hand(rule, model, plan, 2, 7, shared=name == "easycache", **options)
    found = decisions(cached, model, [2], [7])
    assert found == expected
    assert 0 < sum(map(sum, found)) < sum(map(len, found)), "both outcomes must occur, or nothing was tested"
    torch.testing.assert_close(sample(model, cached, [2], [7]), x, atol=1e-4, rtol=1e-3)


def test_the_drift_means_the_same_for_a_network_of_the_other_sign() -> None:
    """SiT's networks predict minus our velocity."""
    other = build(-1)
    plan = Plan.uniform(other, STEPS, "euler")
    cached = plan.cached(other, "easycache", threshold=0.25, warmup=4)
    x, expected = by_hand(EasyCache, other, plan, 2, 7, threshold=0.25, warmup=4)
    assert decisions(cached, other, [2], [7]) == expected and any(expected[0])
    torch.testing.assert_close(sample(other, cached, [2], [7]), x, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["teacache", "fbc", "dbcache"])
def test_streams_decide_for_themselves(model: Denoiser, name: str) -> None:
    """With strong guidance the streams of a sample come to differ, and rows of a batch do as single runs."""
    options = {"teacache": {"threshold": 0.08}, "fbc": {"threshold": 0.5}}.get(name, {"threshold": 0.7, "front": 2})
    plan = Plan.uniform(model, STEPS, "euler", guidance=6.0).cached(model, name, **options, **_warm(name))
    together = decisions(plan, model, [2, 4], [7, 8])
    alone = [decisions(plan, model, [y], [s]) for y, s in ((2, 7), (4, 8))]
    assert together == [alone[0][0], alone[1][0], alone[0][1], alone[1][1]]
    assert len({tuple(row) for row in together}) > 1


def _warm(name: str) -> dict[str, int]:
    return {"warmup": 2} if name == "dbcache" else {}


MIXED = [
    ("teacache", {"threshold": 0.08}),
    ("fbc", {"threshold": 0.7}),
    ("dbcache", {"threshold": 0.7, "front": 2, "warmup": 2, "order": 1}),
    ("easycache", {"threshold": 0.4, "warmup": 4}),
]


@pytest.mark.parametrize(("name", "options"), MIXED)
def test_rows_that_disagree_are_what_they_are_alone(model: Denoiser, name: str, options: dict[str, Any]) -> None:
    """Sheet E, 10.4, check 7, through whole guided plans."""
    plan = Plan.uniform(model, STEPS, "euler", guidance=3.0).cached(model, name, **options)
    labels, seeds = [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]
    assert len({tuple(row) for row in decisions(plan, model, labels, seeds)}) > 1
    alone = torch.cat([sample(model, plan, [y], [s]) for y, s in zip(labels, seeds, strict=True)])
    torch.testing.assert_close(sample(model, plan, labels, seeds), alone, atol=1e-4, rtol=1e-3)


def test_two_interleaved_requests_are_what_they_are_alone(model: Denoiser) -> None:
    """Nothing is kept in the model: requests with different presets may take turns."""
    plans = [
        Plan.uniform(model, STEPS, "euler", guidance=3.0).cached(model, name, **options)
        for name, _, options in (CASES[0], CASES[7])
    ]
    alone = [sample(model, plan, [2], [7]) for plan in plans]
    turns = [sample_steps(model, plan, [2], [7]) for plan in plans]
    last = [None, None]
    for results in zip(*turns, strict=True):
        last = [r.x for r in results]
    assert all(torch.equal(a, b) for a, b in zip(last, alone, strict=True))


def test_guidance_that_begins_late_starts_its_stream_in_full(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    late = plan.with_steps(
        replace(s, guidance=Guidance.cfg(3.0)) if i >= 5 else s for i, s in enumerate(plan.steps)
    ).cached(model, "teacache", threshold=3.0)
    votes = [(d.step, d.streams, d.hit) for d in run_plan(late, model, [2], [7]).decisions]
    assert votes[4] == (4, ("cond",), (True,))
    assert votes[5] == (5, ("cond", "null"), (False, False))
    assert votes[6] == (6, ("cond", "null"), (True, True))
    frozen = late.freeze(model, [2], [7])
    assert torch.equal(sample(model, frozen, [2], [7]), sample(model, late, [2], [7]))


def test_first_and_last_steps_are_protected(model: Denoiser) -> None:
    plan = Plan.uniform(model, STEPS, "euler")
    for name, options, first in (
        ("teacache", {"threshold": 8.0}, 1),
        ("easycache", {"threshold": 4.0, "warmup": 5}, 5),
    ):
        hits = decisions(plan.cached(model, name, **options), model, [1], [0])[0]
        assert hits == [False] * first + [True] * (STEPS - first - 1) + [False], name
    masked = plan.cached(model, "dbcache", front=1, threshold=100.0, max_run=16, mask="1100100010001001")
    hits = decisions(masked, model, [1], [0])[0]
    assert [i for i, hit in enumerate(hits) if not hit] == [0, 1, 4, 8, 12, 15]


def test_a_warm_up_is_remembered(model: Denoiser) -> None:
    """The step after the warm-up can reuse at once: the warm-up's last full step is its reference."""
    plan = Plan.uniform(model, STEPS, "euler")
    hits = decisions(plan.cached(model, "dbcache", front=1, threshold=0.99, warmup=3), model, [1], [0])[0]
    assert hits[:4] == [False, False, False, True]


def test_references_differ(model: Denoiser) -> None:
    """The published loop above compares with the last full step; comparing with the last step decides otherwise."""
    cached = Plan.uniform(model, STEPS, "euler").cached(model, "fbc", threshold=0.7)
    stepwise = cached.with_steps(
        replace(s, compute=replace(s.compute, gate=replace(s.compute.gate, reference="last_step")))
        for s in cached.steps
        if s.compute.gate is not None
    )
    assert decisions(stepwise, model, [2], [7]) != decisions(cached, model, [2], [7])


# Frozen -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule", "options"), CASES)
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m"])
def test_a_frozen_plan_makes_the_same_image_bit_for_bit(
    model: Denoiser, name: str, rule: type[ByHand], options: dict[str, Any], guidance: float | None, solver: str
) -> None:
    gated = Plan.uniform(model, STEPS, solver, guidance=guidance).cached(model, name, **options)
    frozen = gated.freeze(model, [2], [7])
    frozen.check(model)
    assert all(s.compute.gate is None for s in frozen.steps)
    assert torch.equal(sample(model, frozen, [2], [7]), sample(model, gated, [2], [7]))
    assert frozen.cost(model).flops == frozen.cost(model).least_flops < gated.cost(model).flops
    assert Plan.from_dict(frozen.to_dict()) == frozen


def test_a_frozen_plan_is_what_the_majority_does(model: Denoiser) -> None:
    gated = Plan.uniform(model, STEPS, "euler").cached(model, "teacache", threshold=0.08)
    labels, seeds = [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]
    rows = decisions(gated, model, labels, seeds)
    assert len({tuple(row) for row in rows}) > 1
    frozen = freeze(gated, model, labels, seeds, batch_size=2)  # batches do not matter
    found = ["C" in (s.compute.sites or "") for s in frozen.steps]
    assert found == [sum(column) * 2 > len(column) for column in zip(*rows, strict=True)]
    assert frozen.provenance["frozen"]["samples"] == 5


def test_a_plan_without_gates_is_not_frozen(model: Denoiser) -> None:
    with pytest.raises(PlanError, match="no gates"):
        Plan.uniform(model, STEPS, "euler").cached(model, "fora").freeze(model, [1])


# What gates refuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": float("inf")}, "never recomputes"),
        ({"threshold": 0.1, "max_hits": 0}, "max_hits"),
        ({"threshold": 0.1, "max_seen": -1.0}, "max_seen"),
        ({"threshold": 0.1, "comparison": "=="}, "comparison"),
        ({"threshold": 0.1, "deciders": "null"}, "deciders"),
        ({"threshold": 0.1, "signal": "output"}, "no probe"),
    ],
)
def test_gates_are_checked(options: dict[str, Any], words: str) -> None:
    from pliant.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        Gate(**{"on_hit": "R2C6", "probe": 2, **options})


def test_a_change_of_exactly_the_threshold(model: Denoiser) -> None:
    """diffusers' first-block cache reuses it, cache-dit's DBCache and TeaCache do not."""
    plan = Plan.uniform(model, STEPS, "euler")
    for name, options, passes in (
        ("fbc", {"threshold": 0.25}, True),
        ("dbcache", {"threshold": 0.25, "front": 1, "warmup": 1}, False),
        ("teacache", {"threshold": 0.25}, False),
        ("easycache", {"threshold": 0.25, "warmup": 2}, False),
    ):
        gate = plan.cached(model, name, **options).steps[4].compute.gate  # type: ignore[arg-type]
        assert gate is not None
        assert (gate.passes(0.2499), gate.passes(0.25), gate.passes(0.2501)) == (True, passes, False), name
