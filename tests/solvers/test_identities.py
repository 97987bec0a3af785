"""The identities every compiled update must satisfy (sheet D, 14.5), and that a mutation breaks them."""

import dataclasses

import pytest

from pliant.paths import get_path, uniform_times
from pliant.solvers import SOLVERS, Lin, Program, compile_program, consistency, get_solver
from pliant.solvers.coefficients import get_form

GRIDS = {
    "vp-discrete": (1.0, 0.0),
    "vp": (1.0, 0.0),
    "linear": (0.999, 0.0),
    "gvp": (0.999, 0.0),
    "cosine": (0.99, 0.0),
}
# Every solver that is exact for constant x0 and eps: all but those in t.
CONSISTENT = [
    name for name, entry in SOLVERS.items()
    if not entry.alias and not entry().stochastic and entry().form in ("sample", "epsilon", "epsilon-rho")
] + [{"name": "dpmpp-2m", "fit": "lagrange"}, {"name": "unipc-2", "B": "bh1"},
     {"name": "dc-solver", "ratios": [1, 1, 0.9, 1.1, 0.8]},
     {"name": "usf", "order": 3, "start": 2, "scale": "midpoint", "corrector": "pseudo"}]  # fmt: skip


@pytest.mark.parametrize("path_name", GRIDS)
@pytest.mark.parametrize("stored", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", CONSISTENT, ids=str)
def test_identities_hold_and_notice_a_mutation(solver, stored, path_name):
    first, last = GRIDS[path_name]
    if get_solver(solver).form == "epsilon-rho":
        first = 0.99
    path = get_path(path_name)
    program = compile_program(path, uniform_times(12, first, last), solver, stored)
    assert worst(program) < 1e-12
    for number, step in enumerate(program.steps):
        if number not in (1, 4, 11):
            continue
        place = len(step) - 1
        for terms in ("x", "m"):
            for k, (register, c) in enumerate(getattr(step[place], terms)):
                broken = list(getattr(step[place], terms))
                broken[k] = (register, c + 1e-3)
                op = dataclasses.replace(step[place], **{terms: tuple(broken)})
                steps = (*program.steps[:number], (*step[:place], op), *program.steps[number + 1 :])
                assert worst(dataclasses.replace(program, steps=steps)) > 1e-9


def worst(program: Program) -> float:
    return max(max(abs(r.data), abs(r.noise)) for r in consistency(program))


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_runge_kutta_is_exact_on_the_straight_path(solver):
    program = compile_program(get_path("linear"), uniform_times(7), solver, "velocity")
    assert worst(program) < 1e-14


@pytest.mark.parametrize("stored", ["velocity", "v_prediction"])
@pytest.mark.parametrize(
    "name", [n for n, e in SOLVERS.items() if e().form in ("velocity", "angle") and not e().stochastic]
)
def test_constant_velocity_is_exact(name, stored):
    """Sheet D, 14.5: the outputs' coefficients of every state sum to the distance from the step's start."""
    solver = get_solver(name)
    kind = "velocity" if solver.form == "velocity" else "v_prediction"
    if stored != kind:
        pytest.skip("the identity is about the form's own kind")
    program = compile_program(get_path("gvp"), uniform_times(7, 0.99, 0.02), solver, kind)
    variable = get_form(solver.form).variable
    place = {0: variable(program.start)}
    for op in program.instructions():
        if isinstance(op, Lin):
            ((base, one),) = op.x
            place[op.out] = variable(op.node)
            assert one == 1.0
            assert sum(c for _, c in op.m) == pytest.approx(place[op.out] - place[base], abs=1e-12)
