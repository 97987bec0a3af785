"""The derivative of a flow map along a trajectory, by forward-mode differentiation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pliant.compute import Compute

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
