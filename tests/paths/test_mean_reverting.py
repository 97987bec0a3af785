"""Solvers along the mean-reverting path (sheet D, 10): nothing but an offset, in every solver."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from analytic import GMM2D, exact_flow, noise_of, slope, start_points
from pliant.paths import MeanReverting, PredictionType, get_path
from pliant.solvers import Eval, Lin, Output, Program, compile_program, run
from pliant.solvers.builder import nodes_of

PATH = MeanReverting()
MU = torch.tensor([0.8, -1.7], dtype=torch.float64)
MRS = [
    *((name, kind) for name in ("mrs-1", "mrs-2", "mrs-3", "mrs-eps-2", "mrs-eps-3") for kind in ("sample", "epsilon")),
    *((name, "epsilon") for name in ("ddim", "unipc-2", "dpmpp-2s", "mrs-sde-1", "mrs-sde-2")),
    ("mrs-eps-sde-2", "sample"),
]


def grid(steps: int, first: float = 1.0, last: float = 0.02) -> list[float]:
    ends = PATH.log_snr(torch.tensor([first, last], dtype=torch.float64))
    return PATH.time_of_log_snr(torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)).tolist()


def final(program: Program, x: Tensor, mu: Tensor) -> Tensor:
    """Run with the exact network of gmm2d data translated by mu: it knows mu, as restoration networks do."""

    def evaluate(state: Tensor, evaluation: Eval) -> Output:
        n = evaluation.node
        value = GMM2D.predict(program.stored, state - n.beta * mu - n.alpha * mu, n)
        return Output(value + mu if program.stored == "sample" else value)

    for result in run(program, x, evaluate, noise_of(x.shape), mu.expand_as(x)):
        x = result.x
    return x


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "dpm-2m", "sde-dpmpp-2m", "mrs-2"])
def test_unit_noise_without_an_image_is_vp(solver: str) -> None:
    """Check (1): sigma_inf = 1 and mu = 0 give the programs of a VP path with the same alpha."""
    path = MeanReverting(sigma_inf=1.0)
    t = torch.arange(1, 101, dtype=torch.float64) / 100
    table = get_path("vp-table", alphas_cumprod=tuple((path.alpha_sigma(t).alpha ** 2).tolist()))
    times = [1.0, 0.8, 0.5, 0.27, 0.04]
    ours, theirs = (compile_program(p, times, solver, "epsilon") for p in (path, table))
    for a, b in zip(ours.instructions(), theirs.instructions(), strict=True):
        if isinstance(a, Lin) and isinstance(b, Lin):
            for left, right in ((a.x, b.x), (a.m, b.m), (a.z, b.z)):
                assert [i for i, _ in left] == [i for i, _ in right]
                assert [c for _, c in left] == pytest.approx([c for _, c in right], rel=1e-9)


@pytest.mark.parametrize(("solver", "kind"), MRS)
def test_translation(solver: str, kind: PredictionType) -> None:
    """Check (2): data and mu translated by a vector translate every solver's result by it, to 1e-12."""
    program = compile_program(PATH, grid(7), solver, kind)
    x, shift = start_points(), torch.tensor([3.0, -2.0], dtype=torch.float64)
    plain = final(program, MU + PATH.sigma_inf * x, MU)
    moved = final(program, MU + shift + PATH.sigma_inf * x, MU + shift)
    torch.testing.assert_close(moved, plain + shift, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "kind", "order"),
    [
        ("ddim", "sample", 1),
        ("mrs-1", "epsilon", 1),
        ("mrs-2", "sample", 2),
        ("mrs-3", "sample", 2),  # the published rule lacks half of the quadratic term
        ("mrs-eps-2", "epsilon", 2),
        ("mrs-eps-3", "epsilon", 2),
        ("dpmpp-2s", "sample", 2),
        ("dpmpp-3s", "sample", 3),
        ("unipc-2", "sample", 3),
    ],
)
def test_orders(solver: str, kind: PredictionType, order: int) -> None:
    """Check (3): slopes on the shifted mixture, against the exact flow of z = x - mu."""
    first, last = 0.6, 0.03
    start, end = nodes_of(PATH, [first, last])
    z = start_points() * math.hypot(start.sigma, start.alpha)
    # Data is the mixture translated by mu, so z - alpha*0 = alpha*(mixture) + sigma*eps.
    expected = exact_flow(GMM2D, z, start, end) + MU
    errors = []
    for steps in (40, 80, 160, 320):
        program = compile_program(PATH, grid(steps, first, last), solver, kind)
        errors.append(float((final(program, z + MU, MU) - expected).abs().max()))
    assert slope(errors) == pytest.approx(order, abs=0.15)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("solver", ["ddim", "mrs-1", "mrs-2"])
def test_a_network_that_answers_with_the_image(solver: str) -> None:
    """Check (4): x0 = mu keeps every state on the line from mu, at the product of sigma ratios."""
    program = compile_program(PATH, grid(6), solver, "sample")
    x = MU + start_points(4)
    factor = 1.0
    results = list(run(program, x, lambda s, e: Output(MU.expand_as(s)), None, MU.expand_as(x)))
    for result, (a, b) in zip(results, pairwise(nodes_of(PATH, grid(6))), strict=True):
        factor *= b.sigma / a.sigma
        torch.testing.assert_close(result.x, MU + factor * (x - MU), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["sample", "epsilon"])
@pytest.mark.parametrize("solver", ["mrs-1", "mrs-sde-1", "mrs-eps-sde-1"])
def test_published_first_steps(solver: str, kind: PredictionType) -> None:
    """The four rows of section 10 for one step s -> t, written out, mu-term included."""
    s, t = nodes_of(PATH, [0.7, 0.4])
    x, value, z = start_points(3), start_points(3, seed=1), start_points(3, seed=2)
    program = compile_program(PATH, [0.7, 0.4], solver, kind)
    (result,) = run(program, x, lambda *_: Output(value), lambda _: z, MU.expand_as(x))
    if kind == "sample":
        x0, eps = value, (x - MU - s.alpha * (value - MU)) / s.sigma
    else:
        x0, eps = (x - s.sigma * value - (1 - s.alpha) * MU) / s.alpha, value
    h, ratio, growth = t.log_snr - s.log_snr, t.sigma / s.sigma, t.alpha / s.alpha
    expected = {
        "mrs-1": ratio * x - t.alpha * math.expm1(-h) * x0 + MU * (1 - ratio + ratio * s.alpha - t.alpha),
        "mrs-sde-1": ratio * math.exp(-h) * x
        - t.alpha * math.expm1(-2 * h) * x0
        + t.sigma * math.sqrt(-math.expm1(-2 * h)) * z
        + MU * (1 - growth * math.exp(-2 * h) - t.alpha * -math.expm1(-2 * h)),
        "mrs-eps-sde-1": growth * x
        - 2 * t.sigma * math.expm1(h) * eps
        + t.sigma * math.sqrt(math.expm1(2 * h)) * z
        + MU * (1 - growth),
    }
    torch.testing.assert_close(result.x, expected[solver], rtol=0, atol=1e-12)
