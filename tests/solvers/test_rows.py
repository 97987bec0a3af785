"""Steps of raw coefficients."""

import json

import pytest
import torch

from analytic import GMM2D, sample, start_points
from pliant.errors import PlanError
from pliant.paths import get_path
from pliant.solvers import Lin, compile_program, get_solver
from pliant.solvers.rows import Rows

PATH, TIMES = get_path("vp"), [1.0, 0.6, 0.2]


def rows_of(program):
    """A first-order program rewritten as raw coefficients."""
    lins = [op for step in program.steps for op in step if isinstance(op, Lin)]
    return [Rows((((op.x[0][1],), (op.m[0][1],), ()),)) for op in lins]


def test_raw_coefficients_are_the_solver():
    program = compile_program(PATH, TIMES, "ddim", "epsilon")
    again = compile_program(PATH, TIMES, rows_of(program), "epsilon")
    x = start_points()
    assert torch.equal(sample(again, GMM2D, x), sample(program, GMM2D, x))


def test_config_round_trip():
    step = Rows((((1.0, -0.5), (0.25,), ()), ((0.5,), (0.1, 0.2), (0.3,))), start=2.0)
    assert get_solver(json.loads(json.dumps(step.to_config()))) == step
    assert step.stochastic and step.evaluations_per_step == 2 and step.name == "rows"


def test_stages_and_memory():
    """Two calls in a step, the second seeing a state made from both the state and the output of the first."""
    first = Rows((((1.0,), (0.5,), ()), ((0.0, 1.0), (0.25, 0.25), ())), start=2.0)
    second = Rows((((1.0,), (0.0, 0.0, 1.0), ()),))
    program = compile_program(PATH, TIMES, [first, second], "epsilon")
    assert [e.node.t for e in program.evaluations] == [1.0, 1.0, 0.6]
    assert [op.node.t for step in program.steps for op in step if isinstance(op, Lin)] == [1.0, 1.0, 0.6, 0.2]
    expected = torch.tensor(
        [[2.0, 0, 0, 0], [2.0, 0.5, 0, 0], [2.0, 0.25, 0.25, 0], [2.0, 1.25, 0.25, 0]], dtype=torch.float64
    )
    torch.testing.assert_close(program.normal_form().rows()[:, :4], expected)


def test_bad_rows():
    with pytest.raises(PlanError, match="at least one stage"):
        Rows(())
    with pytest.raises(PlanError, match="at most 6"):
        Rows((((1.0,) * 7, (), ()),))
    with pytest.raises(PlanError, match="refers to 2 network calls, but only 1"):
        compile_program(PATH, TIMES, Rows((((1.0, 1.0), (1.0,), ()),)), "epsilon")
