"""Stochastic samplers: exact variances of the schemes, and official DiT's step re-implemented."""

import math

import numpy as np
import pytest
import torch

from analytic import GAUSS1D, gaussian, noise_of, sample, start_points, times_between
from pliant.errors import PlanError
from pliant.paths import get_path, respaced_times, uniform_times
from pliant.solvers import Eval, Lin, Multistep, Output, compile_program, consistency, run, sde_times
from pliant.solvers.builder import nodes_of
from pliant.solvers.sde import DIFFUSIONS


def propagated_variance(program, std, code=0.0):
    """Variance of the sample when data is N(0, std^2): every exact prediction is linear in its state, so is
    the scheme.

    code: constant variance code u of the network.
    """
    slots = {slot: 1 + k for k, slot in enumerate(program.noise_slots)}
    unit = np.eye(1 + len(slots))
    x, m = {0: unit[0]}, {}
    one = torch.ones(1, 1, dtype=torch.float64)
    for op in program.instructions():
        if isinstance(op, Eval):
            m[op.out] = float(gaussian(std).predict(program.stored, one, op.node)) * x[op.state]
            continue
        row = sum(c * x[i] for i, c in op.x) + sum(c * m[j] for j, c in op.m)
        row = row + sum(c * unit[slots[k]] for k, c in op.z)
        if op.learned is not None:
            f = (code + 1) / 2
            log_variance = f * op.learned.log_high + (1 - f) * op.learned.log_low
            row = row + math.exp(0.5 * log_variance) * unit[slots[op.learned.slot]]
        x[op.out] = row
    return float(np.sum(x[program.final] ** 2))


# Sheet A, 3.5: final std / s for DDPM with 250 respaced steps and exact epsilon, by variance code.
DDPM_STD = {
    (0.5, -1): 0.9716, (1.0, -1): 0.9829, (2.0, -1): 0.9876,
    (0.5, 1): 1.0067, (1.0, 1): 0.9999, (2.0, 1): 0.9953,
}  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), DDPM_STD.items())
def test_ddpm_variance_table(case, expected):
    std, code = case
    path = get_path("vp-discrete")
    program = compile_program(path, respaced_times(path, "250"), "ddpm", "epsilon", variance=True)
    assert math.sqrt(propagated_variance(program, std, code)) / std == pytest.approx(expected, abs=1e-4)
    fixed = {"name": "ddpm", "variance": "beta" if code == 1 else "posterior"}
    program = compile_program(path, respaced_times(path, "250"), fixed, "epsilon")
    assert math.sqrt(propagated_variance(program, std)) / std == pytest.approx(expected, abs=1e-4)


def official_step(x, eps, code, z, k, kept, abar):
    """Official DiT's p_sample (gaussian_diffusion.py, learned range), written anew: x at index k -> x at
    index k-1.
    """
    respaced = abar[kept]
    previous = np.append(1.0, respaced[:-1])
    betas = 1.0 - respaced / previous
    posterior = betas * (1.0 - previous) / (1.0 - respaced)
    log_posterior = np.log(np.append(posterior[1], posterior[1:]))
    f = (code + 1) / 2
    log_variance = f * np.log(betas[k]) + (1 - f) * log_posterior[k]
    x0 = np.sqrt(1.0 / respaced[k]) * x - np.sqrt(1.0 / respaced[k] - 1.0) * eps
    mean = betas[k] * np.sqrt(previous[k]) / (1.0 - respaced[k]) * x0
    mean = mean + (1.0 - previous[k]) * np.sqrt(1.0 - betas[k]) / (1.0 - respaced[k]) * x
    return mean + (k != 0) * np.exp(0.5 * log_variance) * z


@pytest.mark.parametrize("spec", ["10", "250", "1000"])
def test_ddpm_is_official_dit(spec):
    path = get_path("vp-discrete")
    abar = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1000))
    times = respaced_times(path, spec)
    kept = np.rint(times[:-1].flip(0).numpy() * 1000).astype(int) - 1
    shape = (2, 3)
    noise = noise_of(shape)

    def network(x, t):
        return np.sin(3.0 * x + t), np.cos(2.0 * x)  # any nonlinear function; codes in [-1, 1]

    def evaluate(x, ev):
        eps, code = network(x.numpy(), ev.node.t)
        return Output(torch.from_numpy(eps), torch.from_numpy(code))

    x = start_points(*shape)
    theirs = x.numpy()
    program = compile_program(path, times, "ddpm", "epsilon", variance=True)
    for result, k in zip(run(program, x, evaluate, noise), reversed(range(len(kept))), strict=True):
        eps, code = network(theirs, float(times[result.index]))
        z = noise(program.noise_slots[result.index]).numpy() if k else np.zeros(shape)
        theirs = official_step(theirs, eps, code, z, k, kept, abar)
        np.testing.assert_allclose(result.x.numpy(), theirs, rtol=1e-9, atol=1e-10)


def test_ddpm_adds_no_noise_at_the_end_and_equals_ancestral_ddim():
    path = get_path("vp-discrete")
    times = respaced_times(path, "20")
    ddpm = compile_program(path, times, {"name": "ddpm", "variance": "posterior"}, "epsilon")
    ddim = compile_program(path, times, {"name": "ddim", "eta": 1.0}, "epsilon")
    assert len(ddpm.noise_slots) == 19
    torch.testing.assert_close(ddpm.normal_form().rows(), ddim.normal_form().rows(), rtol=1e-12, atol=1e-12)


def test_learned_range_needs_a_variance():
    path = get_path("vp-discrete")
    with pytest.raises(PlanError, match="posterior"):
        compile_program(path, respaced_times(path, "10"), "ddpm", "epsilon")
    program = compile_program(path, respaced_times(path, "10"), "ddpm", "epsilon", variance=True)
    with pytest.raises(PlanError, match="learned variance"):
        list(run(program, torch.zeros(1, 1), lambda x, ev: Output(x), lambda k: torch.zeros(1, 1)))


# Sheet A, 4.3: final variance / s^2 of SiT's Euler-Maruyama, 249 steps plus the 0.04 "mean" step.
SIT_SDE = {
    ("sigma", 0.5): 0.978, ("sigma", 2.0): 0.991,
    ("increasing-decreasing", 0.5): 0.989, ("increasing-decreasing", 2.0): 0.991,
    ("constant", 0.5): 0.693, ("constant", 2.0): 0.973,
}  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), SIT_SDE.items())
def test_sit_sde_variance_table(case, expected):
    diffusion, std = case
    solver = {"name": "sit-sde", "diffusion": diffusion}
    program = compile_program(get_path("linear"), sde_times(250), solver, "velocity")
    assert program.num_evaluations == 250 and len(program.noise_slots) == 249
    assert propagated_variance(program, std) / std**2 == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("diffusion", ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"])
@pytest.mark.parametrize("path_name", ["linear", "gvp", "vp"])
def test_every_diffusion_keeps_the_marginals(diffusion, path_name):
    """In the limit of small steps each D gives the data's variance; a wrong sign of the score does not."""
    path = get_path(path_name)
    times = torch.linspace(0.99, 0.05, 1001, dtype=torch.float64)
    program = compile_program(path, times, {"name": "sit-sde", "diffusion": diffusion}, "v_prediction")
    start, end = program.start, program.end
    std = 0.6
    before = start.alpha**2 * std**2 + start.sigma**2
    slots = len(program.noise_slots)
    assert slots == 1000
    # The scheme starts from variance 1; scale that part to the exact marginal.
    deterministic = program_gain(program, std) ** 2
    got = propagated_variance(program, std) - deterministic + deterministic * before
    assert got == pytest.approx(end.alpha**2 * std**2 + end.sigma**2, rel=0.03)


def program_gain(program, std):
    """How much of the start state is left in the sample."""
    m = gaussian(std)
    silent = lambda slot: torch.zeros(1, 1, dtype=torch.float64)  # noqa: E731
    return float(sample(program, m, torch.ones(1, 1, dtype=torch.float64), silent))


@pytest.mark.parametrize("last", ["mean", "tweedie", "euler"])
def test_sit_last_steps(last):
    program = compile_program(get_path("linear"), sde_times(50), {"name": "sit-sde", "last": last}, "velocity")
    lin = program.steps[-1][-1]
    assert isinstance(lin, Lin) and lin.z == ()
    # By hand, at t = 0.04 with velocity u: score = -(x + 0.96u)/0.04, h = -0.04, D = sigma = 0.04.
    expected = {
        "euler": (1.0, -0.04),
        "tweedie": (1.0, -0.04),  # x0 = x - t u
        "mean": (1.0 - 0.04, -0.04 - 0.04 * 0.96),
    }[last]
    assert (lin.x[0][1], lin.m[0][1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_eta_keeps_the_variance_when_x0_is_known(eta):
    path = get_path("vp")
    program = compile_program(path, uniform_times(30), {"name": "ddim", "eta": eta}, "sample")
    assert max(abs(r.data) for r in consistency(program)) < 1e-12
    assert max(abs(r.variance) for r in consistency(program)) < 1e-12


def test_ancestral_from_zero_signal():
    """eta = 1 at alpha = 0 (linear path, t = 1): the start is forgotten, nothing is infinite."""
    program = compile_program(get_path("linear"), uniform_times(4), {"name": "ddim", "eta": 1.0}, "velocity")
    first = program.steps[0][-1]
    assert isinstance(first, Lin)
    assert dict(first.z)[0] == pytest.approx(0.75)
    assert dict(first.x)[0] == pytest.approx(0.25)  # alpha_t * x0, x0 = x - u
    assert dict(first.m)[0] == pytest.approx(-0.25)


def test_monte_carlo_reproduces_gauss1d():
    path = get_path("vp")
    program = compile_program(path, uniform_times(100), {"name": "ddim", "eta": 1.0}, "epsilon")
    x = start_points(20000, 1, seed=1)
    got = sample(program, GAUSS1D, x, noise_of(x.shape, seed=2))
    assert float(got.mean()) == pytest.approx(0.3, abs=0.02)
    # The scheme is biased low by its first order; its own exact value is what samples must show.
    assert float(got.std()) == pytest.approx(math.sqrt(propagated_variance(program, 0.7)), abs=0.012)


def test_monte_carlo_of_the_sheet():
    """Sheet D, 1, DPM-Solver (4): tau = 1, log-SNR -5..5, 40 000 samples; 20 first-order steps fail."""
    path = get_path("vp")

    def moments(order, steps):
        program = compile_program(path, times_between(path, steps, -5.0, 5.0), Multistep(order, tau=1.0), "epsilon")
        x = start_points(40_000, 1, seed=3)
        got = sample(program, GAUSS1D, x, noise_of(x.shape, seed=4))
        return float(got.mean()), float(got.std())

    mean, std = moments(2, 200)
    assert mean == pytest.approx(0.30, abs=0.015) and std == pytest.approx(0.70, abs=0.015)
    assert moments(1, 20)[1] == pytest.approx(0.56, abs=0.015)  # and so not 0.70


def test_noise_is_refused_on_the_way_to_noise():
    for solver in ({"name": "ddim", "eta": 0.5}, {"name": "ddpm", "variance": "beta"}, "sit-sde"):
        with pytest.raises(PlanError, match="inversion"):
            compile_program(get_path("linear"), [0.1, 0.5, 0.9], solver, "velocity")


# Sheet A, 4.2, in SiT's own time tau = 1 - t: D by name, with its norm.
SIT_DIFFUSIONS = {
    "constant": lambda tau, norm: norm,
    "sbdm": lambda tau, norm: norm * ((1 / tau) * (1 - tau) ** 2 + (1 - tau)),  # (a'/a) s^2 - s s', linear path
    "sigma": lambda tau, norm: norm * (1 - tau),
    "linear": lambda tau, norm: norm * (1 - tau),
    "decreasing": lambda tau, norm: 0.25 * (norm * math.cos(math.pi * tau) + 1) ** 2,
    "increasing-decreasing": lambda tau, norm: norm * math.sin(math.pi * tau) ** 2,
}


@pytest.mark.parametrize("name", SIT_DIFFUSIONS)
def test_diffusion_coefficients_in_official_time(name):
    solver = {"name": "sit-sde", "diffusion": name, "norm": 0.7}
    program = compile_program(get_path("linear"), [0.3, 0.28], solver, "velocity")
    lin = program.steps[0][-1]
    assert isinstance(lin, Lin)
    d = SIT_DIFFUSIONS[name](0.7, 0.7)
    assert lin.z[0][1] == pytest.approx(math.sqrt(2 * d * 0.02), rel=1e-9)


def test_second_order_sde_removes_the_bias():
    """Sheet D, section 1, check 4: gauss1d, log-SNR -5..5; order 1 is biased low, order 2 is not."""
    path = get_path("vp")

    def std(solver, steps):
        program = compile_program(path, times_between(path, steps, -5.0, 5.0), solver, "epsilon")
        return math.sqrt(propagated_variance(program, 0.7))

    assert std(Multistep(1, tau=1.0), 200) == pytest.approx(0.68, abs=0.01)
    assert std(Multistep(1, tau=1.0), 20) == pytest.approx(0.56, abs=0.015)
    assert std({"name": "ddim", "eta": 1.0}, 20) == pytest.approx(std(Multistep(1, tau=1.0), 20), rel=1e-9)
    for fit in ("lagrange", "midpoint"):
        assert std(Multistep(2, fit=fit, tau=1.0), 200) == pytest.approx(0.70, abs=0.004)


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_sit_s_diffusions_by_their_formulas(t):
    """At house time t on the linear path: alpha = 1-t, sigma = t; a norm other than 1 shows where it multiplies."""
    node = nodes_of(get_path("linear"), [t])[0]
    want = {
        "constant": 0.7,
        "sbdm": 0.7 * t / (1 - t),
        "sigma": 0.7 * t,
        "linear": 0.7 * t,
        "decreasing": 0.25 * (0.7 * math.cos(math.pi * (1 - t)) + 1) ** 2,
        "increasing-decreasing": 0.7 * math.sin(math.pi * t) ** 2,
    }
    assert {name: rule(node, 0.7) for name, rule in DIFFUSIONS.items()} == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_the_sbdm_diffusion_where_sigma_bends(t):
    """alpha = cos, sigma = sin of pi t/2: `sigma sigma' - (alpha'/alpha) sigma^2 = pi/2 tan(pi t/2)`."""
    node = nodes_of(get_path("gvp"), [t])[0]
    assert DIFFUSIONS["sbdm"](node, 0.7) == pytest.approx(0.7 * math.pi / 2 * math.tan(math.pi * t / 2), rel=1e-9)
