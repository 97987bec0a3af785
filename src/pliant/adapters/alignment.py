"""Noise alignment: a coarse patch sees a low-passed image, and low-passed noise is weaker noise.

Let P average each r-times-coarser block, U repeat it back, and k = sqrt(number of pixels per block) (r in 2-D). On the
path `x_t = alpha*x0 + sigma*eps`, `P x_t` has noise sigma/k: it is a state of the *same* path at the aligned time tau
with `sigma_tau/alpha_tau = sigma_t/(k alpha_t)`, scaled by alpha_t/alpha_tau. So a weak mode built from pre-trained
weights is fed correctly when its input is scaled by alpha_tau/alpha_t, it is told tau, and its output m, which
speaks about the clean coarse image, is turned back into a prediction at (x_t, t):

    x0_low  = p_tau * y + q_tau * m,                      y = (alpha_tau/alpha_t) P x_t
    x0_weak = U x0_low + c * (x_t - U P x_t),             c = alpha_t w / (alpha_t^2 w + sigma_t^2)
    prediction = p'_t * x_t + q'_t * x0_weak

A preconditioned network says `x0 = c_skip y + c_out m` when fed with c_in y: other p, q and scale.
c is the best linear guess of the missing band if its pixels have variance w. w = 0 guesses nothing (sheet H, section
0; for rectified flow `v = (x - U x0_low)/t`): that makes weak steps exactly those of a coarse sampler, but the
prediction grows like 1/t towards the data, where no training can make up for it. Everything is linear with
coefficients of t alone: `prediction = on_state*x_t + on_coarse*(U P x_t) + on_output*m`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.adapters.low_band import scale_alignment
from pliant.paths import Match, Path, Preconditioning, PredictionType
from pliant.paths.path import as_time


class Alignment(NamedTuple):
    """How a call is fed and read, float64, of the shape of t: `on_state*x + on_coarse*U P x + on_output*network(input)`
    with the input `input_scale*x` at house `time` of the network's own path.
    """

    input_scale: Tensor
    time: Tensor
    on_state: Tensor
    on_coarse: Tensor
    on_output: Tensor


def aligned_time(path: Path, t: float | Tensor, pixels: int) -> Tensor:
    """tau: the time at which the path has 1/sqrt(pixels) of its noise ratio at t. 0 at 0, and 1 where alpha is 0.

    Linear path: `t / (k - (k-1) t)`, k = sqrt(pixels).
    """
    return path.time_of_log_snr(path.log_snr(t) + 0.5 * math.log(pixels))


def preconditioned(path: Path, preconditioning: Preconditioning, t: float | Tensor) -> Alignment:
    """A preconditioned network as a denoiser of kind "sample"."""
    time, s = as_time(t), path.alpha_sigma(t)
    c = preconditioning.coefficients(s.sigma, s.alpha)
    return Alignment(c.inp, time, c.skip, torch.zeros_like(c.skip), c.out)


def seen_from(a: Alignment, m: Match, p: Tensor, q: Tensor) -> Alignment:
    """The same call from another path: its states y are `m.scale * x`, its prediction is read as `p*y + q*value`."""
    return Alignment(
        m.scale * a.input_scale, a.time, m.scale * (p + q * a.on_state), m.scale * q * a.on_coarse, q * a.on_output
    )


def alignment(
    path: Path,
    prediction: PredictionType,
    t: float | Tensor,
    pixels: int,
    missing_power: float = 0.0,
    preconditioning: Preconditioning | None = None,
) -> Alignment:
    """`scale_alignment` in terms of x and U P x, for blocks of `pixels` = rh*rw fine pixels; `missing_power` is w.

    Undefined at t = 0.
    """
    a = scale_alignment(path, prediction, t, pixels, missing_power, preconditioning)
    return Alignment(a.input_scale, a.time, a.on_missing, a.on_low - a.on_missing, a.on_output)


def coarse(x: Tensor, ratio: tuple[int, int]) -> Tensor:
    """U P x: every block of `ratio` pixels of (B, C, H, W) replaced by its mean."""
    pooled = F.avg_pool2d(x, ratio)
    return pooled.repeat_interleave(ratio[0], dim=-2).repeat_interleave(ratio[1], dim=-1)
