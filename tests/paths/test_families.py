"""The path families against closed forms, tables and numerical derivatives (sheet C, 15.1-15.2; sheet A, 3.3 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.errors import ConfigError, ShapeError
from pliant.paths import (
    PREDICTION_TYPES,
    Coefficients,
    Path,
    VPDiscrete,
    conversion,
    get_path,
    known_paths,
    like,
    path_from_config,
    prediction_type,
)

ANALYTIC = ("linear", "vp", "cosine", "gvp")
PATHS = [
    *(get_path(name) for name in ANALYTIC),
    get_path("vp-discrete"),
    get_path("vp-discrete", betas="scaled-linear"),
    get_path("vp-discrete", num_timesteps=50),
]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: "-".join(str(v) for v in p.to_config().values()))
times = st.floats(0.02, 0.98)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Schedules --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(0.0, 1.0))
def test_closed_forms(t: float) -> None:
    linear, vp, cosine, gvp = (get_path(name).alpha_sigma(t) for name in ANALYTIC)
    assert [float(v) for v in linear] == [1 - t, t, -1, 1]
    assert float(vp.alpha) == pytest.approx(math.exp(-19.9 * t**2 / 4 - 0.1 * t / 2), rel=1e-12)
    f = [math.cos(math.pi / 2 * (s + 0.008) / 1.008) for s in (t, 0.0)]
    assert float(cosine.alpha) == pytest.approx(f[0] / f[1], abs=1e-12)
    assert float(gvp.alpha) == pytest.approx(math.cos(math.pi * t / 2), abs=1e-15)
    for s in (vp, cosine, gvp):
        assert float(s.alpha**2 + s.sigma**2) == pytest.approx(1.0, abs=1e-14)


@every_path
def test_ends(path: Path) -> None:
    ends = path.alpha_sigma(torch.tensor([0.0, 1.0]))
    assert ends.alpha[0] == 1
    assert ends.sigma[0] == 0
    assert float(ends.alpha[1]) < 0.08
    assert float(ends.sigma[1]) > 0.99
    assert path.log_snr(0.0) == math.inf
    assert path.time_of_log_snr(1e3) == pytest.approx(0.0, abs=1e-12)
    assert path.time_of_log_snr(-1e3) == pytest.approx(1.0, abs=1e-12)
    if path.name in ("linear", "gvp", "cosine"):
        assert path.log_snr(1.0) == -math.inf


@every_path
def test_derivatives(path: Path) -> None:
    """Check (2): the velocity is the central difference of x_t, and W = alpha sigma' - sigma alpha' is positive."""
    x0, eps = normal(20), normal(20, seed=1)
    # Off the table's nodes, where a discrete path has kinks.
    t = torch.linspace(0.025, 0.965, 20, dtype=torch.float64) + 0.00031
    h = 1e-6
    numeric = (path.mix(x0, eps, t + h) - path.mix(x0, eps, t - h)) / (2 * h)
    velocity = path.target("velocity", x0, eps, t)
    torch.testing.assert_close(velocity, numeric, rtol=1e-6, atol=1e-6)
    s = path.alpha_sigma(torch.linspace(0.001, 0.999, 500, dtype=torch.float64))
    assert bool((s.alpha * s.dsigma - s.sigma * s.dalpha > 0).all())


@every_path
def test_time_of_log_snr_is_the_inverse(path: Path) -> None:
    """Check (3)."""
    t = torch.cat([torch.linspace(0.0005, 0.9995, 777, dtype=torch.float64), torch.tensor([1e-6, 0.25, 0.5])])
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(t)), t, rtol=0, atol=1e-8)
    torch.testing.assert_close(path.time_of_noise_ratio(path.noise_ratio(t)), t, rtol=0, atol=1e-8)
    assert bool((path.log_snr(torch.linspace(0, 1, 1777)).diff() < 0).all())


@pytest.mark.parametrize(("name", "t"), [("linear", 0.75), ("vp", 0.476058), ("gvp", 0.795167), ("cosine", 0.793545)])
def test_time_of_noise_ratio_3(name: str, t: float) -> None:
    assert float(get_path(name).time_of_noise_ratio(3.0)) == pytest.approx(t, abs=1e-6)


# Tables -----------------------------------------------------------------------------------------------------------


def test_ddpm_table() -> None:
    """Sheet A, 3.3, and the recursion alpha_bar = prod(1 - beta)."""
    path = VPDiscrete()
    assert float(path.alphas_cumprod[0]) == pytest.approx(0.9999, abs=1e-12)
    assert float(path.alphas_cumprod[999]) == pytest.approx(4.0358e-5, rel=1e-4)
    product = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(path.alphas_cumprod, product, rtol=1e-12, atol=0)
    for count in (50, 250):  # rescaled tables keep about the same total noise
        assert float(VPDiscrete(num_timesteps=count).alphas_cumprod[-1]) < 1e-4


def test_stable_diffusion_table() -> None:
    """Sheet C, 15.1: noise ratios, and the rectified-flow times that match them."""
    path, linear = VPDiscrete(betas="scaled-linear"), get_path("linear")
    t = path.time_of_timestep(torch.tensor([0, 249, 499, 749, 999]))
    n = path.noise_ratio(t)
    assert n.tolist() == pytest.approx([0.029167, 0.693205, 1.612886, 4.081729, 14.614641], rel=2e-5)
    matched = linear.time_of_noise_ratio(n)
    assert matched.tolist() == pytest.approx([0.028341, 0.409404, 0.617281, 0.803217, 0.935958], abs=1e-6)


@pytest.mark.parametrize("count", [50, 999, 1000, 1024])
def test_table_entries_are_hit_exactly(count: int) -> None:
    """(k+1)/T*T is not always k+1 in floating point; the entry must not be missed by an interpolation."""
    path = VPDiscrete(num_timesteps=count)
    s = path.alpha_sigma(path.time_of_timestep(torch.arange(count)))
    torch.testing.assert_close(s.alpha**2, path.alphas_cumprod, rtol=1e-14, atol=0)


def test_between_entries_log_alpha_is_linear() -> None:
    path = VPDiscrete()
    t = path.time_of_timestep(torch.tensor([500.0, 500.25, 501.0]))
    low, quarter, high = torch.log(path.alpha_sigma(t).alpha).tolist()
    assert quarter == pytest.approx(0.75 * low + 0.25 * high, rel=1e-12)


# Predictions ------------------------------------------------------------------------------------------------------


@every_path
@settings(deadline=None, max_examples=20)
@given(t=times, seed=st.integers(0, 100))
def test_round_trips_of_all_predictions(path: Path, t: float, seed: int) -> None:
    """Check (1), and every kind is what `target` says it is for the pair that made the state."""
    x0, eps = normal(4, 3, seed=seed), normal(4, 3, seed=seed + 1000)
    x = path.mix(x0, eps, t)
    targets = {kind: path.target(kind, x0, eps, t) for kind in PREDICTION_TYPES}
    for start in PREDICTION_TYPES:
        for kind in PREDICTION_TYPES:
            there = path.convert(targets[start], x, t, start, kind)
            torch.testing.assert_close(there, targets[kind], rtol=1e-7, atol=1e-7)
            back = path.convert(there, x, t, kind, start)
            torch.testing.assert_close(back, targets[start], rtol=1e-7, atol=1e-7)


@every_path
def test_targets_by_definition(path: Path) -> None:
    """Sheet C, 15.2, written out: a sign or a factor in the solver of the 2x2 system would show."""
    t, x0, eps = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), normal(5), normal(5, seed=1)
    s = path.alpha_sigma(t)
    x = s.alpha * x0 + s.sigma * eps
    w = s.alpha * s.dsigma - s.sigma * s.dalpha
    v = s.dalpha * x0 + s.dsigma * eps
    u, score = s.alpha * eps - s.sigma * x0, -eps / s.sigma
    square = s.alpha**2 + s.sigma**2
    expected = {
        "epsilon": ((x - s.sigma * eps) / s.alpha, eps),
        "sample": (x0, (x - s.alpha * x0) / s.sigma),
        "velocity": ((s.dsigma * x - s.sigma * v) / w, (s.alpha * v - s.dalpha * x) / w),
        "score": ((x + s.sigma**2 * score) / s.alpha, -s.sigma * score),
        "v_prediction": ((s.alpha * x - s.sigma * u) / square, (s.sigma * x + s.alpha * u) / square),
    }
    values = {"epsilon": eps, "sample": x0, "velocity": v, "score": score, "v_prediction": u}
    for kind, (clean, noise) in expected.items():
        torch.testing.assert_close(clean, x0)
        torch.testing.assert_close(noise, eps)
        torch.testing.assert_close(path.convert(values[kind], x, t, kind, "sample"), x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(path.convert(values[kind], x, t, kind, "epsilon"), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(path.target(kind, x0, eps, t), values[kind], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
def test_velocity_and_score_as_sit_writes_them(name: str) -> None:
    """Sheet A, 4.2, in SiT's reversed time: `score = ((a/a') v - x)/(s^2 - (a/a') s' s)`; identities to 1e-10."""
    path = get_path(name)
    t = torch.linspace(0.04, 0.98, 48, dtype=torch.float64)  # its code time 0.02 ... 0.96
    x, v = normal(48), normal(48, seed=1)
    s = path.alpha_sigma(t)
    theirs, ratio = -v, s.alpha / -s.dalpha
    score = (ratio * theirs - x) / (s.sigma**2 - ratio * -s.dsigma * s.sigma)
    ours = path.convert(v, x, t, "velocity", "score")
    torch.testing.assert_close(ours, score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.convert(ours, x, t, "score", "velocity"), v, rtol=0, atol=1e-10)
    if name == "linear":
        code = 1 - t
        torch.testing.assert_close(score, (code * theirs - x) / (1 - code), rtol=1e-10, atol=1e-10)


def test_v_prediction_is_the_derivative_along_the_angle() -> None:
    """On the trigonometric path the angle is pi t/2, so velocity = pi/2 * v_prediction."""
    x, v, t = normal(9), normal(9, seed=1), torch.linspace(0.0, 1.0, 9)
    out = get_path("gvp").convert(v, x, t, "velocity", "v_prediction")
    torch.testing.assert_close(out, v / (math.pi / 2), rtol=1e-12, atol=1e-12)


def test_rectified_flow_never_divides_by_alpha() -> None:
    """x0 = x - t v and eps = x + (1-t) v at both ends, and the exact pair's targets are finite."""
    path, x, v = get_path("linear"), normal(2), normal(2, seed=1)
    t = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(path.convert(v, x, t, "velocity", "sample"), x - t * v)
    torch.testing.assert_close(path.convert(v, x, t, "velocity", "epsilon"), x + (1 - t) * v)


def test_equal_kinds_are_the_same_tensor() -> None:
    value = normal(3)
    assert get_path("vp").convert(value, normal(3), 0.0, "score", "score") is value


def test_conversion_keeps_the_shape_and_precision_of_time() -> None:
    s = get_path("vp").alpha_sigma(torch.full((2, 3), 0.5, dtype=torch.float32))
    p, q = conversion("epsilon", "sample", s)
    assert p.shape == q.shape == (2, 3)
    assert p.dtype == torch.float64


# One time per sample ----------------------------------------------------------------------------------------------


@every_path
def test_batched_times_equal_single_times(path: Path) -> None:
    """A batch as large as the last axis must not broadcast along it."""
    x0, eps = normal(4, 2, 4), normal(4, 2, 4, seed=1)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    together = path.mix(x0, eps, t)
    for i in range(4):
        alone = path.mix(x0[i], eps[i], float(t[i]))
        torch.testing.assert_close(together[i], alone, rtol=1e-6, atol=1e-6)
    with pytest.raises(ShapeError, match="batch is 4"):
        path.mix(x0, eps, t[:2])


def test_like_follows_dtype() -> None:
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    assert like(torch.tensor(0.5, dtype=torch.float64), x).shape == ()
    assert like(torch.tensor([0.5, 0.6]), x).shape == (2, 1, 1)
    assert like(torch.tensor([0.5, 0.6]), x).dtype == torch.bfloat16
    with pytest.raises(ShapeError):
        like(torch.zeros(2, 1), x)


# General paths, files, errors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interpolant(Path):
    """All three coefficients at work (not registered)."""

    name: ClassVar[str] = "test-interpolant"

    def coefficients(self, t: float | Tensor) -> Coefficients:
        t = torch.as_tensor(t, dtype=torch.float64)
        c = torch.sqrt(t * (1 - t))
        return Coefficients(1 - t, t, c, -torch.ones_like(t), torch.ones_like(t), (1 - 2 * t) / (2 * c))

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Bridge(Interpolant):
    gaussian_source: ClassVar[bool] = False


def test_a_gaussian_source_and_noise_merge() -> None:
    """sigma^2 = t^2 + t(1-t) = t, so sigma = sqrt(t), sigma' = 1/(2 sqrt(t))."""
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    s = Interpolant().alpha_sigma(t)
    torch.testing.assert_close(s.sigma, t.sqrt())
    torch.testing.assert_close(s.dsigma, 0.5 / t.sqrt())
    with pytest.raises(ConfigError, match="no alpha/sigma view"):
        Bridge().alpha_sigma(t)


@every_path
def test_config_round_trip(path: Path) -> None:
    assert path_from_config(path.to_config()) == path
    assert get_path(path) is path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "liner"}, "did you mean 'linear'"),
        ({}, "unknown path None"),
        ({"name": "vp", "beta": 3}, "does not take these fields"),
        ({"name": "vp-discrete", "betas": "cosine"}, "'linear'.*'scaled-linear'"),
        ({"name": "vp-discrete", "num_timesteps": 10}, "too few"),
    ],
)
def test_bad_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        path_from_config(config)


def test_unknown_predictions() -> None:
    assert {"cosine", "gvp", "linear", "vp", "vp-discrete"} <= set(known_paths())
    for call in (
        lambda: prediction_type("eps"),
        lambda: get_path("vp").target("noise", normal(1), normal(1), 0.5),
        lambda: get_path("vp").convert(normal(1), normal(1), 0.5, "velocty", "sample"),
    ):
        with pytest.raises(ConfigError, match="unknown prediction type"):
            call()
