"""Objectives of few-step models on flows whose answers are known: what is zero, and what must not be differentiated."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.paths import NetworkTime, Preconditioning, get_path, uniform_times
from pliant.plans import uniform
from pliant.solvers import Output, compile_program, run
from pliant.training.draws import Draws
from pliant.training.models import Runner, averaged, prepared, teachers
from pliant.training.objectives import (
    Batch,
    Consistency,
    EDMLoss,
    FlowGuided,
    FlowMatching,
    InterpolantMatching,
    Phased,
    RolloutDistillation,
    SegmentStraightening,
    SharedPatches,
    StepDistillation,
)
from pliant.training.objectives.consistency import ddim_step, guided
from pliant.training.objectives.flow_guided import two_step_target
from pliant.training.objectives.phased import chord_ends, phase_entries
from support.flows import Toy
from support.networks import tiny_denoiser
from support.training import formula_denoiser


def noise_of(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def wide(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x)


def straight_velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Of the flow that takes z to 2 z - 1 along lines."""
    w = wide(t, x)
    z = (x + (1.0 - w)) / (2.0 * (1.0 - w) + w)
    return z - (2.0 * z - 1.0)


def straight() -> Any:
    """A toy, for objectives that take any denoiser; it counts its calls."""
    return Toy(lambda x, t, y: straight_velocity(x, t, y), get_path("linear"))


def straight_pairs(n: int = 6) -> Batch:
    z = noise_of(n)
    return Batch(2.0 * z - 1.0, torch.zeros(n, dtype=torch.int64), sources=z)


# ------------------------------------------------------------------------------------------- direct distillation


def test_steps_are_trained_where_the_plan_calls() -> None:
    seen: list[tuple[float, Any]] = []

    class Spy(Toy):
        def __call__(self, x: Tensor, t: Any, cond: Tensor, compute: Any = None, lands: Any = None) -> Any:
            seen.extend((float(v), compute) for v in t)
            return super().__call__(x, t, cond, compute)

    weak, own = Compute(patch=(2, 2)), Compute()
    objective = StepDistillation(((1.0, weak), (0.5, own)))
    toy: Any = Spy(lambda x, t, y: straight_velocity(x, t, y), get_path("linear"))
    losses = [float(objective(toy, straight_pairs(), Draws.single(6, step=k)).loss) for k in range(20)]
    assert max(losses) < 1e-10
    assert set(seen) == {(1.0, weak), (0.5, own)}


def test_one_step_sees_pure_noise() -> None:
    """No leak of the answer at t = 1, where official code mixes a thousandth of it in."""
    batch = straight_pairs()

    class Spy(Toy):
        def __call__(self, x: Tensor, t: Any, cond: Tensor, compute: Any = None, lands: Any = None) -> Any:
            assert batch.sources is not None and torch.equal(x, batch.sources)
            return super().__call__(x, t, cond, compute)

    toy: Any = Spy(lambda x, t, y: straight_velocity(x, t, y), get_path("linear"))
    StepDistillation(((1.0, Compute()),))(toy, batch, Draws.single(6))


def test_a_rollout_trains_later_steps_to_correct_earlier_ones() -> None:
    """The first step lands beside the sample: the second is asked for what leads from there to the sample itself."""
    batch, beside, two = straight_pairs(), 0.3, ((1.0, Compute()), (0.25, Compute()))
    assert batch.sources is not None
    z, x0 = batch.sources.flatten(1), batch.images.flatten(1)

    def answer(x: Tensor, t: Tensor, copies: bool) -> Tensor:
        if float(t[0]) == 1.0:
            return z - (x0 + beside)
        torch.testing.assert_close(x, 0.75 * (x0 + beside) + 0.25 * z)  # by Euler's step from the noise
        return z - (x0 + beside) if copies else (x - x0) / wide(t, x)

    def loss(copies: bool) -> Any:
        toy: Any = Toy(lambda x, t, y: answer(x, t, copies), get_path("linear"))
        return RolloutDistillation(two)(toy, batch, Draws.single(6))

    assert float(loss(copies=False).logs["loss_step_1"]) == pytest.approx(beside**2, rel=1e-4)
    assert float(loss(copies=False).logs["loss_step_2"]) < 1e-10
    # Repeating the first answer ends beside the sample as the first step does: (0.3 / 0.25)^2 as a velocity.
    assert float(loss(copies=True).logs["loss_step_2"]) == pytest.approx((beside / 0.25) ** 2, rel=1e-3)

    # A step is trained by what it answers itself, not by where it leads the next one to.
    network = tiny_denoiser(in_channels=1)
    last = RolloutDistillation(two)(network, batch, Draws.single(6))
    assert last.loss.requires_grad and not any(v.requires_grad for v in last.logs.values())
    one = RolloutDistillation(two[:1])(network, batch, Draws.single(6))
    same = StepDistillation(two[:1])(network, batch, Draws.single(6))
    torch.testing.assert_close(one.loss, same.loss)
    assert RolloutDistillation(two).flops(network) == 2 * StepDistillation(two).flops(network)
    with pytest.raises(ConfigError, match="descending times from 1"):
        RolloutDistillation(((0.5, Compute()),))


# ------------------------------------------------------------------------------------------------------ SlimFlow


def test_two_step_target() -> None:
    """For a straight teacher every share of the way ends at the same place; for v = x it is worked out by hand."""
    z = noise_of()
    labels = torch.zeros(6, dtype=torch.int64)
    share = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
    found = two_step_target(straight(), z, 1.0 - z, share, labels)  # z - x0 = 1 - z: the exact first step
    torch.testing.assert_close(found, 2.0 * z - 1.0, rtol=1e-4, atol=1e-4)
    grows: Any = Toy(lambda x, t, y: x, get_path("linear"))
    half = torch.full((6,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(two_step_target(grows, z, 2.0 * z, half, labels), torch.zeros_like(z))  # z - z = 0
    torch.testing.assert_close(two_step_target(grows, z, 0.0 * z, half, labels), 0.5 * z)


def test_no_gradient_goes_through_the_two_step_target() -> None:
    """Sheet C, 4 (4): of the target branch it is exactly zero, though the target depends on the weight."""
    weight = torch.tensor(0.7, requires_grad=True)
    student: Any = Toy(lambda x, t, y: weight * x, get_path("linear"))
    teacher = formula_denoiser(straight_velocity)
    objective = FlowGuided(teacher, weight=1.0)
    loss = objective(student, straight_pairs(), Draws.single(6)).logs
    assert loss["two_step"] > 0.0
    z = noise_of(4, 1)
    labels = torch.zeros(4, dtype=torch.int64)
    target = two_step_target(teacher, z, (weight * z).detach(), torch.full((4,), 0.5), labels)
    assert not target.requires_grad
    one_sided = ((z - weight * z) - target).square().mean()
    by_hand = float((2.0 * ((z - weight.detach() * z) - target) * -z).mean())
    assert float(torch.autograd.grad(one_sided, weight)[0]) == pytest.approx(by_hand, rel=1e-4)


def test_flow_guided_is_zero_for_the_straight_flow_and_needs_linear_paths() -> None:
    teacher = formula_denoiser(straight_velocity)
    assert float(FlowGuided(teacher)(straight(), straight_pairs(), Draws.single(6)).loss) < 1e-9
    with pytest.raises(ConfigError, match="linear paths"):
        FlowGuided(teacher).check(formula_denoiser(straight_velocity, path="vp"))
    with pytest.raises(ConfigError, match="low <= high"):
        FlowGuided(teacher, low=0.9, high=0.3)


# ----------------------------------------------------------------------------------------- Rectified Diffusion


@pytest.mark.parametrize("name", ["vp", "cosine", "linear", "edm"])
def test_first_order_models_are_exact_in_any_number_of_ddim_steps(name: str) -> None:
    """Sheet C, 5 (1): x0 and eps fixed per trajectory; Euler on the velocity agrees only on linear and EDM paths."""
    path = get_path(name)
    eps = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = torch.tanh(3.0 * eps)

    def end(solver: str, steps: int) -> Tensor:
        times = uniform_times(steps, 0.98, 0.0)
        program = compile_program(path, times, solver, "epsilon")
        start = path.mix(x0, eps, 0.98)
        for result in run(program, start, lambda x, ev: Output(eps), None):
            x = result.x
        return x

    for steps in (1, 3, 50):
        torch.testing.assert_close(end("ddim", steps), x0, rtol=0.0, atol=1e-6)

    def euler(steps: int) -> Tensor:
        x, times = path.mix(x0, eps, 0.98), uniform_times(steps, 0.98, 0.02).tolist()
        for t, s in pairwise(times):
            x = x + (s - t) * path.target("velocity", x0, eps, t)
        return x

    straight = float((euler(3) - path.mix(x0, eps, 0.02)).abs().max()) < 1e-9
    assert straight == (name in ("linear", "edm"))


@pytest.mark.parametrize(("name", "start"), [("vp", 1.0), ("linear", 1.0), ("cosine", 0.7), ("edm", 0.5)])
def test_chord(name: str, start: float) -> None:
    """Sheet C, 5 (2): the noise and clean data of a chord, also from where there is no signal left."""
    path = get_path(name)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.randn(4, 3, generator=g, dtype=torch.float64)
    ends = chord_ends(path, path.mix(x0, eps, start), start, path.mix(x0, eps, 0.2), 0.2)
    torch.testing.assert_close(ends.x1, eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ends.x0, x0, rtol=1e-5, atol=1e-5)


def test_phases_of_a_table() -> None:
    """Sheet C, 5 (4)."""
    assert phase_entries(1000, 40, 10) == [249, 499, 749, 999]
    with pytest.raises(ConfigError, match="do not divide"):
        phase_entries(1000, 30, 10)


def runner(velocity: Any, times: list[float]) -> Runner:
    class Direct(Runner):
        """Heun by hand, because the sampling engine wants a real network."""

        def __call__(self, labels: Tensor, x: Tensor) -> Tensor:
            for t, s in pairwise(times):
                x = x + (s - t) * velocity(x, torch.full((len(x),), t), labels)
            return x

    teacher = tiny_denoiser()
    return Direct(teacher, uniform(teacher, len(times) - 1, "euler", times=times))


def test_phased_loss_of_a_straight_teacher_and_student_is_zero() -> None:
    phases = (runner(straight_velocity, [1.0, 0.75, 0.5]), runner(straight_velocity, [0.5, 0.25, 0.0]))
    batch = Batch(noise_of(), torch.zeros(6, dtype=torch.int64))
    objective = Phased(phases)
    for step in range(4):
        assert float(objective(straight(), batch, Draws.single(6, step=step)).loss) < 1e-9
        wrong: Any = Toy(lambda x, t, y: -straight_velocity(x, t, y), get_path("linear"))
        assert float(objective(wrong, batch, Draws.single(6, step=step)).loss) > 0.05
    assert len(teachers(objective)) == 2  # the trainer finds and freezes them


def test_consistency_is_zero_where_clean_data_is_constant_and_asks_the_average() -> None:
    average, teacher = straight(), straight()
    times = (0.0, 0.25, 0.5, 1.0)
    objective = Consistency(teacher, times, average=average)
    batch = Batch(noise_of(), torch.zeros(6, dtype=torch.int64))
    assert float(objective(straight(), batch, Draws.single(6)).loss) < 1e-9
    assert average.calls == 1 and teacher.calls == 1
    weight = torch.tensor(1.0, requires_grad=True)
    bent: Any = Toy(lambda x, t, y: weight * torch.sin(x), get_path("linear"))
    loss = Consistency(teacher, times, average=bent)(straight(), batch, Draws.single(6)).loss
    assert not loss.requires_grad and float(loss) > 1e-4
    with pytest.raises(ConfigError, match="ascending"):
        Consistency(teacher, (0.5, 0.2)).check(teacher)


def test_guidance_of_scale_one_is_one_call() -> None:
    """Sheet C, 2 (2), and the formula for other scales."""
    teacher: Any = Toy(lambda x, t, y: x + y[:, None].to(x), get_path("linear"), null_label=5)
    x, t, y = noise_of(2), torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([1, 2])
    once = guided(teacher, x, t, y, 1.0)
    assert teacher.calls == 1 and torch.equal(once.value, teacher(x, t, y).value)
    found = guided(teacher, x, t, y, 3.0).value
    torch.testing.assert_close(found, x + 5.0 + 3.0 * (wide(y, x) - 5.0))


def test_ddim_step_of_single_times() -> None:
    prediction = straight()(2.0 * noise_of() * 0 + noise_of(), torch.ones(6, dtype=torch.float64), torch.zeros(6))
    s = torch.linspace(0.0, 0.9, 6, dtype=torch.float64)
    z = noise_of()
    torch.testing.assert_close(ddim_step(prediction, s), (1 - wide(s, z)) * (2 * z - 1) + wide(s, z) * z)


# ----------------------------------------------------------------------------------------------------------- BOSS


def test_segments_are_straightened_between_their_anchors() -> None:
    times = (1.0, 0.6, 0.5, 0.0)
    states = torch.stack([noise_of(8, k) for k in range(4)], 1)
    batch = Batch(states[:, -1], torch.zeros(8, dtype=torch.int64), sources=states)

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for row, time in enumerate(t[:, 0].tolist()):
            k = min(range(3), key=lambda i: abs(times[i] - time))
            i = int((states[:, k].flatten(1) - x[row]).abs().sum(1).argmin())
            out[row] = ((states[i, k + 1] - states[i, k]) / (times[k + 1] - times[k])).flatten()
        return out

    objective = SegmentStraightening(times)
    toy: Any = Toy(exact, get_path("linear"))
    assert float(objective(toy, batch, Draws.single(8)).loss) < 1e-10
    wrong: Any = Toy(lambda x, t, y: -exact(x, t, y), get_path("linear"))
    assert float(objective(wrong, batch, Draws.single(8)).loss) > 1.0
    with pytest.raises(ConfigError, match="trajectories at 3 times"):
        SegmentStraightening((1.0, 0.5, 0.0))(toy, batch, Draws.single(8))


# -------------------------------------------------------------------------------------- interpolants, EDM, PFGM++


def gaussian_interpolant(t: Tensor, x: Tensor, kind: str) -> Tensor:
    """Exact B, score or E[z|x] for x0 ~ N(0.5, 0.6^2), x1 ~ N(-1, 1.3^2) on the path below (sheet C, 11)."""
    path = get_path("interpolant", kind="linear", gamma="brownian", strength=2.0)
    s = path.coefficients(t)
    a, b, c, da, db, dc = (v.reshape(-1, 1) for v in s)
    m, w = a * 0.5 - b, a**2 * 0.36 + b**2 * 1.69 + c**2
    dm = da * 0.5 - db
    if kind == "velocity":
        return dm + (a * da * 0.36 + b * db * 1.69 + c * dc) / w * (x - m)
    return -(x - m) / w if kind == "score" else c * (x - m) / w


@pytest.mark.parametrize("kind", ["velocity", "score", "epsilon"])
def test_interpolant_loss_is_least_at_the_exact_answer(kind: Any) -> None:
    path = get_path("interpolant", kind="linear", gamma="brownian", strength=2.0)
    g = torch.Generator().manual_seed(0)
    n = 6_000
    x0, x1 = 0.5 + 0.6 * torch.randn(n, 1, 1, 1, generator=g), -1.0 + 1.3 * torch.randn(n, 1, 1, 1, generator=g)
    batch = Batch(x0, torch.zeros(n, dtype=torch.int64), sources=x1)

    def loss(shift: float, factor: float) -> float:
        toy: Any = Toy(
            lambda x, t, y: factor * gaussian_interpolant(t[:, 0].double(), x.double(), kind).to(x) + shift, path, kind
        )
        return float(InterpolantMatching(antithetic=0.5)(toy, batch, Draws.single(n)).loss)

    least = loss(0.0, 1.0)
    assert least < 0.0
    for shift, factor in ((0.2, 1.0), (-0.2, 1.0), (0.0, 0.7), (0.0, 1.3), (0.0, -1.0)):
        assert loss(shift, factor) > least + 1e-3


def test_antithetic_twins_count_as_one() -> None:
    """Twins everywhere, near the ends and nowhere estimate the same loss."""
    path = get_path("interpolant")
    g = torch.Generator().manual_seed(0)
    n = 4_000
    batch = Batch(
        torch.randn(n, 1, 1, 1, generator=g), torch.zeros(n, dtype=torch.int64),
        sources=torch.randn(n, 1, 1, 1, generator=g),
    )  # fmt: skip
    toy: Any = Toy(lambda x, t, y: 0.5 * x, path)
    found = [
        float(InterpolantMatching(antithetic=a)(toy, batch, Draws.single(n)).loss) for a in (0.0, 0.1, 0.5)
    ]
    assert found == pytest.approx([found[0]] * 3, abs=0.06)
    with pytest.raises(ConfigError, match="not 'sample'"):
        InterpolantMatching().check(Toy(lambda x, t, y: x, path, "sample"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="trains interpolants"):
        InterpolantMatching().check(straight())


@pytest.mark.parametrize("name", ["edm", "pfgmpp"])
def test_edm_loss_is_a_plain_squared_error_of_the_bare_network(name: str) -> None:
    """lambda |D - y|^2 = |F - (y - c_skip x)/c_out|^2: checked with F = 0."""
    pre = Preconditioning("edm", 0.5)
    base = formula_denoiser(lambda x, t, y: 0.0 * x)
    denoiser = Denoiser(base.network, get_path(name), "sample", NetworkTime(), preconditioning=pre)
    batch = Batch(0.5 * noise_of(64), torch.zeros(64, dtype=torch.int64))
    found = float(EDMLoss()(denoiser, batch, Draws.single(64)).loss)
    draws = Draws.single(64)
    sigma = draws.each(EDMLoss()._sigma).clamp(0.002, 80.0)
    noise = draws.noise(denoiser.path, (1, 8, 8))
    c = pre.coefficients(sigma)
    x = batch.images.double() + wide(sigma, noise.double()) * noise.double()
    target = (batch.images.double() - wide(c.skip, x) * x) / wide(c.out, x)
    assert found == pytest.approx(float(target.square().mean()), rel=1e-4)
    with pytest.raises(ConfigError, match="preconditioned"):
        EDMLoss().check(base)


# ---------------------------------------------------------------------------------- what the trainer does for them


def test_the_average_follows_without_copies() -> None:
    from pliant.training.ema import EMA

    denoiser = tiny_denoiser()
    parameters = dict(denoiser.network.named_parameters())
    ema = EMA(parameters, decay=0.5, warmup=False)
    objective = prepared(SharedPatches(Consistency(tiny_denoiser(1), (0.0, 1.0))), denoiser, ema)
    average = objective.own.average  # type: ignore[union-attr]
    assert average is not None and average.network is not denoiser.network
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1.0)
    ema.update(0)
    for name, p in average.network.named_parameters():
        torch.testing.assert_close(p, parameters[name] - 0.5)
        assert not p.requires_grad
    assert prepared(FlowMatching(), denoiser, ema) == FlowMatching()
    assert averaged(denoiser, ema).path == denoiser.path
