"""Stochastic interpolants between Gaussians, where everything has a closed form (sheet C, 11)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import GaussianInterpolant, Interpolant, get_path
from pliant.paths.interpolants import (
    GAMMAS,
    KINDS,
    antithetic_pair,
    complete,
    noise_of_score,
    quadratic_loss,
    score_of_noise,
    sde_drift,
    sde_noise,
    velocity_of_estimates,
    velocity_of_parts,
)

PATHS = [
    Interpolant(kind=kind, gamma=gamma, strength=0.9)
    for kind in KINDS
    for gamma in GAMMAS
    if (kind, gamma) != ("encoding-decoding", "zero")
]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{p.kind}-{p.gamma}")
EXAMPLE = Interpolant()  # linear, sqrt(2 s (1-s)): the paper's


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Gaussians:
    """Data N(m0, v0) at t = 0 and source N(m1, v1) at t = 1, independent: exact answers at states x and time t."""

    path: Interpolant
    m0: float = 0.7
    v0: float = 0.25
    m1: float = -1.1
    v1: float = 2.0

    def moments(self, t: float) -> tuple[float, float, float, float]:
        """Mean and variance of x_t, and their time derivatives."""
        s = self.path.coefficients(t)
        a, b, c, da, db = (float(v) for v in (s.a, s.b, s.c, s.da, s.db))
        product = float(self.path.gamma_product(t))
        variance = a * a * self.v0 + b * b * self.v1 + c * c
        slope = 2.0 * (a * da * self.v0 + b * db * self.v1 + product)
        return a * self.m0 + b * self.m1, variance, da * self.m0 + db * self.m1, slope

    def velocity(self, x: Tensor, t: float) -> Tensor:
        m, w, dm, dw = self.moments(t)
        return dm + 0.5 * dw / w * (x - m)

    def score(self, x: Tensor, t: float) -> Tensor:
        m, w, _, _ = self.moments(t)
        return -(x - m) / w

    def estimates(self, x: Tensor, t: float) -> dict[str, Tensor]:
        """E[x0|x], E[x1|x], E[z|x] by linear regression."""
        s = self.path.coefficients(t)
        m, w, _, _ = self.moments(t)
        rows = {"x0": (self.m0, float(s.a) * self.v0), "x1": (self.m1, float(s.b) * self.v1), "z": (0.0, float(s.c))}
        return {k: mean + cov / w * (x - m) for k, (mean, cov) in rows.items()}


# Coefficients -----------------------------------------------------------------------------------------------------


@every_path
def test_derivatives_and_ends(path: Interpolant) -> None:
    t = torch.linspace(0.011, 0.988, 41, dtype=torch.float64)
    h = 1e-6
    s, later, earlier = path.coefficients(t), path.coefficients(t + h), path.coefficients(t - h)
    for k in range(3):
        torch.testing.assert_close(s[k + 3], (later[k] - earlier[k]) / (2 * h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path.gamma_product(t), s.c * s.dc, rtol=1e-9, atol=1e-12)
    ends = path.coefficients(torch.tensor([0.0, 1.0]))
    assert ends.c.tolist() == [0.0, 0.0]
    assert ends.a.tolist() == [1.0, 1.0 if path.kind == "mirror" else 0.0]
    assert ends.b.tolist() == [0.0, 0.0 if path.kind == "mirror" else 1.0]
    assert bool(torch.isfinite(path.gamma_product(torch.tensor([0.0, 1.0]))).all())


def test_named_gammas() -> None:
    s = 0.3  # the paper's time; house time 0.7
    closed = {
        "brownian": math.sqrt(2 * s * (1 - s)),
        "quadratic": math.sqrt(2) * s * (1 - s),
        "sine-squared": math.sqrt(2) * math.sin(math.pi * s) ** 2,
        "zero": 0.0,
    }
    for gamma, value in closed.items():
        assert float(Interpolant(gamma=gamma).coefficients(1 - s).c) == pytest.approx(value, rel=1e-12)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    # c c' of Brownian is (1-2s)/2 in the paper's time, for strength 1; house time turns the sign
    torch.testing.assert_close(Interpolant(strength=1.0).gamma_product(t), (1 - 2 * t) / 2)
    for path in (Interpolant(gamma="quadratic"), Interpolant(gamma="bump")):  # finite slopes at the ends
        ends, near = path.coefficients(torch.tensor([0.0, 1.0])), path.coefficients(torch.tensor([1e-7, 1 - 1e-7]))
        torch.testing.assert_close(ends.dc, near.dc, rtol=1e-4, atol=1e-6)


def test_encoding_decoding_passes_through_noise() -> None:
    s = Interpolant(kind="encoding-decoding", gamma="sine-squared", strength=1.0).coefficients(0.5)
    assert [float(s.a), float(s.b), float(s.c)] == pytest.approx([0.0, 0.0, 1.0], abs=1e-15)


def test_one_sided_limits() -> None:
    """Without gamma: rectified flow and GVP. With it, x1 and z merge into one noise."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for kind, name in (("linear", "linear"), ("trig", "gvp")):
        one_sided, known = GaussianInterpolant(kind=kind).alpha_sigma(t), get_path(name).alpha_sigma(t)
        for ours, theirs in zip(one_sided, known, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    s = GaussianInterpolant(gamma="brownian").alpha_sigma(t)
    torch.testing.assert_close(s.sigma**2, t**2 + 2 * t * (1 - t))
    assert bool(torch.isfinite(s.dsigma[1:]).all())  # also at t = 1, where gamma' is not
    n = 3.0  # r = t/(1-t) with r^2 + 2r = n^2
    r = -1 + math.sqrt(1 + n * n)
    assert float(GaussianInterpolant(gamma="brownian").time_of_noise_ratio(n)) == pytest.approx(r / (1 + r), abs=1e-12)


def test_two_data_sets_have_no_log_snr() -> None:
    for call in (EXAMPLE.alpha_sigma, EXAMPLE.log_snr, EXAMPLE.time_of_log_snr):
        with pytest.raises(ConfigError, match="not Gaussian"):
            call(0.5)


# Check (1): the relations -----------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("t", [0.07, 0.31, 0.64, 0.95])
def test_relations_between_predictions(path: Interpolant, t: float) -> None:
    """B = V - c c' S, S = -eta/c, a eta_0 + b eta_1 + c eta = x, and the velocity from the three estimates."""
    exact, x = Gaussians(path), normal(50, seed=3)
    e, s = exact.estimates(x, t), path.coefficients(t)
    torch.testing.assert_close(s.a * e["x0"] + s.b * e["x1"] + s.c * e["z"], x, rtol=0, atol=1e-12)
    transport = s.da * e["x0"] + s.db * e["x1"]
    v = velocity_of_parts(path, transport, exact.score(x, t), t)
    torch.testing.assert_close(v, exact.velocity(x, t), rtol=0, atol=1e-6)
    if path.gamma == "zero":
        return
    torch.testing.assert_close(score_of_noise(path, e["z"], t), exact.score(x, t), rtol=0, atol=1e-9)
    torch.testing.assert_close(noise_of_score(path, exact.score(x, t), t), e["z"], rtol=0, atol=1e-9)
    for missing in ("x0", "x1", "z"):
        if float(getattr(s, {"x0": "a", "x1": "b", "z": "c"}[missing])) < 1e-9:
            continue
        all_three = complete(path, x, t, {k: value for k, value in e.items() if k != missing})
        torch.testing.assert_close(getattr(all_three, missing), e[missing], rtol=0, atol=1e-9)
        torch.testing.assert_close(velocity_of_estimates(path, all_three, t), exact.velocity(x, t), rtol=0, atol=1e-6)


def test_complete_needs_two() -> None:
    with pytest.raises(ConfigError, match="two of 'x0'"):
        complete(EXAMPLE, normal(3), 0.5, {"x0": normal(3)})


def test_moments_of_samples() -> None:
    """The state is what the coefficients say: a direct draw has the closed form's mean and variance."""
    exact, n = Gaussians(EXAMPLE), 200_000
    x0 = exact.m0 + math.sqrt(exact.v0) * normal(n, seed=1)
    x1 = exact.m1 + math.sqrt(exact.v1) * normal(n, seed=2)
    x = EXAMPLE.interpolate(x0, x1, normal(n, seed=3), 0.4)
    m, w, _, _ = exact.moments(0.4)
    assert float(x.mean()) == pytest.approx(m, abs=0.01)
    assert float(x.var()) == pytest.approx(w, rel=0.01)


# Checks (2) and (3): transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [EXAMPLE, Interpolant(kind="trig", gamma="quadratic", strength=1.0)])
def test_ode_is_affine_between_gaussians(path: Interpolant) -> None:
    """Check (2), from the source to data in house time: x = m0 + (x1 - m1) sqrt(v0/v1), 1e-4 with RK45."""
    from scipy.integrate import solve_ivp

    exact, x = Gaussians(path), normal(12, seed=5)

    def slope(t: float, y: object) -> object:
        return exact.velocity(torch.as_tensor(y), t).numpy()

    found = solve_ivp(slope, (1.0, 0.0), x.numpy(), rtol=1e-7, atol=1e-9)
    expected = exact.m0 + (x - exact.m1) * math.sqrt(exact.v0 / exact.v1)
    torch.testing.assert_close(torch.as_tensor(found.y[:, -1]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("towards", ["data", "source"])
def test_sde_keeps_the_marginals(strength: float, towards: str) -> None:
    """Check (3): Euler-Maruyama, 2000 steps, mean and variance within 1 %, by its exact moment recursion."""
    exact, steps = Gaussians(EXAMPLE), 2000
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64) if towards == "data" else None
    grid = (times if times is not None else torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()
    mean, variance, _, _ = exact.moments(grid[0])
    probe = torch.tensor([0.0, 1.0], dtype=torch.float64)  # the drift is affine in x: two points give it
    for t, u in pairwise(grid):
        drift = sde_drift(exact.velocity(probe, t), exact.score(probe, t), strength, towards)
        offset, slope = float(drift[0]), float(drift[1] - drift[0])
        h, noise = u - t, float(sde_noise(strength, u - t))
        mean, variance = mean + h * (offset + slope * mean), variance * (1 + h * slope) ** 2 + noise**2
    m, w, _, _ = exact.moments(grid[-1])
    assert mean == pytest.approx(m, rel=0.01)
    assert variance == pytest.approx(w, rel=0.01)


def test_sde_direction() -> None:
    with pytest.raises(ConfigError, match="'data' or 'source'"):
        sde_drift(normal(2), normal(2), 1.0, "back")
    assert torch.equal(sde_drift(normal(2), normal(2, seed=1), 0.0), normal(2))


# Check (4): antithetic states -------------------------------------------------------------------------------------


def test_antithetic_gradients_stay_bounded() -> None:
    """Gradient of the loss for a constant velocity model (a bias): variance about g'^2 plain, Var(x1 - x0) paired."""
    path, n, t = Interpolant(strength=1.0), 100_000, 1 - 1e-3  # s = 1e-3 in the paper's time
    x0, x1, z = normal(n, 1), normal(n, 1, seed=1), normal(n, 1, seed=2)
    s = path.coefficients(t)

    def gradients(sign: float) -> Tensor:
        bias = torch.zeros(n, 1, dtype=torch.float64, requires_grad=True)
        target = s.da * x0 + s.db * x1 + s.dc * sign * z
        (gradient,) = torch.autograd.grad(quadratic_loss(bias, target).sum(), bias)
        return gradient

    plain, paired = gradients(1.0), 0.5 * (gradients(1.0) + gradients(-1.0))
    assert float(plain.var()) == pytest.approx(250, rel=0.03)
    assert float(paired.var()) == pytest.approx(2.0, rel=0.03)
    assert float(plain.var() / paired.var()) > 50
    plus, minus = antithetic_pair(path, x0, x1, z, t)
    torch.testing.assert_close(0.5 * (plus + minus), s.a * x0 + s.b * x1)
    torch.testing.assert_close(0.5 * (plus - minus), s.c * z)


def test_quadratic_loss_is_minimal_at_the_target() -> None:
    target, other = normal(4, 3), normal(4, 3, seed=1)
    difference = quadratic_loss(other, target) - quadratic_loss(target, target)
    torch.testing.assert_close(difference, 0.5 * (other - target).square().sum(1))
