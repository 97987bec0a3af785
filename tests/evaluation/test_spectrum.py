"""Spectra and switch times: published values, closed forms and Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.compute.bands import from_coefficients
from pliant.compute.spectra import (
    CoefficientSpectrum,
    PowerLaw,
    RadialSpectrum,
    Spectrum,
    frequencies,
    spectrum_from_config,
)
from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation.spectrum import (
    coarse_steps,
    coefficient_power,
    fit_power_law,
    measure,
    radial,
    switch_time,
    switch_times,
)
from pliant.paths import get_path

FLUX = PowerLaw(203.615097, 1.915461)
DELTAS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(spectrum: Spectrum, count: int, size: tuple[int, int]) -> Tensor:
    return from_coefficients(spectrum.power(size).sqrt() * noise(count, 1, *size), (1, 1), "dct")


# t* ---------------------------------------------------------------------------------------------------------------


def test_published_switch_times() -> None:
    """Sheet H, 1 (1): FLUX.1's latents at 1024 x 1024, a 128 x 128 grid."""
    assert FLUX.at(32) == pytest.approx(0.2665, abs=5e-5)
    assert FLUX.at(16) == pytest.approx(1.005, abs=5e-4)
    found = [switch_times(FLUX, (128, 128), [0.5], d)[0] for d in DELTAS]
    assert found == pytest.approx([0.9484, 0.8527, 0.7180, 0.6381, 0.5438, 0.3900], abs=1e-4)
    assert switch_times(FLUX, (128, 128), [0.25, 0.5], 0.01) == pytest.approx([0.9341, 0.8527], abs=1e-4)
    assert switch_times(FLUX, (128, 128), [0.25], 0.05) == pytest.approx([0.8625], abs=1e-4)


def test_published_coarse_steps() -> None:
    """Sheet H, 1 (4): FLUX's shifted grid of 50 steps, mu = 1.15; where each run expands and goes on."""
    u = torch.linspace(1, 1 / 50, 50, dtype=torch.float64)
    grid = torch.cat([math.exp(1.15) / (math.exp(1.15) + 1 / u - 1), torch.zeros(1, dtype=torch.float64)])
    counts, levels = [], []
    for delta in DELTAS[1:]:
        k, rest = coarse_steps(grid, switch_times(FLUX, (128, 128), [0.5], delta))
        assert k + rest == 50
        counts.append(k)
        levels.append((float(grid[k]), float(2 * grid[k] / (1 + grid[k]))))
    assert counts == [18, 28, 33, 37, 42]
    assert levels[0] == pytest.approx((0.8488, 0.9182), abs=1e-4)
    assert levels[1] == pytest.approx((0.7128, 0.8323), abs=1e-4)
    assert levels[2] == pytest.approx((0.6193, 0.7649), abs=1e-4)
    assert levels[3] == pytest.approx((0.526, 0.689), abs=1e-3)
    assert levels[4] == pytest.approx((0.376, 0.546), abs=1e-3)
    assert coarse_steps(grid, switch_times(FLUX, (128, 128), [0.25, 0.5], 0.01)) == [10, 8, 32]


@pytest.mark.parametrize("power", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("delta", [0.01, 0.1])
def test_what_the_switch_time_means(power: float, delta: float) -> None:
    """There the best velocity differs from the noise alone by delta in mean square (Monte Carlo, sheet H, 1)."""
    t = switch_time(power, delta)
    if t == 0.0:
        assert delta >= 1 + power
        return
    x0, n = power**0.5 * noise(400_000), noise(400_000, seed=1)
    x = (1 - t) * x0 + t * n
    best = x * (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2)
    q = (1 - t) ** 2 * power / t**2
    assert (1 + power) * q / (1 + q) == pytest.approx(delta, rel=1e-9)
    assert float((best - n).square().mean()) == pytest.approx(delta, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-4, 1e4), st.floats(1e-4, 0.9), st.floats(1.01, 3.0))
def test_monotone(power: float, delta: float, factor: float) -> None:
    """More tolerance or less power: coarse for longer. SPEED's help text has it the other way round."""
    here = switch_time(power, delta)
    assert switch_time(power, min(delta * factor, 0.95)) <= here
    assert switch_time(power * factor, delta) >= here
    assert 0.0 < here < 1.0


def test_switch_times_on_other_paths_have_the_same_noise_ratio() -> None:
    linear = switch_times(FLUX, (64, 64), [0.5], 0.05)[0]
    for name in ("vp", "cosine", "gvp"):
        path = get_path(name)
        t = switch_times(FLUX, (64, 64), [0.5], 0.05, path)[0]
        assert float(path.noise_ratio(t)) == pytest.approx(linear / (1 - linear), rel=1e-6)
    assert switch_time(0.0, 0.1) == 0.0
    assert switch_time(0.1, 1.2) == 0.0


def test_counting_steps() -> None:
    grid = torch.linspace(1, 0, 11)
    assert coarse_steps(grid, [0.75]) == [3, 7]
    assert coarse_steps(grid, [0.75], ratios=[2.0]) == [2, 8]  # tau of 0.8 is 0.67
    assert coarse_steps(grid, [0.95, 0.55]) == [1, 4, 5]
    assert coarse_steps(grid, [0.55, 0.95]) == [5, 0, 5]  # the finer scale has nothing left to do
    assert coarse_steps(grid, [0.0]) == [9, 1]  # never all of them: SPEED would expand a finished coarse image
    assert coarse_steps(grid, [1.0]) == [0, 10]
    vp = get_path("vp")
    t = vp.time_of_noise_ratio(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]))
    switch = float(vp.time_of_noise_ratio(0.9))
    assert coarse_steps(t, [switch], path=vp) == [3, 1]
    assert coarse_steps(t, [switch], ratios=[2.0], path=vp) == [3, 1]
    assert coarse_steps(t, [switch], ratios=[4.0], path=vp) == [2, 2]


# Measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["dct", "dft"])
def test_white_noise_has_power_one(transform: str) -> None:
    power = coefficient_power(noise(600, 2, 8, 12).split(100), transform)  # type: ignore[arg-type]
    assert power.shape == (8, 12)
    assert float((power - 1).abs().max()) < 0.25
    values = radial(power, transform).values  # type: ignore[arg-type]
    assert values == pytest.approx([1.0] * len(values), abs=0.1)


def test_power_keeps_the_energy_and_the_mean_counts() -> None:
    x = noise(5, 3, 6, 4) + 2.0
    for transform in ("dct", "dft"):
        power = coefficient_power([x], transform)  # type: ignore[arg-type]
        assert float(power.sum()) == pytest.approx(float(x.square().sum() / 15), rel=1e-12)
        assert float(power[0, 0]) > 24 * 3.0  # mean square, not variance


def test_known_spectra_are_found() -> None:
    true = PowerLaw(30.0, 2.0)
    x = field(true, 400, (32, 32))
    table = measure(x.split(90))
    torch.testing.assert_close(table.power((32, 32)), true.power((32, 32)), rtol=0.4, atol=0)
    fitted = fit_power_law(radial(table.power((32, 32))), last=16)
    # A ring's mean over a convex law is above the law at its middle: a bias of a few percent, largest at 2 cycles.
    assert fitted.exponent == pytest.approx(2.0, abs=0.1)
    assert fitted.amplitude == pytest.approx(30.0, rel=0.25)
    assert table.at(8) == pytest.approx(true.at(8), rel=0.1)


def test_fourier_power_of_a_periodic_field() -> None:
    """Waves of a whole number of periods land in their own ring, whatever their direction."""
    i = torch.arange(16, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * 3 * i / 16).expand(16, 16)
    spectrum = radial(coefficient_power([wave[None, None], wave.T[None, None]], "dft"), "dft")
    assert int(np.argmax(spectrum.values)) == 3
    assert sum(v > 1e-20 for v in spectrum.values) == 1


def test_fit_is_exact_on_a_power_law() -> None:
    values = tuple(7.0 * max(w, 0.5) ** -1.5 for w in range(20))
    for last in (None, 10):
        fitted = fit_power_law(RadialSpectrum(values), last=last)
        assert (fitted.amplitude, fitted.exponent) == pytest.approx((7.0, 1.5), rel=1e-9)


def test_spectra_at_frequencies() -> None:
    w = frequencies((4, 6))
    assert w.shape == (4, 6)
    assert float(w[0, 0]) == 0.0
    assert float(w[2, 3]) == pytest.approx(2 * math.hypot(0.5, 0.5))
    assert float(frequencies((8, 8))[3, 4]) == 2.5
    table = RadialSpectrum((10.0, 8.0, 2.0, 0.0))
    assert [table.at(v) for v in (0, 0.5, 1, 2, 2.5, 3, 9)] == pytest.approx([10, 9, 8, 2, 1.0, 0, 0])
    assert table.at(math.sqrt(2)) == pytest.approx(4.0)  # half way on log-log axes
    assert table.power((2, 2)).shape == (2, 2)
    assert float(PowerLaw(3.0, 1.0).power((8, 8))[0, 0]) == PowerLaw(3.0, 1.0).at(0) == 6.0


def test_round_trips_and_refusals() -> None:
    for s in (PowerLaw(2.0, 1.0), RadialSpectrum((2.0, 1.0)), CoefficientSpectrum(((4.0, 1.0), (1.0, 0.5)))):
        assert spectrum_from_config(s.to_config()) == s
        assert hash(s) == hash(spectrum_from_config(s.to_config()))
    for config, words in (
        ({"kind": "powerlaw"}, "did you mean 'power-law'"),
        ({"kind": "power-law", "a": 1}, "does not take"),
        ({"kind": "power-law", "amplitude": -1.0, "exponent": 0.0}, "finite amplitude"),
        ({"kind": "radial", "values": [1.0]}, "at least two"),
        ({"kind": "radial", "values": [1.0, math.nan]}, "finite"),
        ({"kind": "coefficients", "values": [[1.0], [1.0, 2.0]]}, "rectangular"),
        ({"kind": "coefficients", "values": [[-1.0]]}, ">= 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            spectrum_from_config(config)
    with pytest.raises(DataError, match="no images"):
        coefficient_power([])
    with pytest.raises(DataError, match="NaN"):
        coefficient_power([torch.full((1, 1, 2, 2), math.nan)])
    with pytest.raises(ShapeError, match="one size"):
        coefficient_power([noise(1, 1, 4, 4), noise(1, 1, 8, 8)])
    with pytest.raises(ConfigError, match="'dct' or 'dft'"):
        coefficient_power([noise(1, 1, 4, 4)], "fft")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least two frequencies"):
        fit_power_law(RadialSpectrum((1.0, 1.0)))
    with pytest.raises(ConfigError, match="delta"):
        switch_time(1.0, 0.0)
    for scales in ([1.0], [0.5, 0.25], [0.0]):
        with pytest.raises(ConfigError, match="scales"):
            switch_times(FLUX, (8, 8), scales)
    with pytest.raises(ConfigError, match="falling"):
        coarse_steps([0.0, 1.0], [0.5])
    with pytest.raises(ConfigError, match="as many ratios"):
        coarse_steps([1.0, 0.0], [0.5], ratios=[])
