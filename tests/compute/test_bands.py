"""Low bands: orthonormal, invertible, the same mean, white noise stays white."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch import Tensor

from pliant.compute.bands import (
    BANDS,
    Band,
    Size,
    analysis,
    coarse_size,
    coefficients,
    cosines,
    down,
    filtered,
    from_coefficients,
    low_pass,
    missing_mask,
    power_in_band,
    up,
)
from pliant.errors import ConfigError, ShapeError

CASES: list[tuple[Band, Size, Size]] = [
    ("haar", (8, 8), (4, 4)),
    ("haar", (8, 12), (4, 3)),
    ("haar", (6, 6), (6, 2)),
    ("dct", (8, 8), (4, 4)),
    ("dct", (6, 9), (4, 6)),
    ("dct", (9, 5), (5, 5)),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(BANDS), st.integers(1, 8), st.integers(1, 6))
def test_one_axis(band: Band, m: int, r: int) -> None:
    """Q is orthonormal, P P^T = 1/r, U = r P^T undoes nothing, constants stay, the low rows span P's range."""
    n = m * r
    q, p = analysis(band, n, m), low_pass(band, n, m)
    close(q @ q.T, torch.eye(n, dtype=torch.float64))
    close(p @ p.T, torch.eye(m, dtype=torch.float64) / r)
    close(p @ torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64))
    close(p @ q[m:].T, torch.zeros(m, n - m, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 5, 16, 31])
def test_cosines_are_scipys(n: int) -> None:
    x = noise(3, n, n)
    expected = torch.from_numpy(dctn(x.numpy(), axes=(-2, -1), norm="ortho"))
    close(cosines(n) @ x @ cosines(n).T, expected)
    single = coefficients(x.float()[:, None], (1, 1), "dct")[:, 0]
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


def test_haar_at_ratio_two_is_haar() -> None:
    """(LL, LH, HL, HH) of one 2x2 block: sums and differences, halved."""
    a, b, c, d = 1.0, 2.0, 4.0, 8.0
    got = coefficients(torch.tensor([[a, b], [c, d]], dtype=torch.float64), (1, 1), "haar")
    close(got, torch.tensor([[a + b + c + d, a - b + c - d], [a + b - c - d, a - b - c + d]], dtype=torch.float64) / 2)


@pytest.mark.parametrize(("band", "full", "low"), CASES)
def test_images(band: Band, full: Size, low: Size) -> None:
    x, y = noise(2, 3, *full), noise(2, 3, *low, seed=1)
    c = coefficients(x, low, band)
    close(from_coefficients(c, low, band), x)
    close(c.square().sum(), x.square().sum(), 1e-10)
    close(down(up(y, full, band), low, band), y)
    close(down(x, low, band).mean((-1, -2)), x.mean((-1, -2)))
    close(up(y, full, band).mean((-1, -2)), y.mean((-1, -2)))
    projected = up(down(x, low, band), full, band)
    keep = ~missing_mask(full, low)
    close(coefficients(projected, low, band), c * keep)
    close(filtered(x, keep.double(), low, band), projected)
    per_sample = torch.stack([keep, ~keep]).double()
    close(filtered(x, per_sample, low, band)[1], (x - projected)[1])
    # Any gain is self-adjoint and gains commute: one orthonormal basis.
    g = noise(*full, seed=2)
    close((filtered(x, g, low, band) * x).sum(), (c.square() * g).sum(), 1e-10)


@pytest.mark.parametrize(("band", "full", "low"), CASES)
def test_single_precision_and_gradients(band: Band, full: Size, low: Size) -> None:
    x = noise(1, 2, *full)
    torch.testing.assert_close(down(x.float(), low, band).double(), down(x, low, band), rtol=0, atol=1e-6)
    with torch.inference_mode():
        down(x, low, band)  # what is cached here must serve autograd below
    leaf = x.clone().requires_grad_()
    weight = noise(1, 2, *low, seed=5)
    (down(leaf, low, band) * weight).sum().backward()
    assert leaf.grad is not None
    ratio = full[0] * full[1] / (low[0] * low[1])
    close(leaf.grad, up(weight, full, band) / ratio)  # U is r times the adjoint of P


@pytest.mark.parametrize("pair", [(4, 8), (6, 9), (5, 9)])
def test_constants_stay_constant(pair: tuple[int, int]) -> None:
    """Sheet H, 1 (5): where SPEED's Fourier variant makes an oscillation of a constant."""
    low, full = (pair[0],) * 2, (pair[1],) * 2
    bands: list[Band] = ["haar", "dct"] if full[0] % low[0] == 0 else ["dct"]
    for band in bands:
        few, many = (torch.full((1, 1, *size), 0.7, dtype=torch.float64) for size in (low, full))
        close(up(few, full, band), many)


def test_averaged_noise() -> None:
    """Unit noise has standard deviation 1/2 after 2x2 averaging and stays white, in both bands."""
    n = noise(400, 1, 32, 32)
    for band in BANDS:
        low = down(n, (16, 16), band)
        assert float(low.std()) == pytest.approx(0.5, rel=0.01)
        assert abs(float((low[..., 1:] * low[..., :-1]).mean())) < 0.005
    assert float(down(n, (16, 8), "haar").std()) == pytest.approx(1 / math.sqrt(8), rel=0.01)


def test_power_in_band_is_the_diagonal_of_the_covariance() -> None:
    power = noise(8, 8).square()
    assert torch.equal(power_in_band(power, (4, 4), "dct"), power)
    # Column by column: the field is sum of c_kl phi_kl, its covariance a sum over the basis.
    basis = from_coefficients(torch.eye(64, dtype=torch.float64).view(64, 8, 8), (4, 4), "dct")
    expected = (coefficients(basis, (4, 4), "haar").square() * power.flatten()[:, None, None]).sum(0)
    close(power_in_band(power, (4, 4), "haar"), expected)
    close(power_in_band(torch.ones(8, 8), (2, 4), "haar"), torch.ones(8, 8).double())


def test_the_whole_image_is_a_low_band() -> None:
    x = noise(1, 1, 4, 4)
    for band in BANDS:
        assert down(x, (4, 4), band) is x
        assert up(x, (4, 4), band) is x


def test_refusals() -> None:
    assert coarse_size((12, 9), (2, 1.5), "dct") == (6, 6)
    for size, ratio, band, words in (
        ((8, 8), (3, 3), "dct", "no whole number"),
        ((9, 9), (1.5, 1.5), "haar", "use band 'dct'"),
        ((8, 8), (0.5, 2), "dct", "at least 1"),
        ((8, 8), (math.nan, 2), "dct", "at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            coarse_size(size, ratio, band)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'haar'"):
        down(noise(1, 1, 4, 4), (2, 2), "harr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="whole ratios"):
        up(noise(1, 1, 4, 4), (6, 6), "haar")
    with pytest.raises(ShapeError, match="larger"):
        down(noise(1, 1, 4, 4), (8, 8), "dct")
