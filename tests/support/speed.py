"""SPEED's published procedure (arXiv 2605.18736), written from the paper's steps with scipy and numpy only.

Linear path, x = (1-t)*x0 + t*n. Nothing here uses Pliant's formulas: it is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from scipy.fft import dctn, idctn

Array = np.ndarray
Velocity = Callable[[Array, float], Array]


def euler(x: Array, times: Array, velocity: Velocity) -> Array:
    for t, after in pairwise(times):
        x = x + (after - t) * velocity(x, float(t))
    return x


def embed(x: Array, details: Array, band: str) -> Array:
    """Orthonormal embedding of x (..., h, w) in the low band, the rest from the image `details` (..., H, W)."""
    h, w = x.shape[-2:]
    if band == "dct":
        c = dctn(details, axes=(-2, -1), norm="ortho")
        c[..., :h, :w] = dctn(x, axes=(-2, -1), norm="ortho")
        return idctn(c, axes=(-2, -1), norm="ortho")
    rh, rw = details.shape[-2] // h, details.shape[-1] // w
    blocks = details.reshape(*details.shape[:-2], h, rh, w, rw)
    blocks = blocks - blocks.mean((-3, -1), keepdims=True) + x[..., :, None, :, None] / np.sqrt(rh * rw)
    return blocks.reshape(details.shape)


def start(noise: Array, size: tuple[int, int], band: str) -> Array:
    """Unit noise of the coarse grid: the low coefficients of the full one's."""
    h, w = size
    if band == "dct":
        return idctn(dctn(noise, axes=(-2, -1), norm="ortho")[..., :h, :w], axes=(-2, -1), norm="ortho")
    rh, rw = noise.shape[-2] // h, noise.shape[-1] // w
    return noise.reshape(*noise.shape[:-2], h, rh, w, rw).mean((-3, -1)) * np.sqrt(rh * rw)


def sample(
    noise: Array,
    coarse_times: Array,
    full_times: Array,
    low: Velocity,
    full: Velocity,
    size: tuple[int, int],
    band: str,
) -> Array:
    """Start small, walk `coarse_times`, expand with the initial noise's details, rescale, go on from `kappa * t`.

    `full_times`: where the full-size steps go; the start kappa*t is put before them, as SPEED patches its grid.
    """
    y = euler(start(noise, size, band), coarse_times, low)
    t = float(coarse_times[-1])
    r = np.sqrt(noise.shape[-2] * noise.shape[-1] / (size[0] * size[1]))
    kappa = r / (1 + (r - 1) * t)
    x = kappa * embed(y, t * noise, band)
    return euler(x, np.concatenate([[kappa * t], full_times]), full)
