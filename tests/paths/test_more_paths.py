"""Sub-VP, EDM, PFGM++, mean-reverting and one-sided interpolant paths (sheet C, 11-13 and 15; sheet D, 10 and 13.3)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import (
    EDM,
    PREDICTION_TYPES,
    MeanReverting,
    Path,
    PFGMpp,
    Preconditioning,
    VPContinuous,
    get_path,
    known_paths,
    path_from_config,
)

PATHS = [
    get_path("sub-vp"),
    get_path("edm"),
    get_path("edm", sigma_min=0.02, sigma_max=100.0),
    get_path("pfgmpp", dimensions=64),
    get_path("mean-reverting"),
    get_path("mean-reverting", theta="constant", sigma_inf=1.0),
    get_path("mean-reverting", theta="linear"),
    get_path("one-sided-interpolant"),
    get_path("one-sided-interpolant", kind="trig"),
    get_path("one-sided-interpolant", gamma="brownian"),
    get_path("one-sided-interpolant", gamma="quadratic", strength=4.0),
    get_path("one-sided-interpolant", kind="trig", gamma="sine-squared", strength=0.5),
    get_path("one-sided-interpolant", gamma="bump"),
]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: "-".join(str(v) for v in p.to_config().values()))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What every path must satisfy -------------------------------------------------------------------------------------


@every_path
def test_velocity_is_the_central_difference(path: Path) -> None:
    """Sheet C, 15, check (2): also W = alpha sigma' - sigma alpha' > 0, and the ends are data and most noise."""
    x0, eps = normal(20), normal(20, seed=1)
    t = torch.linspace(0.025, 0.965, 20, dtype=torch.float64) + 0.00031
    h = 1e-6
    numeric = (path.mix(x0, eps, t + h) - path.mix(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(path.target("velocity", x0, eps, t), numeric, rtol=1e-5, atol=1e-5)
    s = path.alpha_sigma(torch.linspace(0.001, 0.999, 500, dtype=torch.float64))
    assert bool((s.alpha * s.dsigma - s.sigma * s.dalpha > 0).all())
    start = path.alpha_sigma(0.0)
    assert float(start.alpha) == 1.0
    assert float(start.sigma) == 0.0


@every_path
def test_inverse_of_the_noise_ratio(path: Path) -> None:
    """Check (3)."""
    t = torch.cat([torch.linspace(0.0005, 0.9995, 777, dtype=torch.float64), torch.tensor([1e-6, 0.25, 0.5])])
    torch.testing.assert_close(path.time_of_noise_ratio(path.noise_ratio(t)), t, rtol=0, atol=1e-8)
    assert bool((path.log_snr(torch.linspace(0, 1, 1777)).diff() < 0).all())
    assert float(path.time_of_log_snr(1e3)) == pytest.approx(0.0, abs=1e-12)
    assert float(path.time_of_log_snr(-1e3)) == pytest.approx(1.0, abs=1e-12)


@every_path
@settings(deadline=None, max_examples=15)
@given(t=st.floats(0.02, 0.98), seed=st.integers(0, 100))
def test_round_trips_of_all_predictions(path: Path, t: float, seed: int) -> None:
    """Check (1): every kind from every kind, back again, and equal to the pair's own target."""
    x0, eps = normal(4, 3, seed=seed), normal(4, 3, seed=seed + 1000)
    x = path.mix(x0, eps, t)
    targets = {kind: path.target(kind, x0, eps, t) for kind in PREDICTION_TYPES}
    for start in PREDICTION_TYPES:
        for kind in PREDICTION_TYPES:
            there = path.convert(targets[start], x, t, start, kind)
            size = float(targets[kind].abs().max()) + float(x.abs().max())
            torch.testing.assert_close(there, targets[kind], rtol=1e-7, atol=1e-8 * size)
            torch.testing.assert_close(path.convert(there, x, t, kind, start), targets[start], rtol=1e-6, atol=1e-6)


@every_path
@settings(deadline=None, max_examples=25)
@given(st.floats(-5.0, 5.0))
def test_log_snr_round_trip(path: Path, wanted: float) -> None:
    t = path.time_of_log_snr(wanted)
    if 0.0 < float(t) < 1.0:
        assert float(path.log_snr(t)) == pytest.approx(wanted, abs=1e-8)


@every_path
def test_config_round_trip(path: Path) -> None:
    assert path_from_config(path.to_config()) == path


def test_offsets_are_zero_but_on_mean_reverting_paths() -> None:
    t = torch.linspace(0, 1, 5)
    for name in known_paths():
        offset = get_path(name).offset(t)
        assert offset.dtype == torch.float64
        assert bool((offset == 0).all()) == (name != "mean-reverting")


def test_names() -> None:
    new = {"sub-vp", "edm", "pfgmpp", "mean-reverting", "interpolant", "one-sided-interpolant"}
    assert new < set(known_paths())
    with pytest.raises(ConfigError, match="did you mean 'pfgmpp'"):
        get_path("pfgm++")


# Sub-VP -----------------------------------------------------------------------------------------------------------


def test_sub_vp() -> None:
    """Sheet C, 15.1: n = 2 sinh(bd t^2/4 + b0 t/2), and t(3) = 0.485055 (check (3))."""
    path = get_path("sub-vp")
    assert float(path.time_of_noise_ratio(3.0)) == pytest.approx(0.485055, abs=1e-6)
    for t in (1e-4, 0.3, 1.0):
        alpha = float(VPContinuous().alpha_sigma(t).alpha)
        s = path.alpha_sigma(t)
        assert float(s.alpha) == pytest.approx(alpha, rel=1e-12)
        assert float(s.sigma) == pytest.approx(1 - alpha**2, rel=1e-9)
        assert float(path.noise_ratio(t)) == pytest.approx(2 * math.sinh(19.9 * t**2 / 4 + 0.05 * t), rel=1e-9)
    assert float(path.alpha_sigma(0.0).dsigma) == pytest.approx(0.1)


# EDM --------------------------------------------------------------------------------------------------------------


def test_time_of_edm_is_sigma() -> None:
    path = EDM()
    s = path.alpha_sigma(torch.tensor([0.0, 0.5, 1.0, 1.4]))
    assert s.sigma.tolist() == pytest.approx([0.0, 40.0, 80.0, 112.0])  # churn may go beyond sigma_max
    assert s.alpha.tolist() == [1.0] * 4
    assert s.dsigma.tolist() == [80.0] * 4
    assert float(path.time_of_sigma(112.0)) == pytest.approx(1.4)
    assert path.trained_times == (0.002 / 80, 1.0)
    x, x0 = normal(5), normal(5, seed=1)
    torch.testing.assert_close(path.convert(x0, x, 0.1, "sample", "velocity"), 80 * (x - x0) / 8.0)


# PFGM++ -----------------------------------------------------------------------------------------------------------


def test_pfgmpp_noise_is_student_t() -> None:
    """Sheet C, 12, check (1): Kolmogorov-Smirnov < 0.012 and E R^2/N = D/(D-2) within 1 % (D = 8, N = 64)."""
    path = PFGMpp(dimensions=8)
    noise = path.sample_noise((20_000, 4, 4, 4), torch.Generator().manual_seed(0), torch.float64)
    assert noise.shape == (20_000, 4, 4, 4)
    flat = noise.flatten(1)
    assert stats.kstest(flat[:, 0].numpy(), stats.t(8).cdf).statistic < 0.012
    assert stats.kstest(flat[:, 0].numpy(), stats.norm.cdf).statistic > 0.012
    assert float(flat.square().sum(1).mean() / 64) == pytest.approx(8 / 6, rel=0.01)
    # One radius per sample: the elements of a sample are dependent.
    even, odd = flat[:, ::2].square().mean(1), flat[:, 1::2].square().mean(1)
    assert float(torch.corrcoef(torch.stack([even, odd]))[0, 1]) > 0.7


def test_pfgmpp_radius_quantiles() -> None:
    """Check (3): 1 %, 50 % and 99 % of R/(sigma sqrt N) for N = 1024, D = 256."""
    noise = PFGMpp(dimensions=256).sample_noise((12_000, 1024), torch.Generator().manual_seed(1))
    radius = noise.double().square().mean(1).sqrt()
    q = torch.quantile(radius, torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    assert q.tolist() == pytest.approx([0.8944, 1.0010, 1.1262], rel=5e-3)


def test_pfgmpp_tends_to_edm() -> None:
    """Check (2): D = 1e6 is Gaussian to 1 %, also in kurtosis, where small D shows."""
    gaussian = EDM().sample_noise((2000, 50), torch.Generator().manual_seed(2), torch.float64)
    noise = PFGMpp(dimensions=1_000_000).sample_noise((2000, 50), torch.Generator().manual_seed(2), torch.float64)
    torch.testing.assert_close(noise, gaussian, rtol=0.01, atol=0)
    heavy = PFGMpp(dimensions=8).sample_noise((2000, 50), torch.Generator().manual_seed(2), torch.float64)
    assert float(heavy.pow(4).mean() / gaussian.pow(4).mean()) > 1.5
    assert torch.equal(
        get_path("edm").sample_noise((3, 2), torch.Generator().manual_seed(5)),
        torch.randn(3, 2, generator=torch.Generator().manual_seed(5)),
    )


@pytest.mark.parametrize("dimensions", [8, 1_000_000])
def test_pfgmpp_losses_tend_to_edm_s(dimensions: int) -> None:
    """Check (2): with D = 1e6 EDM's loss is reproduced to 1 % at every sigma; with D = 8 it is not."""
    p, x0 = Preconditioning(), 0.5 * normal(4000, 16, seed=6)
    weight = normal(16, 16, seed=7) / 4.0

    def losses(path: Path) -> list[float]:
        noise = path.sample_noise((4000, 16), torch.Generator().manual_seed(8), torch.float64)
        found = []
        for sigma in (0.05, 0.5, 3.0, 40.0):
            skip, out, inp, _ = p.coefficients(sigma)
            x = x0 + sigma * noise
            estimate = skip * x + out * torch.tanh(inp * x @ weight)  # F: any network
            found.append(float(p.loss_weight(sigma) * (estimate - x0).square().mean()))
        return found

    ratios = [a / b for a, b in zip(losses(PFGMpp(dimensions=dimensions)), losses(EDM()), strict=True)]
    if dimensions == 8:
        assert max(abs(r - 1.0) for r in ratios) > 0.1
    else:
        assert ratios == pytest.approx([1.0] * 4, rel=0.01)


def test_pfgmpp_radius_and_kernel() -> None:
    path = PFGMpp(dimensions=16)
    assert float(path.radius(0.25)) == pytest.approx(20.0 * 4.0)
    assert float(path.time_of_radius(path.radius(0.37))) == pytest.approx(0.37)
    square = torch.tensor([1.0, 100.0, 10_000.0], dtype=torch.float64)
    expected = -(64 + 16) / 2 * torch.log(square + 80.0**2)
    torch.testing.assert_close(path.log_kernel(square, 64, 0.25), expected)


def test_pfgmpp_lands_on_data() -> None:
    """Check (4): the exact denoiser of a finite set, Heun in t from sigma 80 to 0.002, ends on data points."""
    path, data = PFGMpp(dimensions=32), normal(6, 3, seed=4)
    x = 80.0 * path.sample_noise((16, 3), torch.Generator().manual_seed(3), torch.float64)

    def slope(x: Tensor, t: float) -> Tensor:
        weights = torch.softmax(path.log_kernel(torch.cdist(x, data).square(), 3, t), dim=1)
        return path.convert(weights @ data, x, t, "sample", "velocity")

    levels = torch.linspace(80.0 ** (1 / 7), 0.002 ** (1 / 7), 60, dtype=torch.float64) ** 7 / 80.0
    for t, u in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        first = slope(x, t)
        x = x + 0.5 * (u - t) * (first + slope(x + (u - t) * first, u))
    distance, nearest = torch.cdist(x, data).min(1)
    assert float(distance.max()) < 0.01
    assert len(nearest.unique()) > 2


# Mean-reverting ---------------------------------------------------------------------------------------------------


def test_mean_reverting_table() -> None:
    """Sheet D, 10: theta_i = 1 - f(i+1)/f(0), C_i = sum_(j<=i) theta_j - theta_0, alpha_i = exp(-C_i dt)."""
    path, count, s = MeanReverting(), 100, 0.008
    f = [math.cos((j / (count + 2) + s) / (1 + s) * math.pi / 2) ** 2 for j in range(count + 3)]
    theta = [1 - f[i + 1] / f[0] for i in range(count + 1)]
    total = sum(theta) - theta[0]
    dt = -math.log(0.005) / total
    for i in (0, 1, 37, 100):
        c = sum(theta[: i + 1]) - theta[0]
        t = path.time_of_timestep(i)
        at = path.alpha_sigma(t)
        assert float(at.alpha) == pytest.approx(math.exp(-c * dt), rel=1e-12)
        assert float(at.sigma) == pytest.approx(50 / 255 * math.sqrt(1 - math.exp(-2 * c * dt)), rel=1e-9, abs=1e-12)
        assert float(path.offset(t)) == pytest.approx(1 - math.exp(-c * dt), rel=1e-12, abs=1e-15)
    assert float(path.alpha_sigma(1.0).alpha) == pytest.approx(0.005, rel=1e-12)
    assert path.trained_times == (0.01, 1.0)
    linear = torch.linspace(1e-4, 2e-2, 101, dtype=torch.float64)  # up to a factor, which the last alpha fixes
    decay = float(linear[1:31].sum() / linear[1:].sum())
    assert float(MeanReverting(theta="linear").alpha_sigma(0.3).alpha) == pytest.approx(0.005**decay, rel=1e-12)
    constant = MeanReverting(theta="constant").alpha_sigma(0.37)
    assert float(constant.alpha) == pytest.approx(0.005**0.37, rel=1e-12)


def test_mean_reversion() -> None:
    """The state drifts to mu; eps and x0 keep their meaning; translation of data and mu translates the state."""
    path, x0, eps, mu = MeanReverting(), normal(4, 5), normal(4, 5, seed=1), normal(4, 5, seed=2)
    t = torch.tensor([0.05, 0.3, 0.7, 1.0])
    x = path.mix(x0, eps, t, mu)
    s = path.alpha_sigma(t)
    alpha, sigma = s.alpha[:, None], s.sigma[:, None]
    torch.testing.assert_close(x, alpha * x0 + (1 - alpha) * mu + sigma * eps)
    torch.testing.assert_close(path.convert(eps, x, t, "epsilon", "sample", mu), x0)
    torch.testing.assert_close(path.convert(x0, x, t, "sample", "epsilon", mu), eps)
    torch.testing.assert_close(path.mix(x0 + 3, eps, t, mu + 3), x + 3)
    with pytest.raises(ConfigError, match="'velocity' is ambiguous"):
        path.convert(x0, x, t, "sample", "velocity", mu)


def test_velocity_of_mr_sampler() -> None:
    """Sheet D, 10: x0 = alpha x - sigma' v + (1-alpha) mu, eps = (alpha v + sigma'(x-mu))/sigma_inf."""
    path, x0, eps, mu = MeanReverting(), normal(7), normal(7, seed=1), normal(7, seed=2)
    s = path.alpha_sigma(0.4)
    v = s.alpha * eps * path.sigma_inf - s.sigma / path.sigma_inf * (x0 - mu)
    clean, noise = path.pair_of_velocity(v, path.mix(x0, eps, 0.4, mu), mu, 0.4)
    torch.testing.assert_close(clean, x0)
    torch.testing.assert_close(noise, eps)


def test_unit_mean_reversion_preserves_variance() -> None:
    """Check (1): sigma_inf = 1 is a VP path."""
    s = MeanReverting(sigma_inf=1.0).alpha_sigma(torch.linspace(0, 1, 50))
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones(50, dtype=torch.float64))


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "edm", "sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"name": "edm", "rho": 0.0}, "positive rho"),
        ({"name": "pfgmpp", "dimensions": 0}, "at least 1 augmented"),
        ({"name": "pfgmpp", "sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"name": "mean-reverting", "theta": "cosin"}, "did you mean 'cosine'"),
        ({"name": "mean-reverting", "sigma_inf": 0.0}, "sigma_inf > 0"),
        ({"name": "interpolant", "kind": "lienar"}, "did you mean 'linear'"),
        ({"name": "interpolant", "gamma": "browinan"}, "did you mean 'brownian'"),
        ({"name": "interpolant", "strength": 0.0}, "use gamma 'zero'"),
        ({"name": "interpolant", "kind": "trig", "strength": 8.0}, "gamma <= 1"),
        ({"name": "one-sided-interpolant", "kind": "mirror"}, "its source is noise"),
    ],
)
def test_bad_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        path_from_config(config)
