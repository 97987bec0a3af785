"""What a network may predict, and the exact conversion between any two predictions.

Every prediction kind is one row over the pair (x0, eps): `P = u*x0 + w*eps`. Together with the definition of the
state, `x = alpha*x0 + sigma*eps`, two rows determine the pair, so *one* 2x2 solve converts any kind into any other:
no table of thirty special cases, and no sign convention outside this file.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from pliant.errors import ConfigError, suggest

PredictionType: TypeAlias = Literal["epsilon", "sample", "velocity", "v_prediction", "score"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


class AlphaSigma(NamedTuple):
    """A Gaussian path at given times: `x_t = alpha*x0 + sigma*eps`, with d/dt of both. All float64, one shape."""

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


def prediction_type(name: str) -> PredictionType:
    """`name` checked against the known kinds. Raises ConfigError with the nearest one."""
    if name not in PREDICTION_TYPES:
        raise ConfigError(f"unknown prediction type {name!r}: {suggest(name, PREDICTION_TYPES)}")
    return name


def row(kind: str, s: AlphaSigma) -> tuple[Tensor, Tensor]:
    """Coefficients (u, w) of a prediction kind: `P = u*x0 + w*eps`."""
    zero, one = torch.zeros_like(s.alpha), torch.ones_like(s.alpha)
    if kind == "epsilon":
        return zero, one
    if kind == "sample":
        return one, zero
    if kind == "velocity":  # dx/dt, t growing towards noise
        return s.dalpha, s.dsigma
    if kind == "v_prediction":  # derivative along the angle atan2(sigma, alpha); Salimans & Ho, arXiv 2202.00512
        return -s.sigma, s.alpha
    if kind == "score":  # grad log p_t(x) = -E[eps|x]/sigma
        return zero, -1.0 / s.sigma
    raise ConfigError(f"unknown prediction type {kind!r}: {suggest(kind, PREDICTION_TYPES)}")


def conversion(kind_from: str, kind_to: str, s: AlphaSigma) -> tuple[Tensor, Tensor]:
    """Coefficients (p, q) such that `target = p*x + q*value` for a state x and a prediction `value` of `kind_from`.

    Float64, of the shape of `s.alpha`. Where the pair (x0, eps) is not determined by (x, value) (for instance epsilon
    at alpha = 0) the coefficients are infinite or nan: that is a property of the path, not a rounding problem.
    """
    source, target = prediction_type(kind_from), prediction_type(kind_to)
    if source == target:
        return torch.zeros_like(s.alpha), torch.ones_like(s.alpha)
    u, w = row(source, s)
    u2, w2 = row(target, s)
    det = s.alpha * w - s.sigma * u
    return (u2 * w - w2 * u) / det, (w2 * s.alpha - u2 * s.sigma) / det
