"""Running a program from outside gives what the interpreter gives."""

import pytest
import torch

from analytic import GMM2D, noise_of, start_points
from pliant.errors import PlanError, ShapeError
from pliant.paths import get_path, uniform_times
from pliant.solvers import Lin, Output, ProgramBuilder, compile_program, run
from pliant.solvers.cursor import Cursor, cut, spread_at_first_evaluation

PATH = get_path("vp")


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun", "midpoint", {"name": "ddim", "eta": 0.7}])
def test_equals_the_interpreter(solver):
    program = compile_program(PATH, uniform_times(6, 1.0, 0.05), solver, "epsilon")
    x, noise = start_points(), noise_of((8, 2))
    for result in run(program, x, GMM2D.evaluate(program), noise):
        expected = result.x
    cursor = Cursor(cut(program))
    while (evaluation := cursor.evaluation) is not None:
        x = cursor.feed(x, Output(GMM2D.predict("epsilon", x, evaluation.node)), noise)
    assert torch.equal(x, expected)
    with pytest.raises(PlanError, match="complete"):
        cursor.feed(x, Output(x), noise)


def test_wrong_shapes_are_refused():
    program = compile_program(PATH, uniform_times(2, 1.0, 0.05), "ddim", "epsilon")
    with pytest.raises(ShapeError, match="output"):
        Cursor(cut(program)).feed(torch.zeros(2, 2), Output(torch.zeros(2, 1)), noise_of((2, 2)))


def churned(reads_start: bool = False):
    """A program that adds noise before its first call, as EDM's sampler may."""
    b = ProgramBuilder(PATH, [1.0, 0.5], "epsilon")
    louder = b.combine(b.nodes[0], x={0: 2.0}, z={b.noise(): 1.5})
    output = b.evaluate(b.nodes[0], louder)
    b.advance(b.combine(b.nodes[1], x={0 if reads_start else louder: 1.0}, m={output.out: -0.5}))
    b.close_step("churn")
    return b.finish()


def test_noise_before_the_first_call_becomes_a_wider_start():
    assert spread_at_first_evaluation(churned(), 1.0) == pytest.approx(2.5)
    assert spread_at_first_evaluation(compile_program(PATH, [1.0, 0.5], "ddim", "epsilon"), 0.7) == 0.7
    with pytest.raises(PlanError, match="returns to the state"):
        spread_at_first_evaluation(churned(reads_start=True), 1.0)


def test_only_what_follows_the_first_call_is_run():
    pieces = cut(churned())
    assert len(pieces) == 1 and isinstance(pieces[0].updates[0].lin, Lin)
    x = torch.ones(1, 2)
    out = Cursor(pieces).feed(x, Output(x), noise_of((1, 2)))
    torch.testing.assert_close(out, 0.5 * x)


def test_cuts_know_the_noise_of_each_update():
    program = compile_program(PATH, [1.0, 0.6, 0.2], "euler-ancestral", "epsilon")
    for piece in cut(program):
        for update in piece.updates:
            assert update.slots == tuple(i for kind, i in update.lin.reads() if kind == "z")
    assert any(update.slots for piece in cut(program) for update in piece.updates)
