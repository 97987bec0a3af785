"""Every solver converges with its declared order: a new solver is tested by being registered."""

import math
from functools import lru_cache

import pytest
import torch

from analytic import GMM2D, exact_flow, gaussian, gaussian_flow, sample, slope, start_points, times_between
from pliant.paths import get_path, uniform_times
from pliant.solvers import SOLVERS, compile_program, get_solver

DETERMINISTIC = [name for name, entry in SOLVERS.items() if not entry.alias and not entry().stochastic]
# A few of each kind, for the slower properties.
SOME = ["ddim", "dpmpp-2m", "dpmpp-3m", "dpm-2s", "dpmpp-3s-grid", "unipc-2", "plms", "f-pndm", "lms-4", "heun", "rk4",
        "heun-edm", "flow-ab-3", "usf"]  # fmt: skip
START = start_points()
# Steps at which the error has its asymptotic slope and is above the rounding of the reference.
COUNTS = {1: (96, 192), 2: (96, 192), 3: (192, 384), 4: (192, 384), 5: (48, 96)}
STARTERS = 5


@lru_cache
def reference(path_name, first=-4.0, last=4.0):
    path = get_path(path_name)
    program = compile_program(path, times_between(path, 1, first, last), "ddim", "epsilon")
    return exact_flow(GMM2D, START, program.start, program.end)


def errors(path_name, solver, stored="epsilon", counts=(96, 192, 384), starters=0):
    """Root mean square errors on gmm2d, log-SNR -4..4; the first `starters` steps are nearly exact."""
    path, found = get_path(path_name), []
    for n in counts:
        solvers = ["dormand-prince-5"] * starters + [solver] * (n - starters)
        program = compile_program(path, times_between(path, n, -4.0, 4.0), solvers, stored)
        found.append(float((sample(program, GMM2D, START) - reference(path_name)).square().mean().sqrt()))
    return found


def untapered(name):
    """Without lower orders at the end, which belong to short grids."""
    takes = "lower_order_final" in SOLVERS[name].takes
    return get_solver({"name": name, "lower_order_final": False} if takes else name)


def path_of(solver):
    return "linear" if solver.form == "velocity" else "vp"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_declared_one(name):
    solver = untapered(name)
    found = slope(errors(path_of(solver), solver, counts=COUNTS[solver.convergence], starters=STARTERS))
    if solver.convergence == 5:  # smooth problems flatter Dormand-Prince; its order conditions are tested below
        assert 4.85 < found < 6.2
    else:
        assert found == pytest.approx(solver.convergence, abs=0.15)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_a_cold_start(name):
    """Warm-up by lower orders costs little where the prediction hardly changes (near noise), but it does cost."""
    solver = untapered(name)
    found = slope(errors(path_of(solver), solver, counts=COUNTS[solver.convergence]))
    assert found > (solver.convergence - 0.15 if solver.convergence < 4 else 2.7)


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-3m", "unipc-2", "heun", "rk4", "plms", "heun-edm", "dpm-3s"])
@pytest.mark.parametrize("path_name", ["vp", "linear", "gvp"])
def test_order_on_other_paths(name, path_name):
    solver = untapered(name)
    counts = (48, 96) if solver.convergence < 4 else COUNTS[4]
    assert slope(errors(path_name, solver, counts=counts)) == pytest.approx(solver.convergence, abs=0.25)


def test_sheet_numbers():
    """Sheet D, 1 and 9: measured slopes and errors on gmm2d."""

    def largest(path_name, solver, n, times=None):
        path = get_path(path_name)
        times = times_between(path, n, -4.0, 4.0) if times is None else times
        program = compile_program(path, times, solver, "epsilon")
        exact = exact_flow(GMM2D, START, program.start, program.end)
        return float((sample(program, GMM2D, START) - exact).abs().max())

    ab = [largest("vp", "unipc-1", n) for n in (96, 192, 384)]
    assert slope(ab) == pytest.approx(2.0, abs=0.05)
    off = {"name": "unipc-2", "disable_corrector": list(range(400)), "lower_order_final": False}
    assert slope([largest("vp", off, n) for n in (96, 192)]) == pytest.approx(2.0, abs=0.15)  # the corrector gave one
    # Rectified flow, uniform grid: the midpoint rule ten times better than Euler at these counts.
    rf = [largest("linear", "rf-solver", n, uniform_times(n, 0.999, 0.001)) for n in (8, 16, 32)]
    euler = [largest("linear", "euler", n, uniform_times(n, 0.999, 0.001)) for n in (8, 16, 32)]
    assert 1.6 < slope(rf) < 2.2 and 0.8 < slope(euler) < 1.15
    assert all(a < b / 10 for a, b in zip(rf, euler, strict=True))


@pytest.mark.parametrize("fit", ["midpoint", "lagrange"])
def test_two_step_fits_are_second_order_and_differ(fit):
    found = errors("vp", {"name": "dpmpp-2m", "fit": fit}, "sample", (48, 96))
    assert slope(found) == pytest.approx(2.0, abs=0.1)
    other = errors("vp", {"name": "dpmpp-2m", "fit": "lagrange" if fit == "midpoint" else "midpoint"}, "sample", (48,))
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
    solver = {"name": "heun", "last": "full"} if name == "heun" else name
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
    path, solver = get_path("vp"), untapered(name)
    times = times_between(path, 64, -4.0, 4.0)
    down = compile_program(path, times, solver, "epsilon")
    up = compile_program(path, times.flip(0), solver, "epsilon")
    miss = float((sample(up, GMM2D, sample(down, GMM2D, START)) - START).abs().max())
    assert miss < (0.3 if solver.convergence == 1 else 0.015 if solver.convergence < 4 else 0.05)
    if name == "ddim":
        assert 0.05 < miss < 0.2  # 0.113 in the sheet
    if name == "dpmpp-2m":
        assert miss < 1e-3  # 3e-4 in the sheet


@pytest.mark.parametrize("path_name", ["vp-discrete", "linear", "gvp", "cosine"])
@pytest.mark.parametrize("name", SOME)
def test_inversion_from_clean_data(name, path_name):
    """A grid that starts at sigma = 0 exactly: the encoding of a Gaussian approaches the exact one."""
    if get_solver(name).form == "velocity" and path_name in ("vp-discrete", "cosine"):
        pytest.skip("the velocity of this path is infinite at data")
    path, target = get_path(path_name), gaussian(0.7, 0.3)
    start = start_points(4, 1) * 0.7 + 0.3
    found = []
    for n in (60, 120):
        times = uniform_times(n, start=0.9).flip(0)
        program = compile_program(path, times, name, "epsilon")
        exact = gaussian_flow(target, start, program.start, program.end)
        found.append(float((sample(program, target, start) - exact).abs().max()))
    assert found[1] < 0.05 and (found[0] / found[1] > 1.5 or found[1] < 2e-3)


@pytest.mark.parametrize("path_name", ["linear", "gvp"])
@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "angle-ab-2"])
def test_from_pure_noise_to_clean_data_and_to_pure_noise(name, path_name):
    """t = 1 (alpha = 0) to t = 0 (sigma = 0) and back: nothing infinite, and close to the exact map for a Gaussian."""
    path, target = get_path(path_name), gaussian(0.7, 0.3)
    start = start_points(4, 1)
    program = compile_program(path, uniform_times(40), name, "velocity")
    exact = gaussian_flow(target, start, program.start, program.end)
    got = sample(program, target, start)
    assert float((got - exact).abs().max()) < 0.08
    times = uniform_times(40).flip(0)
    back = sample(compile_program(path, times, name, "velocity"), target, exact)
    assert float((back - start).abs().max()) < 0.25


def test_rf_solver_reconstructs_better_than_euler():
    """Sheet D, 9(3): invert then generate with 2N calls each, N = 8; and 2 calls per step."""
    path = get_path("linear")
    data = START * 0.3 + 0.1

    def miss(solver, steps):
        times = uniform_times(steps, 0.95, 0.02)
        up = compile_program(path, times.flip(0), solver, "velocity")
        down = compile_program(path, times, solver, "velocity")
        return float((sample(down, GMM2D, sample(up, GMM2D, data)) - data).abs().max())

    assert miss("rf-solver", 8) < miss("euler", 16) / 5
    assert compile_program(path, uniform_times(8), "rf-solver", "velocity").num_evaluations == 16


def test_edm_heun_errors_of_the_sheet():
    """Sheet D, 13.3: gmm2d from sigma = 80 on EDM's grid; errors fall like h^2."""
    path = get_path("edm")
    start = START * 80.0
    found = []
    for n in (5, 10, 18):
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        times = torch.cat([path.time_of_noise_ratio(sigmas), torch.zeros(1, dtype=torch.float64)])
        program = compile_program(path, times, "heun-edm", "epsilon")
        assert program.num_evaluations == 2 * n - 1
        exact = exact_flow(GMM2D, start, program.start, program.end)
        found.append(float((sample(program, GMM2D, start) - exact).abs().max()))
    assert found[0] == pytest.approx(1.59, rel=0.6)
    assert found[0] / found[2] > 10 and found[2] < 0.12


def test_mixing_solvers_per_step_still_converges():
    path = get_path("linear")
    mixed = ["heun", "dpmpp-2m", "euler", "unipc-2", "midpoint", "ddim", "plms", "dpmpp-2m"]
    found = []
    for n in (96, 192):
        program = compile_program(path, times_between(path, n, -4.0, 4.0), [mixed[k % 8] for k in range(n)], "velocity")
        exact = exact_flow(GMM2D, START, program.start, program.end)
        found.append(float((sample(program, GMM2D, START) - exact).abs().max()))
    assert math.log2(found[0] / found[1]) > 0.9 and found[1] < 0.02
    assert program.labels[:3] == ("heun", "dpmpp-2m", "euler")
