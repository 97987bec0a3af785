"""Guidance without a second network call: StreamDiffusion's virtual negative (RCFG, arXiv 2312.12491).

The unconditional prediction is replaced by the noise that would lead from the current state back to a known clean
image, the *reference*: `s = (x - alpha*reference) / sigma`. Self-negative: the reference is the input frame.
One-time negative: it is the clean image that one unconditional call at the first level sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import AlphaSigma, conversion, like
from pliant.paths.predictions import row


def virtual_noise(x: Tensor, reference: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """The virtual negative s (B, ...) of states x at alpha, sigma (numbers or (B,)): what would undo to `reference`."""
    alpha, sigma = (torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (alpha, sigma))
    return (x - like(alpha, x) * reference) / like(sigma, x)


def next_virtual_noise(s: Tensor, eps: Tensor, noise: Tensor, here: AlphaSigma, there: AlphaSigma) -> Tensor:
    """s at the next level from s at this one, where the state is re-noised: the recursion of the published code.

    eps: the guided noise that the step from `here` to `there` used; noise: what it added,
    `x' = alpha'*x0 + sigma'*noise`.
    Equal to `virtual_noise` of the next state, for a reference that the caller need not keep.
    """
    gap = like(here.sigma / here.alpha, s) * (s - eps)  # x0 estimate - reference
    return noise + like(there.alpha / there.sigma, s) * gap


def guided_noise(eps: Tensor, s: Tensor, scale: float, delta: float = 1.0) -> Tensor:
    """`delta*s + scale*(eps - delta*s)`: noise predictions eps guided away from the virtual negative s, all (B, ...).

    delta moderates the negative: 1 is the plain rule, 0 scales eps itself. scale = 1 changes nothing.
    """
    if scale == 1.0:
        return eps
    return torch.lerp(delta * s, eps, scale)


def virtual_rows(kind: str, at: AlphaSigma, delta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(on the state, on the reference): the moderated virtual negative as a prediction of `kind`.

    With it `guide(prediction, on_state*x + on_reference*reference, scale)` is `guided_noise` in any kind: convert to
    epsilon, guide, convert back, folded into two numbers per level. Float64, of the shape of `at.alpha`.
    Raises ConfigError where the numbers do not exist: sigma = 0, and alpha = 0 with delta != 1 for kinds that do not
    determine epsilon's share there.
    """
    if delta == 1.0:  # the pair (reference, s) is a point of the path, so every kind is finite down to alpha = 0
        u, w = row(kind, at)
        rows = w / at.sigma, u - w * at.alpha / at.sigma
    else:
        p, q = conversion("epsilon", kind, at)
        rows = p + delta * q / at.sigma, -delta * q * at.alpha / at.sigma
    return _finite(rows, kind, delta)


def moderated_rows(kind: str, at: AlphaSigma, delta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(on the state, on the output): `delta * epsilon` of an unconditional output, as a prediction of `kind`.

    The first level of one-time guidance, where the negative is a real call. Float64; raises ConfigError as above.
    """
    if delta == 1.0:
        return torch.zeros_like(at.alpha), torch.ones_like(at.alpha)
    p, _ = conversion("epsilon", kind, at)
    return _finite(((1.0 - delta) * p, torch.full_like(p, delta)), kind, delta)


def _finite(rows: tuple[Tensor, Tensor], kind: str, delta: float) -> tuple[Tensor, Tensor]:
    if not all(bool(torch.isfinite(r).all()) for r in rows):
        raise ConfigError(
            f"guidance with delta={delta:g} is not defined for {kind} predictions at pure noise or clean data; "
            f"start below t=1, or use delta=1"
        )
    return rows
