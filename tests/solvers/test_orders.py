"""Every deterministic solver reaches the exact ODE solution with its declared order."""

import math

import pytest
import torch

from analytic import GMM2D, exact_flow, gaussian, gaussian_flow, sample, slope, start_points, times_between
from pliant.paths import get_path, uniform_times
from pliant.solvers import SOLVERS, compile_program, get_solver

DETERMINISTIC = [name for name, cls in SOLVERS.items() if not cls().stochastic]
START = start_points()


def errors(path_name, solver, stored, counts=(96, 192, 384)):
    path = get_path(path_name)
    found, reference = [], None
    for n in counts:
        program = compile_program(path, times_between(path, n, -4.0, 4.0), solver, stored)
        if reference is None:
            reference = exact_flow(GMM2D, START, program.start, program.end)
        found.append(float((sample(program, GMM2D, START) - reference).abs().max()))
    return found


@pytest.mark.parametrize("path_name", ["vp", "linear"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_declared_one(name, path_name):
    solver = get_solver(name)
    assert slope(errors(path_name, solver, "epsilon")) == pytest.approx(solver.order, abs=0.12)


@pytest.mark.parametrize("fit", ["midpoint", "lagrange"])
def test_two_step_fits_are_second_order_and_differ(fit):
    found = errors("vp", {"name": "dpmpp-2m", "fit": fit}, "sample")
    assert slope(found) == pytest.approx(2.0, abs=0.1)
    other = errors("vp", {"name": "dpmpp-2m", "fit": "lagrange" if fit == "midpoint" else "midpoint"}, "sample")
    assert found[0] != pytest.approx(other[0], rel=1e-4)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_stored_kind_does_not_change_the_map(name):
    """Conversions are folded into coefficients: the same samples whatever the network predicts."""
    path = get_path("vp")
    times = times_between(path, 12, -3.0, 3.0)
    results = [
        sample(compile_program(path, times, name, kind), GMM2D, START)
        for kind in ("epsilon", "sample", "velocity", "v_prediction", "score")
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


# Sheet A, 4.3: end-point error of the linear path's ODE from x = 1 towards N(0, 2^2), exact velocity.
SIT_ODE = {
    "euler": (7.28e-2, 3.67e-2, 1.84e-2, 9.24e-3),
    "heun": (6.24e-4, 1.51e-4, 3.72e-5, 9.23e-6),
}


@pytest.mark.parametrize(("name", "expected"), SIT_ODE.items())
def test_sit_ode_errors(name, expected):
    solver = {"name": "heun", "last": "heun"} if name == "heun" else name
    start = torch.ones(1, 1, dtype=torch.float64)
    for steps, error in zip((40, 80, 160, 320), expected, strict=True):
        program = compile_program(get_path("linear"), uniform_times(steps), solver, "velocity")
        assert abs(float(sample(program, gaussian(2.0), start)) - 2.0) == pytest.approx(error, rel=5e-3)


def test_heun_saves_the_call_at_sigma_zero():
    program = compile_program(get_path("linear"), uniform_times(10), "heun", "velocity")
    assert program.num_evaluations == 19
    assert all(e.node.sigma > 0 for e in program.evaluations)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_and_back(name):
    """Noise to data and back on gmm2d: second order returns, first order misses (sheet D, section 1)."""
    path = get_path("vp")
    times = times_between(path, 64, -4.0, 4.0)
    down = compile_program(path, times, name, "epsilon")
    up = compile_program(path, times.flip(0), name, "epsilon")
    miss = float((sample(up, GMM2D, sample(down, GMM2D, START)) - START).abs().max())
    assert miss < (0.3 if get_solver(name).order == 1 else 4e-3)
    if name == "ddim":
        assert miss > 0.02


@pytest.mark.parametrize("path_name", ["vp-discrete", "linear", "gvp", "cosine"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m"])
def test_inversion_from_clean_data(name, path_name):
    """A grid that starts at sigma = 0 exactly: the encoding of a Gaussian approaches the exact one."""
    path, target = get_path(path_name), gaussian(0.7, 0.3)
    start = start_points(4, 1) * 0.7 + 0.3
    found = []
    for n in (100, 200):
        times = uniform_times(n, start=0.9).flip(0)
        program = compile_program(path, times, name, "epsilon")
        exact = gaussian_flow(target, start, program.start, program.end)
        found.append(float((sample(program, target, start) - exact).abs().max()))
    assert found[1] < 0.03 and found[0] / found[1] > 1.7


def test_mixing_solvers_per_step_still_converges():
    path = get_path("linear")
    mixed = ["heun", "dpmpp-2m", "euler", "midpoint", "ddim", "dpmpp-2m"]
    found = []
    for n in (96, 192):
        program = compile_program(path, times_between(path, n, -4.0, 4.0), [mixed[k % 6] for k in range(n)], "velocity")
        exact = exact_flow(GMM2D, START, program.start, program.end)
        found.append(float((sample(program, GMM2D, START) - exact).abs().max()))
    assert math.log2(found[0] / found[1]) > 0.9 and found[1] < 0.02
    assert program.labels[:3] == ("heun", "dpmpp-2m", "euler")
