"""The power spectrum of a data set, and what it says about when a smaller grid is enough (SPEED, arXiv 2605.18736).

Images are taken as the network sees them (pixels in [-1, 1], or scaled latents). Power is the mean square, not the
variance: the linear guess of a coefficient from its noisy value has no constant term.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pliant.adapters.low_band import scale_alignment
from pliant.compute.bands import coefficients
from pliant.compute.spectra import CoefficientSpectrum, PowerLaw, RadialSpectrum, Spectrum
from pliant.errors import ConfigError, DataError, ShapeError
from pliant.paths import Path, get_path
from pliant.paths.path import as_time

Transform: TypeAlias = Literal["dft", "dct"]


def coefficient_power(batches: Iterable[Tensor], transform: Transform = "dct") -> Tensor:
    """(H, W) float64: mean square of every orthonormal coefficient over images and channels of (B, C, H, W) batches.

    "dct": cosines k, l = 0, 1, ...; "dft": the squared modulus at fftfreq's frequencies. Raises DataError, ShapeError.
    """
    total, count = torch.zeros(()), 0
    for batch in batches:
        if batch.ndim != 4 or (count and batch.shape[-2:] != total.shape):
            raise ShapeError(f"a spectrum needs batches (B, C, H, W) of one size, got {tuple(batch.shape)}")
        x = batch.detach().to("cpu", torch.float64)
        if transform == "dct":
            power = coefficients(x, (1, 1), "dct").square()
        elif transform == "dft":
            power = torch.fft.fft2(x, norm="ortho").abs().square()
        else:
            raise ConfigError(f"unknown transform {transform!r}: use 'dct' or 'dft'")
        total, count = total + power.sum((0, 1)), count + x.shape[0] * x.shape[1]
    if not count:
        raise DataError("no images were given; a spectrum needs at least one, and 500 to be worth something")
    if not bool(torch.isfinite(total).all()):
        raise DataError("the images contain NaN or infinity; look at them before measuring them")
    return total / count


def radial(power: Tensor, transform: Transform = "dct") -> RadialSpectrum:
    """(H, W) powers, averaged over whole frequencies in cycles per image (of the shorter side), corners included."""
    h, w = power.shape
    if transform == "dct":
        axes = [torch.arange(n, dtype=torch.float64) / (2 * n) for n in (h, w)]
    else:
        axes = [torch.fft.fftfreq(n, dtype=torch.float64).abs() for n in (h, w)]
    # The least bit more than a half, so that half frequencies of the DCT go up, not to the even neighbour.
    ring = (min(h, w) * torch.hypot(axes[0][:, None], axes[1][None]) + 0.5 + 1e-9).floor().long().flatten()
    counts = torch.bincount(ring)
    sums = torch.bincount(ring, weights=power.to(torch.float64).flatten())
    means = sums / counts.clamp(min=1)
    for k in range(1, len(means)):  # rings of very oblong images can be empty
        if counts[k] == 0:
            means[k] = means[k - 1]
    return RadialSpectrum(tuple(means.tolist()))


def fit_power_law(spectrum: RadialSpectrum, first: float = 2, last: float | None = None) -> PowerLaw:
    """Least squares of log power on log frequency from `first` to `last` cycles per image (default: Nyquist's)."""
    top = (len(spectrum.values) - 1) / math.sqrt(2) if last is None else last
    used = [(w, p) for w, p in enumerate(spectrum.values) if first <= w <= top + 1e-9 and p > 0]
    if len(used) < 2:
        raise DataError(f"a power law needs at least two frequencies between {first:g} and {top:g} with power")
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in zip(*used, strict=True))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return PowerLaw(math.exp(float(y.mean()) - slope * float(x.mean())), -slope)


def measure(images: Tensor | Iterable[Tensor]) -> CoefficientSpectrum:
    """What "wiener" wants to know: the power of every cosine coefficient of (B, C, H, W) images or batches of them."""
    return CoefficientSpectrum.of(coefficient_power([images] if isinstance(images, Tensor) else images))


# When a smaller grid is enough ------------------------------------------------------------------------------------


def switch_time(power: float, delta: float) -> float:
    """t* = 1/(1 + sqrt(delta/(P (1 + P - delta)))) on the linear path: above it a Gaussian coefficient of power P is so
    noisy that the best velocity differs from the noise alone by less than delta, `E|v* - n|^2 < delta`.

    0 where there is nothing to see (P = 0, or delta >= 1 + P).
    """
    if not delta > 0.0:
        raise ConfigError(f"delta must be positive, got {delta}")
    room = power * (1.0 + power - delta)
    return 0.0 if room <= 0.0 else 1.0 / (1.0 + math.sqrt(delta / room))


def switch_times(
    spectrum: Spectrum, size: tuple[int, int], scales: Sequence[float], delta: float = 0.01, path: Path | str = "linear"
) -> list[float]:
    """For every scale s < 1, coarse to fine: the time t* of `path` until which s*H x s*W pixels are enough.

    P is taken at the smaller grid's Nyquist frequency, s*min(H, W)/2 cycles per image. On other paths: the time of
    equal noise ratio. Larger delta, longer coarse (SPEED's help text says the opposite; its formula does not).
    """
    if any(not 0 < s < 1 for s in scales) or list(scales) != sorted(set(scales)):
        raise ConfigError(f"scales must grow and lie between 0 and 1 (the full size is not named), got {list(scales)}")
    found = [switch_time(spectrum.at(s * min(size) / 2), delta) for s in scales]
    ratios = as_time(torch.tensor([t / (1.0 - t) for t in found], dtype=torch.float64))
    times: list[float] = get_path(path).time_of_noise_ratio(ratios).tolist()
    return times


def coarse_steps(
    times: Sequence[float] | Tensor,
    switches: Sequence[float],
    ratios: Sequence[float] | None = None,
    path: Path | str = "linear",
) -> list[int]:
    """How many leading steps of a falling grid (S+1,) run at each scale, then the number left for the full size.

    A step runs coarse while the time it starts from is above the scale's t*. `ratios` None compares the grid's own
    times, as SPEED does (its grid is the coarse one). Given (k = sqrt(full/coarse pixels) per scale), the grid is the
    full-size one and the aligned time, at which the coarse network really works, is compared: the safer criterion. At
    least one step is left for the full size: SPEED would otherwise expand a finished coarse image.
    """
    grid, path = as_time(torch.as_tensor(times, dtype=torch.float64)), get_path(path)
    if grid.ndim != 1 or len(grid) < 2 or bool((grid.diff() >= 0).any()):
        raise ConfigError("expected a falling grid of at least two times")
    if ratios is not None and len(ratios) != len(switches):
        raise ConfigError(f"{len(switches)} switch times need as many ratios, got {len(ratios)}")
    steps, done = [], 0
    for i, switch in enumerate(switches):
        seen = grid if ratios is None else scale_alignment(path, "epsilon", grid, ratios[i] ** 2).time
        count = int((seen[:-1] > switch).long().cumprod(0).sum())
        count = min(max(count, done), len(grid) - 2)
        steps.append(count - done)
        done = count
    return [*steps, len(grid) - 1 - done]
