"""Why weak steps come first: the exact effect of a schedule on Gaussian modes (sheet A, 1.13(4)). No training.

The powerful network is exact; the weak one is exact for low frequencies and knows nothing of the high ones (x0 = 0).
Every step is linear, so a state of 1 carries the standard deviation and its square is the variance.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.paths import get_path, uniform_times
from pliant.solvers import Eval, Output, compile_program, run

LINEAR = get_path("linear")
POWERS = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)


def final_variance(weak_from: float, weak_to: float, steps: int, solver: str = "euler") -> Tensor:
    """Variance of a high mode of each power when steps that start at t in (weak_to, weak_from] are weak."""
    program = compile_program(LINEAR, uniform_times(steps), solver, "velocity")

    def evaluate(x: Tensor, ev: Eval) -> Output:
        t = ev.node.t
        if weak_to + 1e-9 < t <= weak_from + 1e-9:
            return Output(x / t)  # the velocity of "x0 = 0"
        return Output(x * (t - (1 - t) * POWERS) / ((1 - t) ** 2 * POWERS + t**2))

    *_, last = run(program, torch.ones(3, dtype=torch.float64), evaluate)
    return last.x.square()


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.8])
def test_weak_first_keeps_most_of_the_detail(tau: float) -> None:
    """`S tau^2 / ((1-tau)^2 S + tau^2)`: 99 % of weak detail (S = 0.01) survives a switch half-way."""
    expected = POWERS * tau**2 / ((1 - tau) ** 2 * POWERS + tau**2)
    assert final_variance(1.0, tau, 5000).tolist() == pytest.approx(expected.tolist(), rel=0.01)
    if tau == 0.5:
        assert expected.tolist() == pytest.approx([0.0099, 0.0909, 0.5], rel=1e-2)


def test_numbers_of_200_euler_steps() -> None:
    assert final_variance(1.0, 0.5, 200).tolist() == pytest.approx([0.00947, 0.0893, 0.497], rel=0.01)
    assert final_variance(1.0, 1.0, 5000).tolist() == pytest.approx(POWERS.tolist(), rel=0.02)


def test_weak_last_loses_everything() -> None:
    assert final_variance(0.5, 0.0, 200).tolist() == pytest.approx([0, 0, 0], abs=1e-20)


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_weak_steps_are_exact_in_the_missing_band(solver: str) -> None:
    """The band keeps its noise and scales with t, whatever the number of steps (sheet H, section 0)."""
    for steps in (2, 10, 100):
        one_step_left = final_variance(1.0, 0.0, steps, solver)
        assert one_step_left.tolist() == pytest.approx([0, 0, 0], abs=1e-20)
        half = compile_program(LINEAR, uniform_times(steps, 1.0, 0.5), solver, "velocity")
        *_, last = run(half, torch.ones(1, dtype=torch.float64), lambda x, ev: Output(x / ev.node.t))
        assert float(last.x) == pytest.approx(0.5, abs=1e-14)
