"""Issue 3, item 5: wrong orders, grids and names are refused in one clear line (the command line: tests/cli)."""

import pytest

from pliant.errors import ConfigError, PlanError
from pliant.paths import get_path, make_grid, uniform_times
from pliant.solvers import SOLVERS, compile_program, get_solver, solver_infos
from pliant.solvers.coefficients import get_form
from pliant.solvers.fits import get_fit

LINEAR, TWO_DATA_SETS = get_path("linear"), get_path("interpolant")
ORDERED = [name for name, entry in SOLVERS.items() if "order" in entry.takes]
STOCHASTIC = [info.name for info in solver_infos() if info.stochastic]


def refused(call, *words):
    with pytest.raises((PlanError, ConfigError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("order", [0, 7, -1, 2.5, None, "2", True])
@pytest.mark.parametrize("name", ORDERED)
def test_orders(name, order):
    refused(lambda: get_solver({"name": name, "order": order}), "orders 1 to", repr(order))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-3", "rk4", "f-pndm"])
@pytest.mark.parametrize(
    ("times", "word"),
    [
        ([1.0, 0.5, 0.5, 0.2], "both 0.5"),
        ([0.9, 0.9], "both 0.9"),
        ([0.9, 0.4, 0.6, 0.2], "turns back"),
        ([0.1, 0.6, 0.4, 0.9], "turns back"),
        ([0.9, -0.1], "between 0"),
        ([0.9], "at least 2"),
        ([], "at least 2"),
        ([float("nan"), 0.5], "between 0"),
    ],
)
def test_grids(solver, times, word):
    refused(lambda: compile_program(LINEAR, times, solver, "velocity"), word)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_on_the_way_to_noise(name):
    solver = {"name": "ddpm", "variance": "posterior"} if name == "ddpm" else name
    refused(
        lambda: compile_program(get_path("vp"), uniform_times(4, 0.9, 0.1).flip(0), solver, "epsilon"),
        "inversion", "deterministic",
    )  # fmt: skip


@pytest.mark.parametrize("grid", ["log-snr", "karras", "exponential", "align-your-steps", "noise-ratio"])
def test_paths_without_a_log_snr(grid):
    refused(lambda: make_grid(TWO_DATA_SETS, 5, grid), "interpolant", "uniform")


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-2", "dpm-2s", "lms-4", "euler"])
def test_solvers_on_a_path_without_a_log_snr(solver):
    refused(lambda: compile_program(TWO_DATA_SETS, uniform_times(4, 0.9, 0.1), solver, "velocity"), "not Gaussian")


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda: get_solver("dpmp-2m"), "'dpmpp-2m'"),
        (lambda: get_solver("UniPC-2"), "'unipc-2'"),
        (lambda: get_solver({"name": "ddim", "etta": 1.0}), "'eta'"),
        (lambda: get_solver({"name": "plms", "warmup": "prc"}), "'prk'"),
        (lambda: get_solver({"name": "usf", "corrector": "psuedo"}), "'pseudo'"),
        (lambda: get_form("epsilon_rho"), "'epsilon-rho'"),
        (lambda: get_fit("lagrang"), "'lagrange'"),
        (lambda: get_path("liner"), "'linear'"),
        (lambda: make_grid(LINEAR, 4, "karas"), "'karras'"),
        (lambda: make_grid(LINEAR, 4, {"name": "karras", "roh": 7}), "'rho'"),
        (lambda: compile_program(LINEAR, [0.9, 0.1], "ddim", "epsilom"), "'epsilon'"),
    ],
)
def test_unknown_names(call, nearest):
    refused(call, nearest)
