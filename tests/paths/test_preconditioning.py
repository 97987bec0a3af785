"""EDM's preconditioning and samplers (sheet C, 13; sheet D, 13.3)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from analytic import GMM2D, exact_flow, gaussian, sample, start_points
from pliant.errors import ConfigError
from pliant.paths import EDM, Preconditioning, get_path, make_grid
from pliant.paths.preconditioning import PreconditioningKind, iddpm_sigmas, vp_sigma, vp_time
from pliant.solvers import compile_program, get_solver
from pliant.solvers.builder import nodes_of

PATH = EDM()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Check (1) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.5, 1.0, 0.3])
def test_at_sigma_data(sd: float) -> None:
    p = Preconditioning(sigma_data=sd)
    assert float(p.c_skip(sd)) == pytest.approx(0.5)
    assert float(p.c_out(sd)) == pytest.approx(sd / math.sqrt(2))
    assert float(p.c_in(sd)) == pytest.approx(1 / (sd * math.sqrt(2)))
    assert float(p.c_noise(sd)) == pytest.approx(math.log(sd) / 4)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0])
    torch.testing.assert_close(p.loss_weight(sigma), (sigma.double() ** 2 + sd**2) / (sigma.double() * sd) ** 2)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0, 60.0])
def test_unit_variances(sigma: float) -> None:
    p, x0, eps = Preconditioning(), 0.5 * normal(200_000), normal(200_000, seed=1)
    x = x0 + sigma * eps
    skip, out, inp, _ = p.coefficients(sigma)
    assert float((inp * x).var()) == pytest.approx(1.0, rel=0.01)
    target = (x0 - skip * x) / out
    assert float(target.var()) == pytest.approx(1.0, rel=0.01)
    torch.testing.assert_close(skip * x + out * target, x0)


@pytest.mark.parametrize("kind", ["edm", "vp", "ve", "iddpm"])
def test_on_other_paths(kind: PreconditioningKind) -> None:
    """The same D: y = x/alpha, sigma = noise ratio."""
    p = Preconditioning(kind)
    for name in ("linear", "vp", "gvp"):
        s = get_path(name).alpha_sigma(torch.tensor([0.2, 0.7]))
        ours, plain = p.coefficients(s.sigma, s.alpha), p.coefficients(s.sigma / s.alpha)
        torch.testing.assert_close(ours.skip, plain.skip / s.alpha)
        torch.testing.assert_close(ours.inp, plain.inp / s.alpha)
        torch.testing.assert_close(ours.out, plain.out)
        torch.testing.assert_close(ours.noise, plain.noise)


def test_pure_noise_is_finite() -> None:
    pure = Preconditioning().coefficients(1.0, 0.0)
    assert [float(pure.skip), float(pure.out), float(pure.inp)] == [0.0, 0.5, 1.0]


# The other rows ---------------------------------------------------------------------------------------------------


def test_vp_row_is_the_vp_path() -> None:
    """D = y - sigma F is x0 of an epsilon network on the VP path; c_noise = 999 t."""
    sigma = torch.tensor([0.02, 1.0, 30.0], dtype=torch.float64)
    c = Preconditioning("vp").coefficients(sigma)
    path = get_path("vp")
    t = path.time_of_noise_ratio(sigma)
    torch.testing.assert_close(c.noise, 999 * t)
    y, f = normal(3), normal(3, seed=1)
    x = y * c.inp  # c_in = alpha turns the VE state into the VP state
    torch.testing.assert_close(c.inp, path.alpha_sigma(t).alpha)
    torch.testing.assert_close(c.skip * y + c.out * f, path.convert(f, x, t, "epsilon", "sample"))


def test_vp_times() -> None:
    """Check (4): t(sigma(t)) = t to 1e-6."""
    t = torch.linspace(1e-5, 1, 500, dtype=torch.float64)
    torch.testing.assert_close(vp_time(vp_sigma(t)), t, rtol=0, atol=1e-9)
    assert float(vp_sigma(1.0)) == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1), rel=1e-12)


def test_ve_row() -> None:
    """F estimates -eps: D = y + sigma F; c_noise = ln(sigma/2)."""
    c = Preconditioning("ve").coefficients(torch.tensor([0.02, 5.0], dtype=torch.float64))
    assert c.skip.tolist() == c.inp.tolist() == [1.0, 1.0]
    assert c.out.tolist() == [0.02, 5.0]
    assert c.noise.tolist() == pytest.approx([math.log(0.01), math.log(2.5)])


def test_iddpm_table() -> None:
    """Nichol-Dhariwal's levels: u = noise ratios of the clipped cosine table; c_noise counts from the clean end."""
    u = iddpm_sigmas()
    assert len(u) == 1000
    assert bool((u.diff() < 0).all())
    # Without the clip (C1) the table is the cosine path; it acts on the noisiest steps only.
    k = torch.arange(1, 900, dtype=torch.float64)
    angle = 0.5 * math.pi * (k / 1000 + 0.008) / 1.008
    clean = torch.sqrt((math.cos(0.5 * math.pi * 0.008 / 1.008) / torch.cos(angle)) ** 2 - 1.0)
    torch.testing.assert_close(u.flip(0)[:899], clean, rtol=0.02, atol=0)
    p = Preconditioning("iddpm")
    assert p.c_noise(u[[0, 400, 999]]).tolist() == [999, 599, 0]
    assert p.c_noise(u[400] * 1.0001).tolist() == 599
    assert float(p.round_sigma(u[400] * 1.0001)) == float(u[400])
    assert float(Preconditioning().round_sigma(3.21)) == 3.21


def test_configs() -> None:
    for p in (Preconditioning(), Preconditioning("ve"), Preconditioning(sigma_data=1.0)):
        assert Preconditioning.from_config(p.to_config()) == p
    with pytest.raises(ConfigError, match="did you mean 'iddpm'"):
        Preconditioning("ddpm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sigma_data must be positive"):
        Preconditioning(sigma_data=0.0)
    with pytest.raises(ConfigError, match="takes kind and sigma_data"):
        Preconditioning.from_config({"data": 1})


# Check (3): samplers on the path ----------------------------------------------------------------------------------


def final_std(steps: int, solver: str, end: bool) -> float:
    """The factor by which Gaussian data's spread is off: the sampler is linear, so one state tells."""
    data = gaussian(0.5)
    times = make_grid(PATH, steps, "karras")
    program = compile_program(PATH, times if end else times[:-1], solver, "sample")
    start = math.sqrt(80.0**2 + 0.25)
    x = sample(program, data, torch.full((1, 1), start, dtype=torch.float64))
    return float(x)


@pytest.mark.parametrize(("steps", "error"), [(20, 0.02183), (40, 0.00489), (80, 0.001155)])
def test_heun_on_gaussian_data(steps: int, error: float) -> None:
    assert abs(final_std(steps, "heun", True) - 0.5) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("steps", "error"), [(20, 0.0695), (40, 0.0351), (80, 0.0177)])
def test_euler_on_gaussian_data(steps: int, error: float) -> None:
    """Compared at sigma_min."""
    exact = math.sqrt(0.25 + 0.002**2)
    assert abs(final_std(steps, "euler", False) - exact) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("steps", "error"), [(5, 1.59), (10, 0.21), (18, 0.051)])
def test_heun_on_a_mixture(steps: int, error: float) -> None:
    """Sheet D, 13.3: decay of the largest error on gmm2d from sigma = 80 (that sheet's start states are other ones)."""
    x = 80.0 * start_points()
    program = compile_program(PATH, make_grid(PATH, steps, "karras"), "heun", "sample")
    found = sample(program, GMM2D, x)
    start, end = nodes_of(PATH, [1.0, 0.0])
    worst = float((found - exact_flow(GMM2D, x, start, end)).abs().max())
    assert error / 1.5 < worst < error * 1.5


@pytest.mark.parametrize(("steps", "ratio"), [(64, 1.0411), (128, 1.0148), (256, 1.0038)])
def test_churn_inflates_the_variance(steps: int, ratio: float) -> None:
    """S_churn = 40, S_noise = 1 at every level. The sampler is linear here, and row k of the batch carries noise k."""
    solver = {"name": "edm-churn", "churn": 40.0, "low": 0.0, "high": math.inf, "noise": 1.0}
    program = compile_program(PATH, make_grid(PATH, steps, "karras"), get_solver(solver), "sample")
    rows = 1 + len(program.noise_slots)
    start = torch.zeros(rows, 1, dtype=torch.float64)
    start[0] = math.sqrt(80.0**2 + 0.25)
    place = {slot: k + 1 for k, slot in enumerate(program.noise_slots)}

    def noise(slot: int) -> Tensor:
        one = torch.zeros(rows, 1, dtype=torch.float64)
        one[place[slot]] = 1.0
        return one

    variance = float(sample(program, gaussian(0.5), start, noise).square().sum())
    assert variance / 0.25 == pytest.approx(ratio, rel=0.01)
