"""Noise alignment: a coarse patch sees a low-passed image, and low-passed noise is weaker noise.

Let P average each r-times-coarser block, U repeat it back, and k = sqrt(number of pixels per block) (r in 2-D). On the
path `x_t = alpha*x0 + sigma*eps`, `P x_t` has noise sigma/k: it is a state of the *same* path at the aligned time tau
with `sigma_tau/alpha_tau = sigma_t/(k alpha_t)`, scaled by alpha_t/alpha_tau. So a weak mode built from pre-trained
weights is fed correctly when its input is scaled by alpha_tau/alpha_t, it is told tau, and its output m, which
speaks about the clean coarse image, is turned back into a prediction at (x_t, t):

    x0_weak = p_tau * U y + q_tau * m,   y = (alpha_tau/alpha_t) P x_t,     prediction = p'_t * x_t + q'_t * x0_weak

(sheet H, section 0; for rectified flow `v = (x - U x0_low)/t`). Everything is linear with coefficients of t alone:
`prediction = on_state*x_t + on_coarse*(U P x_t) + on_output*m`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.paths import Path, PredictionType, conversion


class Alignment(NamedTuple):
    """Coefficients of an aligned weak call, float64, of the shape of t."""

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


def alignment(path: Path, prediction: PredictionType, t: float | Tensor, pixels: int) -> Alignment:
    """The coefficients at t for blocks of `pixels` = rh*rw fine pixels. Undefined at t = 0 (weak modes end before)."""
    here = path.alpha_sigma(t)
    tau = aligned_time(path, t, pixels)
    there = path.alpha_sigma(tau)
    # alpha_tau/alpha_t, written with sigma because alpha may vanish at t = 1: k*sigma_tau/sigma_t, by definition.
    scale = math.sqrt(pixels) * there.sigma / here.sigma
    p_low, q_low = conversion(prediction, "sample", there)
    p_out, q_out = conversion("sample", prediction, here)
    return Alignment(scale, tau, p_out, q_out * p_low * scale, q_out * q_low)


def coarse(x: Tensor, ratio: tuple[int, int]) -> Tensor:
    """U P x: every block of `ratio` pixels of (B, C, H, W) replaced by its mean."""
    pooled = F.avg_pool2d(x, ratio)
    return pooled.repeat_interleave(ratio[0], dim=-2).repeat_interleave(ratio[1], dim=-1)


def identity_alignment(t: float | Tensor) -> Alignment:
    """The coefficients of a call that needs no alignment."""
    t = torch.as_tensor(t, dtype=torch.float64)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    return Alignment(one, t, zero, zero, one)
