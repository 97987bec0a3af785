"""The low-band operator: a network call on a smaller grid, read as a prediction about the full-size state.

Weak patch, coarse latent and progressive resolution are this one operator (sheet H, section 0). On the path
`x_t = alpha*x0 + sigma*eps`, with P and U of `bands` and k = sqrt(full pixels / coarse pixels):

    y = (alpha_tau/alpha_t) P x_t      is a state of the same path at tau, sigma_tau/alpha_tau = sigma_t/(k alpha_t);
    m = network(y, tau)                on the smaller grid says E[x0_low] and E[n_low] of y, hence of P x_t;
    missing coefficients               are guessed from the state alone, `E[x0|x] = alpha w/(alpha^2 w + sigma^2) x`,
                                       with w their power: 0 for "hold", the data's spectrum for "wiener".

"hold" knows nothing about detail: its predicted noise is the whole of what is there, so the detail keeps its noise and
shrinks with sigma (linear path: `v = x_high/t`), and the prediction has no limit at t = 0: never use it in the last
steps. "wiener" is exact for data whose missing coefficients are Gaussian, uncorrelated and have this power. Everything
is linear with coefficients of t alone, so guidance commutes with it, and the state never changes its shape: any solver,
any grid, editing and SDE steps work. Channels must have independent noise.

For an engine, per compute: `net = coarse_network(dit, low)` (shares all weights), and with `low_alignment(low, ...)`
at the known times (all float64, so rows can be taken per step)

    px = down(x, net.config.input_size, low.band)                      # (B, C, h, w)
    raw = net(a.input_scale * px, encode(a.time), labels)              # value in house sign, after `Denoiser.split`
    value = read_back(x, px, raw, a, low.band)                         # (B, C, H, W), the network's kind at (x, t)

Sampled at full precision from a plan, steps `i < k` through this operator and the rest plain give, for Euler, SPEED's
image (arXiv 2605.18736) on the aligned coarse grid, to rounding. Multistep solvers should drop to order 1 for the first
plain step: the two fields differ. A network that is used on another path: `ScaleAlignment.seen_from`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pliant.compute.bands import Band, Size, down, filtered, up
from pliant.compute.scale import LowBand
from pliant.errors import ConfigError
from pliant.models.dit import DiT, DiTConfig
from pliant.models.positions import axis_coordinates, sincos_grid
from pliant.paths import Match, Path, Preconditioning, PredictionType, conversion, like
from pliant.paths.path import as_time
from pliant.paths.predictions import row


class ScaleAlignment(NamedTuple):
    """How a coarse call is fed and read, float64, of the shape of t: see `read_back`."""

    input_scale: Tensor
    """The network's input is this times P x."""
    time: Tensor
    """House time on the network's path that it is told."""
    on_low: Tensor
    on_output: Tensor
    on_missing: Tensor
    """On the state's missing coefficients; of the shape of t, or t's shape + (H, W) where they differ."""

    def seen_from(self, m: Match, p: Tensor, q: Tensor) -> ScaleAlignment:
        """The same call from another path: its states y are `m.scale * x`, its prediction read as `p*y + q*value`."""
        fine = m.scale, p, q
        if self.on_missing.ndim > self.on_low.ndim:
            fine = m.scale[..., None, None], p[..., None, None], q[..., None, None]
        return ScaleAlignment(
            m.scale * self.input_scale,
            self.time,
            m.scale * (p + q * self.on_low),
            q * self.on_output,
            fine[0] * (fine[1] + fine[2] * self.on_missing),
        )

    def at(self, k: int) -> ScaleAlignment:
        """The k-th time of a list of times."""
        return ScaleAlignment(*(v[k] for v in self))


def scale_alignment(
    path: Path,
    kind: PredictionType,
    t: float | Tensor,
    pixels: float,
    missing_power: float | Tensor = 0.0,
    preconditioning: Preconditioning | None = None,
) -> ScaleAlignment:
    """The coefficients at t (any shape) for `pixels` = H*W/(h*w) full pixels per coarse one.

    missing_power: w, a number, or (H, W) by coefficient (its low corner is not used). Finite on all of [0, 1] where
    w > 0 and the kind itself is; with w = 0 undefined at t = 0. Raises ConfigError for a path that drifts to an image.
    """
    time, k = as_time(t), math.sqrt(pixels)
    if bool((path.offset(time) != 0).any()):
        raise ConfigError(f"path {path.name!r} drifts to a known image; a low band of it is not a state of the path")
    here = path.alpha_sigma(time)
    tau = path.time_of_log_snr(path.log_snr(time) + math.log(k))
    there = path.alpha_sigma(tau)
    # alpha_tau/alpha_t = k*sigma_tau/sigma_t, from whichever is not 0/0.
    scale = torch.where(here.alpha > here.sigma, there.alpha / here.alpha, k * there.sigma / here.sigma)
    inp = torch.ones_like(scale)
    if preconditioning is None:
        clean, noise = conversion(kind, "sample", there), conversion(kind, "epsilon", there)
    else:
        skip, out, inp, _ = preconditioning.coefficients(there.sigma, there.alpha)
        clean, noise = (skip, out), ((1 - there.alpha * skip) / there.sigma, -there.alpha * out / there.sigma)
    u, w = row(kind, here)
    # P eps has standard deviation 1/k: n_low = k P eps is what the coarse network calls noise.
    on_low = scale * (_times(u, clean[0]) + _times(w / k, noise[0]))
    on_output = _times(u, clean[1]) + _times(w / k, noise[1])
    power = torch.as_tensor(missing_power, dtype=torch.float64, device=time.device)
    fine = (v[..., None, None] if power.ndim else v for v in (here.alpha, here.sigma, u, w))
    alpha, sigma, u, w = fine
    total = alpha**2 * power + sigma**2
    on_missing = _times(u, alpha * power / total) + _times(w, sigma / total)
    return ScaleAlignment(scale * inp, tau, on_low, on_output, on_missing)


def read_back(x: Tensor, low: Tensor, output: Tensor, a: ScaleAlignment, band: Band) -> Tensor:
    """The full-size prediction: `on_low` of the state's low band, `on_output` of U output, `on_missing` of the rest.

    x: (B, C, H, W), the state; low: (B, C, h, w), `down(x)`; output: (B, C, h, w), the coarse network's value;
    a: at one time or at (B,) times.
    """
    size, coarse = (x.shape[-2], x.shape[-1]), (output.shape[-2], output.shape[-1])
    output = like(a.on_output, x) * output.to(x.dtype)
    if a.on_missing.ndim == a.on_low.ndim:
        read = like(a.on_missing, x) * x
        return read.add_(up(like(a.on_low - a.on_missing, x) * low + output, size, band))
    gain = a.on_missing.clone()
    gain[..., : coarse[0], : coarse[1]] = a.on_low[..., None, None]
    return filtered(x, gain.to(x), coarse, band).add_(up(output, size, band))


def low_alignment(
    low: LowBand,
    path: Path,
    kind: PredictionType,
    t: float | Tensor,
    size: Size,
    preconditioning: Preconditioning | None = None,
) -> ScaleAlignment:
    """The coefficients at house times t (any shape) for states of `size` (H, W), on the network's own path."""
    h, w = low.coarse_size(size)
    return scale_alignment(path, kind, t, size[0] * size[1] / (h * w), low.missing_power(size), preconditioning)


def coarse_config(config: DiTConfig, low: LowBand) -> DiTConfig:
    """The same network on the smaller grid. Raises ConfigError or ShapeError where its patches do not fit there."""
    return replace(config, input_size=low.coarse_size(config.input_size))


def coarse_network(dit: DiT, low: LowBand) -> DiT:
    """A DiT for the smaller grid made of the same modules: weights, gradients and later changes are shared."""
    config = coarse_config(dit.config, low)
    with torch.device("meta"):
        small = DiT(config)
    for name, module in dit.named_children():
        setattr(small, name, module)
    # Each coarse token covers full/coarse tokens of the trained grid.
    sides = zip(config.grid(), dit.config.grid(), strict=True)
    rows, columns = (axis_coordinates(few, many, few, low.positions) for few, many in sides)
    small.positions = sincos_grid(rows, columns, config.width).float().to(dit.positions)  # rounded as all tables are
    return small.train(dit.training)


def expand(y: Tensor, path: Path, tau: float, noise: Tensor, band: Band = "haar") -> tuple[Tensor, float]:
    """A state of a coarse run at tau as a full-size state: (x, t), `aligned time of t == tau`.

    SPEED's spectral expansion and noise matching: the missing band is filled with that of `noise` (B, C, H, W, standard
    normal) at the level sigma_t, the low band with y (B, C, h, w) rescaled. Raises ConfigError where the path is not
    noisy enough for the full size.
    """
    size, low = (noise.shape[-2], noise.shape[-1]), (y.shape[-2], y.shape[-1])
    k = math.sqrt(size[0] * size[1] / (low[0] * low[1]))
    wanted = path.log_snr(tau) - math.log(k)
    t = path.time_of_log_snr(wanted)
    if bool(path.log_snr(t) > wanted + 1e-6):
        raise ConfigError(f"a coarse state at {tau:g} is noisier than path {path.name!r} gets at full size")
    here, there = path.alpha_sigma(t), path.alpha_sigma(tau)
    scale = float(torch.where(here.alpha > here.sigma, there.alpha / here.alpha, k * there.sigma / here.sigma))
    details = noise - up(down(noise, low, band), size, band)
    return up(y, size, band) / scale + float(here.sigma) * details, float(t)


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """The product, 0 where the weight is 0: what is not needed need not be determined."""
    return torch.where(weight == 0.0, torch.zeros_like(value), weight * value)
