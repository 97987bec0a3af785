"""`pliant solvers`: the list says what solvers say of themselves; a program is printed as it runs."""

from __future__ import annotations

import pytest

from pliant.solvers import SOLVERS, Program, compile_program, get_solver
from support.cli import Run, refused


def test_the_list_is_complete_and_true(run: Run) -> None:
    rows = {row["name"]: row for row in run("solvers", "--json").json["solvers"]}
    assert set(rows) == set(SOLVERS)
    for name in ("ddim", "unipc-3", "heun", "sde-dpmpp-2m", "plms"):
        solver = get_solver(name)
        row = rows[name]
        assert row["order"] == solver.convergence
        assert row["evaluations_per_step"] == solver.evaluations_per_step
        assert row["stochastic"] == solver.stochastic
    text = run("solvers").out
    assert all(name in text for name in SOLVERS)


def test_show_prints_the_program_that_runs(run: Run) -> None:
    from pliant.paths import Linear, uniform_times

    shown = run("solvers", "--show", "unipc-2", "--steps", 5, "--json").json
    program = compile_program(Linear(), uniform_times(5), "unipc-2", "velocity", True)
    assert Program.from_dict(shown) == program
    text = run("solvers", "--show", "unipc-2", "--steps", 5).out
    assert "m4 = network(x6)" in text
    assert "eta" not in text
    assert "noises" in run("solvers", "--show", "ddim:eta=0.5", "--path", "vp-discrete").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show", "unipcc-2"], "did you mean 'unipc-2'"),
        (["--show", "ddim:eta=3"], "eta lies between"),
        (["--show", "ddim", "--path", "lineer"], "did you mean 'linear'"),
        (["--show", "ddim", "--grid", "karas"], "did you mean 'karras'"),
        (["--show", "ddim:"], None),
    ],
)
def test_bad_requests(arguments: list[str], words: str | None, run: Run) -> None:
    done = run("solvers", *arguments)
    if words is None:
        assert done.code == 0
    else:
        refused(done, words)
