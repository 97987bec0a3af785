"""Time grids, time densities and networks' own times (sheet A, 3.3; SD3, arXiv 2403.03206)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.errors import ConfigError, PlanError
from pliant.paths import (
    NetworkTime,
    VPDiscrete,
    default_times,
    get_path,
    get_time_density,
    log_snr_times,
    resolution_shift,
    respaced_times,
    shifted_times,
    uniform_times,
)

DDPM = VPDiscrete()


def timesteps(spec: str | int, path: VPDiscrete = DDPM) -> list[int]:
    """The table entries of a respaced grid, ascending."""
    times = respaced_times(path, spec)
    assert times.dtype == torch.float64
    assert times[-1] == 0
    return [round(float(t)) for t in (times[:-1] * path.num_timesteps - 1).flip(0)]


# Respacing --------------------------------------------------------------------------------------------------------


def test_respacing_of_the_official_code() -> None:
    kept = timesteps(250)
    assert kept[:6] == [0, 4, 8, 12, 16, 20]
    assert kept[-3:] == [991, 995, 999]
    assert len(kept) == 250
    assert timesteps("250") == [round(i * 999 / 249) for i in range(250)]
    kept = timesteps("50")
    assert kept[:5] == [0, 20, 41, 61, 82]
    assert kept[-2:] == [979, 999]
    assert timesteps("ddim50") == list(range(0, 1000, 20))
    assert timesteps("ddim25") == list(range(0, 1000, 40))
    assert timesteps(1) == [0]
    assert timesteps(2) == [0, 999]
    assert timesteps("10,20,30") == [
        *(round(i * 333 / 9) for i in range(10)),
        *(334 + round(i * 332 / 19) for i in range(20)),
        *(667 + round(i * 332 / 29) for i in range(30)),
    ]


def test_halves_round_to_even() -> None:
    """3 of 6 entries lie at 0, 2.5, 5: Python rounds to 2, a schoolbook to 3."""
    path = VPDiscrete(num_timesteps=60)
    assert timesteps("3,3,3,3,3,3,3,3,3,3", path) == [6 * i + k for i in range(10) for k in (0, 2, 5)]


def test_respacing_1000_is_the_original_process() -> None:
    """`beta'_i = 1 - abar(tau_i)/abar(tau_(i-1))` are the table's betas to 1e-12; the network sees 999 first."""
    times = respaced_times(DDPM, "1000")
    alpha_bar = DDPM.alpha_sigma(times.flip(0)).alpha ** 2  # 1 at clean data first
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    torch.testing.assert_close(betas, torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(NetworkTime.timesteps().encode(times[0])) == pytest.approx(999, abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_any_number_of_steps_can_be_kept(count: int) -> None:
    times = respaced_times(DDPM, count)
    assert len(times) == count + 1
    assert bool((times.diff() < 0).all())
    assert times[0] == (1.0 if count > 1 else 0.001)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ddim300", "use '300'"),
        ("0", "0 of 1000"),
        ("1001", "1001 of 1000"),
        ("ten", "is not a number of steps"),
        ("10,,3", "is not a number of steps"),
        ("ddim", "is not a number of steps"),
        ("-3", "is not a number of steps"),
    ],
)
def test_bad_respacings(spec: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        respaced_times(DDPM, spec)


def test_respacing_needs_a_table() -> None:
    with pytest.raises(PlanError, match="use uniform_times"):
        respaced_times(get_path("linear"), "50")  # type: ignore[arg-type]


# Other grids ------------------------------------------------------------------------------------------------------


def test_uniform() -> None:
    assert uniform_times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert uniform_times(2, 0.9, 0.1).tolist() == pytest.approx([0.9, 0.5, 0.1])
    for grid in (uniform_times, lambda n: log_snr_times(DDPM, n), lambda n: default_times(DDPM, n)):
        with pytest.raises(PlanError, match="at least 1 step"):
            grid(0)  # type: ignore[no-untyped-call]


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 30))
def test_shifts(a: float, b: float, steps: int) -> None:
    """The shift multiplies the linear path's noise ratio, so shifts compose by multiplication; ends stay."""
    grid = uniform_times(steps)
    shifted = shifted_times(grid, a)
    assert shifted[0] == pytest.approx(1, abs=1e-15)
    assert shifted[-1] == 0
    linear = get_path("linear")
    torch.testing.assert_close(linear.noise_ratio(shifted[1:]), a * linear.noise_ratio(grid[1:]), rtol=1e-9, atol=0)
    torch.testing.assert_close(shifted_times(shifted, b), shifted_times(grid, a * b), rtol=1e-9, atol=1e-12)


def test_shift_of_sd3() -> None:
    assert torch.equal(shifted_times(uniform_times(7), 1.0), uniform_times(7))
    assert float(shifted_times(torch.tensor(0.5), 3.0)) == 0.75
    with pytest.raises(PlanError, match="must be positive"):
        shifted_times(uniform_times(3), 0.0)


@pytest.mark.parametrize("name", ["linear", "vp", "cosine", "gvp", "vp-discrete"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_log_snr_grid(name: str, steps: int) -> None:
    path = get_path(name)
    times = log_snr_times(path, steps)
    assert len(times) == steps + 1
    assert [float(times[0]), float(times[-1])] == [1.0, 0.0]
    assert bool((times.diff() < 0).all())
    if steps == 10:
        gaps = path.log_snr(times[1:-1]).diff()
        torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-6, atol=1e-6)
        assert float(times[-2]) == pytest.approx(1e-3, rel=1e-6)


def test_default_grids() -> None:
    assert torch.equal(default_times(DDPM, 50), respaced_times(DDPM, "50"))
    assert torch.equal(default_times(get_path("linear"), 50), uniform_times(50))


# Network time -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.floats(0, 1),
    st.builds(NetworkTime, st.sampled_from([1.0, 999.0, 1000.0]), st.floats(-1, 1), st.booleans()),
)
def test_network_time_round_trip(t: float, time: NetworkTime) -> None:
    assert float(time.decode(time.encode(torch.tensor(t, dtype=torch.float64)))) == pytest.approx(t, abs=1e-9)
    assert NetworkTime.from_config(time.to_config()) == time
    assert time.sign == (-1 if time.reversed else 1)


def test_known_network_times() -> None:
    """Sheet C, 15.4."""
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    assert NetworkTime.timesteps().encode(t).tolist() == pytest.approx([0, 499, 999])
    assert NetworkTime.sit().encode(t).tolist() == pytest.approx([0.999, 0.5, 0.0])
    assert NetworkTime(scale=1000.0).encode(t).tolist() == pytest.approx([1, 500, 1000])
    with pytest.raises(ConfigError, match="takes scale, offset, reversed"):
        NetworkTime.from_config({"factor": 2})


# Time densities ---------------------------------------------------------------------------------------------------


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def cosmap_cdf(t: Tensor) -> Tensor:
    """SD3's density `2/(pi - 2 pi t + 2 pi t^2)`, integrated: arctan."""
    return 0.5 + 2 / math.pi * torch.atan(2 * t - 1)


def mode_cdf(t: Tensor, s: float = 0.8) -> Tensor:
    """P(T <= t) = P(u >= u(t)) for the decreasing map of SD3; inverted by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u) > t
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - low


@pytest.mark.parametrize(
    ("name", "options", "cdf"),
    [
        ("uniform", {}, lambda t: t),
        ("uniform", {"low": 0.2, "high": 0.6}, lambda t: (t - 0.2) / 0.4),
        ("logit-normal", {}, lambda t: normal_cdf(torch.logit(t))),
        ("logit-normal", {"mean": 0.5, "std": 0.6}, lambda t: normal_cdf((torch.logit(t) - 0.5) / 0.6)),
        ("cosmap", {}, cosmap_cdf),
        ("mode", {"scale": 0.8}, mode_cdf),
        ("mode", {"scale": 0.0}, lambda t: t),
    ],
)
def test_densities(name: str, options: dict[str, float], cdf: Callable[[Tensor], Tensor]) -> None:
    """Kolmogorov-Smirnov against the closed form: 20,000 draws are uniform under their own distribution function."""
    density = get_time_density(name, **options)
    t = density.sample(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64
    assert bool(((t > 0) & (t < 1)).all())
    levels = cdf(t).sort().values
    distance = (levels - torch.arange(1, 20_001, dtype=torch.float64) / 20_000).abs().max()
    assert float(distance) < 1.63 / math.sqrt(20_000)  # 1 % level
    assert torch.equal(t, density.sample(20_000, torch.Generator().manual_seed(0)))
    config = density.to_config()
    assert get_time_density(config.pop("name"), **config) == density


@pytest.mark.parametrize(
    ("name", "options", "std"),
    [
        ("uniform", {}, math.sqrt(1 / 12)),
        ("logit-normal", {}, 0.2082),
        ("mode", {"scale": 1.29}, 0.21540),
        ("mode", {"scale": 1.75}, 0.19444),
        ("mode", {"scale": -1.0}, 0.35355),
        ("cosmap", {}, 0.26136),
    ],
)
def test_sd3_densities_against_their_own_samples(name: str, options: dict[str, float], std: float) -> None:
    """Sheet B, 3: densities integrate to 1, and to the empirical distribution of 100,000 draws; published spread."""
    density: Any = get_time_density(name, **options)
    # Substituted t = sin^2: arcsine's poles at the ends become finite.
    a = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * math.pi / 2
    t, jacobian = torch.sin(a) ** 2, torch.sin(2 * a)
    mass = density.density(t) * jacobian * (math.pi / 2 / 200_000)
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-4)
    mean = float((mass * t).sum())
    assert mean == pytest.approx(0.5, abs=1e-4)
    assert math.sqrt(float((mass * (t - mean) ** 2).sum())) == pytest.approx(std, abs=1e-4)
    draws = density.sample(100_000, torch.Generator().manual_seed(1)).sort().values
    levels = np.interp(draws.numpy(), t.numpy(), (mass.cumsum(0) - mass / 2).numpy())
    assert np.abs(levels - np.arange(1, 100_001) / 100_000).max() < 0.006


def test_published_values_of_sd3_densities() -> None:
    def at(name: str, t: float, **options: float) -> float:
        density: Any = get_time_density(name, **options)
        return float(density.density(torch.tensor(t, dtype=torch.float64)))

    assert at("logit-normal", 0.5) == pytest.approx(1.5957691, abs=1e-6)
    assert at("logit-normal", 0.1) == pytest.approx(0.3965747, abs=1e-6)
    assert at("logit-normal", 0.9) == pytest.approx(0.3965747, abs=1e-6)
    assert at("logit-normal", 0.7, mean=1.0) > at("logit-normal", 0.3, mean=1.0)  # mean > 0 favours noise
    assert at("cosmap", 0.5) == pytest.approx(4 / math.pi, abs=1e-6)
    assert at("cosmap", 0.0) == pytest.approx(2 / math.pi, abs=1e-6)
    assert at("mode", 0.5, scale=1.29) == pytest.approx(1 / (1 - 1.29 * (math.pi / 2 - 1)), abs=1e-6)
    assert at("mode", 0.5, scale=1.29) == pytest.approx(3.79, abs=5e-3)
    assert at("mode", 0.0, scale=1.29) == pytest.approx(1 / 2.29, abs=1e-6)
    assert at("mode", 1.0, scale=1.29) == pytest.approx(1 / 2.29, abs=1e-6)
    assert at("mode", 0.3, scale=0.0) == pytest.approx(1.0, abs=1e-6)
    assert at("uniform", 0.3, low=0.2, high=0.6) == pytest.approx(2.5, abs=1e-6)
    assert at("uniform", 0.7, low=0.2, high=0.6) == 0


def test_resolution_shift_of_sd3() -> None:
    """Sheet B, 3: published times, the exact move of log-SNR, the inverse, and the root of the token ratio."""
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert shifted_times(t, 3.0).tolist() == pytest.approx([0.25, 0.5, 0.75, 0.9, 0.9642857], abs=1e-7)
    linear = get_path("linear")
    for alpha in (0.5, 3.0, 4.0):
        moved = shifted_times(t, alpha)
        # `log_snr` is that of amplitudes, half of the sheet's.
        assert (2 * linear.log_snr(moved) - 2 * linear.log_snr(t) + 2 * math.log(alpha)).abs().max() < 1e-6
        assert (shifted_times(moved, 1 / alpha) - t).abs().max() < 1e-12
    assert resolution_shift(4096, 256) == pytest.approx(4.0)  # 1024 px against 256 px
    assert resolution_shift(64, 256) == pytest.approx(0.5)
    # Lumina's rational grid (sheet B, 2), which counts time the other way: 4 takes 0.5 to 0.2 from noise.
    assert 1 - float(shifted_times(torch.tensor(0.5, dtype=torch.float64), 4.0)) == pytest.approx(0.2)
    assert torch.equal(shifted_times(t, 1.0), t)


@pytest.mark.parametrize(
    ("std", "alpha", "error"), [(4.0, 1.0, 0.24275), (4.0, 3.0, 0.15274), (0.25, 1.0, 0.24275), (0.25, 3.0, 0.52015)]
)
def test_the_shift_moves_the_grid_the_right_way(std: float, alpha: float, error: float) -> None:
    """Sheet B, 3 (6): 8 Euler steps of the exact velocity of N(0, std^2); the error of the final deviation."""
    times = shifted_times(uniform_times(8), alpha).tolist()
    scale = 1.0
    for t, s in itertools.pairwise(times):
        velocity = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        scale *= 1 + (s - t) * velocity
    assert abs(scale / std - 1) == pytest.approx(error, abs=1e-4)


def test_bad_densities() -> None:
    with pytest.raises(ConfigError, match="did you mean 'logit-normal'"):
        get_time_density("logitnormal")
    with pytest.raises(ConfigError, match="does not take these options"):
        get_time_density("uniform", mean=0.0)
    with pytest.raises(ConfigError, match="scale in"):
        get_time_density("mode", scale=2.0)
