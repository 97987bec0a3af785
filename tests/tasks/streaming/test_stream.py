"""The stream batch against sequential runs, the library's sampler, and formulas written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from pliant import Denoiser, Plan
from pliant.compute import Compute
from pliant.errors import ConfigError, PlanError, ShapeError
from pliant.guidance import Guidance
from pliant.paths import NetworkTime
from pliant.plans import Sampler
from pliant.tasks.streaming import (
    RENOISE,
    SimilarityFilter,
    Stream,
    StreamBatch,
    StreamGuidance,
    even_levels,
    levels_plan,
    process,
)
from support.networks import randomize, tiny_denoiser

LEVELS = (0.8, 0.6, 0.35, 0.2)
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def frames(count: int, seed: int = 0, channels: int = 2) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rowwise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A prediction that mixes nothing: sums, products and quotients of a row's own numbers."""
    t, y = t[:, None, None, None], y[:, None, None, None]
    return x * (1.5 - t) / (1.0 + x * x) + 0.1 * y * x + 0.05 * t


def with_rule(rule: Rule, path: str = "linear", prediction: Any = "velocity") -> Denoiser:
    """A denoiser whose network is a formula of (states, house times, labels)."""
    made = replace(tiny_denoiser(path=path, prediction=prediction), network_time=NetworkTime())
    return made.through(rule)


def same(found: Tensor, wanted: Tensor, share: float) -> None:
    """Equal to float32 rounding: a share of the largest value (random networks reach 40, not 1)."""
    off = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    assert off < share, off


def precise(plan: Plan) -> Plan:
    """Every call in float32."""
    return plan.with_steps(replace(s, compute=replace(s.compute, precision="fp32")) for s in plan.steps)


# 1. Pipelined equals sequential -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [RENOISE, "ddim", "euler", "ddpm"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("negative", ["none", "self", "onetime", "full"])
def test_pipelined_is_sequential_bit_for_bit(n: int, negative: Any, solver: str) -> None:
    model = with_rule(rowwise) if solver != "ddpm" else with_rule(rowwise, "vp-discrete", "epsilon")
    stream_solver = {"name": "ddpm", "variance": "posterior"} if solver == "ddpm" else solver
    plan = levels_plan(model, LEVELS[:n], stream_solver)
    guidance = StreamGuidance(negative, 1.4)
    stream = Stream(model, plan, 1, guidance, seed=3)
    clip = frames(7)
    # A batch run: all frames together, one level after the other.
    together = StreamBatch(model, plan, 1, guidance, seed=3, frames=len(clip)).one_by_one(clip)
    shown = [stream.push(frame) for frame in clip]
    assert shown[: n - 1] == [None] * (n - 1)
    for k in range(len(clip) - n + 1):
        found = shown[k + n - 1]
        assert found is not None
        assert torch.equal(found, together[k])
    assert torch.equal(torch.stack(list(stream.flush())), together[len(clip) - n + 1 :]) if n > 1 else True
    assert stream.counts.network_calls == len(clip) + n - 1


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("solver", [RENOISE, "ddim", "euler", {"name": "ddim", "eta": 0.5}])
@pytest.mark.parametrize(("path", "prediction"), [("linear", "velocity"), ("vp-discrete", "epsilon")])
def test_streams_give_what_the_sampler_gives(n: int, solver: Any, path: str, prediction: Any) -> None:
    model = tiny_denoiser(path=path, prediction=prediction)
    plan = precise(levels_plan(model, LEVELS[:n], solver))
    stream = Stream(model, plan, 2, seed=5)
    clip = frames(5)
    node = stream.batch.levels[0].node
    start = node.alpha * clip + node.sigma * stream.batch.start_noise
    wanted = Sampler(model, plan)([2] * 5, [5] * 5, start)
    same(torch.stack(list(process(stream, clip))), wanted, 1e-6)


def test_full_guidance_is_classifier_free_guidance() -> None:
    model = tiny_denoiser()
    plan = precise(levels_plan(model, LEVELS))
    stream = Stream(model, plan, 0, StreamGuidance("full", 2.5), seed=5)
    clip = frames(5)
    node = stream.batch.levels[0].node
    start = node.alpha * clip + node.sigma * stream.batch.start_noise
    guided = plan.with_steps(replace(s, guidance=Guidance.cfg(2.5)) for s in plan.steps)
    wanted = Sampler(model, guided)([0] * 5, [5] * 5, start)
    same(torch.stack(list(process(stream, clip))), wanted, 2e-6)


def test_steps_may_differ_in_compute() -> None:
    """Weak patches at the noisy levels: two calls per tick, the same result as the sampler's."""
    model = pliant.flexify(tiny_denoiser(), [4], rank=4)
    randomize(model.network, seed=5)
    plan = levels_plan(model, LEVELS)
    plan = precise(plan.with_steps(replace(s, compute=Compute.of(4)) if s.t > 0.5 else s for s in plan.steps))
    stream = Stream(model, plan, 1, seed=2)
    clip = frames(5)
    node = stream.batch.levels[0].node
    start = node.alpha * clip + node.sigma * stream.batch.start_noise
    wanted = Sampler(model, plan)([1] * 5, [2] * 5, start)
    same(torch.stack(list(process(stream, clip))), wanted, 1e-6)


def by_hand(rule: Rule, frame: Tensor, stream: Stream, label: int) -> Tensor:
    """Published re-noising with RCFG for one frame of an epsilon network on the linear path, in float64."""
    guidance, batch = stream.batch.guidance, stream.batch
    net = lambda x, t, y: rule(x[None], torch.tensor([t]).double(), torch.tensor([y]))[0]  # noqa: E731
    frame, start = frame.double(), batch.start_noise.double()
    t = batch.levels[0].node.t
    x, reference = (1 - t) * frame + t * start, frame
    for k, (t, u) in enumerate(pairwise([*(level.node.t for level in batch.levels), 0.0])):
        eps = net(x, t, label)
        if k == 0 and guidance.negative == "onetime":
            s = net(x, t, 3)
            reference = (x - t * s) / (1 - t)
        else:
            s = (x - (1 - t) * reference) / t
        eps = guidance.delta * s + guidance.scale * (eps - guidance.delta * s)
        clean = (x - t * eps) / (1 - t)
        x = (1 - u) * clean + (batch.noise[k].double() if u else 0.0)  # already times u
    return x


@pytest.mark.parametrize("negative", ["self", "onetime"])
@pytest.mark.parametrize("delta", [1.0, 0.7])
def test_virtual_negatives_by_hand_for_epsilon_and_velocity(negative: Any, delta: float) -> None:
    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (rowwise(x, t, y) - x) / (1.0 - t[:, None, None, None])

    guidance = StreamGuidance(negative, 1.3, delta)
    clip = frames(4)
    for prediction, rule in (("epsilon", rowwise), ("velocity", velocity)):
        model = with_rule(rule, "linear", prediction)
        stream = Stream(model, levels_plan(model, LEVELS, RENOISE), 1, guidance, seed=9)
        wanted = torch.stack([by_hand(rowwise, frame, stream, 1) for frame in clip]).float()
        torch.testing.assert_close(torch.stack(list(process(stream, clip))), wanted, rtol=1e-4, atol=2e-5)


# 3. Agreement, 5. rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.2, 4.0])
def test_self_guidance_leaves_agreement_alone(scale: float) -> None:
    """A network that always sees the frame itself: the frame comes out, at every scale."""
    frame = frames(1)[0]
    model = with_rule(lambda x, t, y: (x - frame) / t[:, None, None, None])
    stream = Stream(model, LEVELS, 0, StreamGuidance("self", scale))
    (shown,) = process(stream, [frame])
    torch.testing.assert_close(shown, frame, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("negative", "rows"), [("none", 4), ("self", 4), ("onetime", 5), ("full", 8)])
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_rows_per_tick(negative: Any, rows: int, at_a_time: int) -> None:
    seen: list[int] = []

    def counting(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(t) == len(y)
        seen.append(len(x))
        return rowwise(x, t, y)

    stream = Stream(with_rule(counting), LEVELS, 1, StreamGuidance(negative), frames=at_a_time)
    for k in range(6):
        stream.push(frames(at_a_time, seed=k))
    assert seen[3:] == [rows * at_a_time] * 3
    assert stream.batch.rows == rows * at_a_time
    assert (stream.counts.network_calls, stream.counts.rows) == (6, sum(seen))


# The stream as an object ------------------------------------------------------------------------------------------


def test_several_frames_at_a_time_change_nothing() -> None:
    model = with_rule(rowwise)
    clip = frames(6)
    one = torch.stack(list(process(Stream(model, LEVELS, 1, StreamGuidance("onetime")), clip)))
    three = torch.cat(list(process(Stream(model, LEVELS, 1, StreamGuidance("onetime"), frames=3), clip.split(3))))
    assert torch.equal(one, three)


def test_skipped_frames_repeat_the_output() -> None:
    model = with_rule(rowwise)
    a, b = frames(2)
    clip = [a, a, b, b, b, a]
    stream = Stream(model, LEVELS[:2], 1, filter=SimilarityFilter(0.98))
    wanted = dict(zip("ab", process(Stream(model, LEVELS[:2], 1), [a, b]), strict=True))
    shown = list(process(stream, clip))
    assert [next(k for k, v in wanted.items() if torch.equal(v, s)) for s in shown] == list("aabbba")
    assert (stream.counts.frames, stream.counts.processed, stream.counts.skipped) == (6, 3, 3)
    assert stream.counts.network_calls == 4
    # Live, what is shown while frames are skipped is the latest output; nothing is computed for it.
    stream.reset()
    live = [stream.push(frame) for frame in clip]
    assert live[:2] == [None, None]
    assert all(v is not None and torch.equal(v, wanted["a"]) for v in live[2:5])
    assert live[5] is not None and torch.equal(live[5], wanted["b"])


def test_another_class_on_the_way() -> None:
    """Later frames are as if the stream had always had that class, in every mode; so is the negative."""
    model, clip = with_rule(rowwise), frames(8)
    for negative in ("none", "self", "onetime", "full"):
        stream = Stream(model, LEVELS, 0, StreamGuidance(negative))  # type: ignore[arg-type]
        for frame in clip[:4]:
            stream.push(frame)
        stream.change_label(2)
        shown = [stream.push(frame) for frame in clip[4:]]
        shown += list(stream.flush())
        wanted = list(process(Stream(model, LEVELS, 2, StreamGuidance(negative)), clip[4:]))  # type: ignore[arg-type]
        assert torch.equal(torch.stack(shown[-4:]), torch.stack(wanted))  # type: ignore[arg-type]


def test_states_are_values() -> None:
    """Two streams interleaved on one batch, and a state used twice, do not disturb each other."""
    batch = StreamBatch(with_rule(rowwise), LEVELS[:2], 1)
    a, b = frames(2)[:, None]
    first, _ = batch.tick(batch.empty, a)
    other, _ = batch.tick(batch.empty, b)
    results = [batch.tick(first, b)[1], batch.tick(other, a)[1], batch.tick(first, b)[1]]
    assert torch.equal(results[0], batch.one_by_one(a))  # type: ignore[arg-type]
    assert torch.equal(results[1], batch.one_by_one(b))  # type: ignore[arg-type]
    assert torch.equal(results[0], results[2])  # type: ignore[arg-type]


def test_seeds_decide_the_noise() -> None:
    model, frame = with_rule(rowwise), frames(1)
    runs = [next(process(Stream(model, LEVELS, 1, seed=seed), frame)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("levels", "words"),
    [((), "at least one"), ((0.5, 0.7), "must decrease"), ((0.5, 0.5), "must decrease"), ((1.2,), "at most at 1"),
     ((0.5, 0.0), "above 0")],
)  # fmt: skip
def test_bad_levels_are_refused(levels: tuple[float, ...], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Stream(tiny_denoiser(), levels)


@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "dpmpp-2s", "unipc", "rk4"])
def test_solvers_with_memory_or_stages_are_refused(solver: str) -> None:
    model = tiny_denoiser()
    with pytest.raises(PlanError, match=r"step \d .* cannot be pipelined"):
        Stream(model, levels_plan(model, LEVELS, solver))


def test_other_bad_input_is_refused() -> None:
    model = tiny_denoiser()
    for strength in (0.0, 1.5):
        with pytest.raises(PlanError, match="strength"):
            even_levels(strength, 4)
    with pytest.raises(PlanError, match="carries guidance"):
        Stream(model, Plan.uniform(model, 2, "ddim", guidance=2.0))
    plan = levels_plan(model, LEVELS)
    skipping = plan.with_steps([*plan.steps[:-1], replace(plan.steps[-1], compute=Compute(sites="R2K2"))])
    with pytest.raises(PlanError, match="step 3 does not run the whole network on the state"):
        Stream(model, skipping)
    with pytest.raises(ConfigError, match="class 9 does not exist"):
        Stream(model, LEVELS, 9)
    with pytest.raises(ConfigError, match="no unconditional mode"):
        Stream(tiny_denoiser(class_dropout=0.0), LEVELS, 0, StreamGuidance("full"))
    with pytest.raises(ConfigError, match="at least one frame"):
        Stream(model, LEVELS, frames=0)
    with pytest.raises(ShapeError, match=r"frames of \(1, 2, 8, 8\)"):
        Stream(model, LEVELS).push(torch.zeros(3, 8, 8))
    with pytest.raises(ConfigError, match="start below t=1"):
        Stream(model, (1.0, 0.5), 0, StreamGuidance("self", delta=0.5))


def test_a_scale_is_refused_with_its_step() -> None:
    """Rows of a stream are calls on the state itself."""
    from pliant.compute import LowBand

    model = tiny_denoiser()
    plan = levels_plan(model, [0.6, 0.3])
    low = plan.with_steps(replace(s, compute=Compute(scale=LowBand.of(2))) for s in plan.steps)
    with pytest.raises(PlanError, match=r"step 0 does not run the whole network on the state .*scale 1/2"):
        Stream(model, low)
