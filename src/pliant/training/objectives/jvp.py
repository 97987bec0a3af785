"""The derivative of a flow map along a trajectory: at a point, or its mean over a window of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pliant.compute import Compute
from pliant.paths import like

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def velocity_and_derivative(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    tangent: Tensor,
    *,
    rate: Tensor | None = None,
    lands: Tensor | None = None,
    compute: Compute | None = None,
) -> tuple[Tensor, Tensor]:
    """(u, du): the velocity at states x (B, C, H, W) and times t (B,), and its change along (tangent, rate).

    tangent: dx (B, C, H, W); rate: dt (B,), 1 by default: then du is the total derivative `tangent . grad_x u + du/dt`
    with the landing held fixed. u carries gradients, du does not. Attention runs as plain products here: the fused
    kernels have no forward-mode derivative.
    """
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        moving = forward_ad.make_dual(x, tangent.to(x.dtype))
        time = forward_ad.make_dual(t, torch.ones_like(t) if rate is None else rate.to(t.dtype))
        answer = denoiser(moving, time, labels, compute, lands).to("velocity")
        u, du = forward_ad.unpack_dual(answer)
    return u, torch.zeros_like(u) if du is None else du.detach()


def velocity_and_difference(
    denoiser: Denoiser, x: Tensor, t: Tensor, labels: Tensor, tangent: Tensor, lands: Tensor, window: float
) -> tuple[Tensor, Tensor]:
    """(u, du) as above, du the mean of the derivative over `window` of time before and after: a central difference.

    Networks that are told 1000 t answer with ripples in t, small in themselves but steep: on the shipped digits model
    the derivative at a point is two to seven times as large as its mean over +-0.02, and has little to do with it. The
    window is cut at t = 1 and where the step lands. Two more forward passes; no forward-mode derivative, so any kernel.
    """
    u = denoiser(x, t, labels, lands=lands).to("velocity")
    later, earlier = (t + window).clamp(max=1.0), torch.maximum(t - window, lands)
    with torch.no_grad():
        after = denoiser(x + like(later - t, x) * tangent, later, labels, lands=lands).to("velocity")
        before = denoiser(x - like(t - earlier, x) * tangent, earlier, labels, lands=lands).to("velocity")
        gap = later - earlier
        du = (after - before) / like(torch.where(gap > 0, gap, torch.ones_like(gap)), x)
    return u, du
