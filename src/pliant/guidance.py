"""Guidance: combining two predictions of one state. Linear in any prediction kind, so it works on stored outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.errors import PlanError


def weak_scale(scale: float) -> float:
    """The weak-model scale that matches a classifier-free scale: `1 + (s-1)/2.5` (FlexiDiT; sheet A, 1.8)."""
    return 1.0 + (scale - 1.0) / 2.5


@dataclass(frozen=True)
class Guidance:
    """`reference + scale*(conditional - reference)`: away from a worse prediction of the same state.

    against "null": the reference is the unconditional prediction (classifier-free guidance, arXiv 2207.12598);
    against "weak": it is the *same condition* seen by a weaker network call (FlexiDiT, section 3.4).
    """

    scale: float
    against: Literal["null", "weak"] = "null"
    compute: Compute | None = None
    """Of the reference call; None: the same as the step's own."""
    channels: int | None = None
    """Guide only the first so many channels (3 reproduces DiT's and SiT's tables); None: all."""

    def __post_init__(self) -> None:
        if self.against not in ("null", "weak"):
            raise PlanError(f"guidance is against 'null' or 'weak', not {self.against!r}")
        if self.against == "weak" and self.compute is None:
            raise PlanError("guidance against a weak call needs that call's compute, e.g. Compute.of(patch=4)")
        if self.channels is not None and self.channels < 1:
            raise PlanError(f"guidance needs at least 1 channel, got {self.channels}; leave it out to guide all")

    @staticmethod
    def cfg(scale: float, compute: Compute | None = None, channels: int | None = None) -> Guidance:
        """Classifier-free guidance."""
        return Guidance(scale, "null", compute, channels)

    @staticmethod
    def weak_model(scale: float, compute: Compute, channels: int | None = None) -> Guidance:
        """The weak call with the same condition as the reference. See `weak_scale` for the scale."""
        return Guidance(scale, "weak", compute, channels)

    def to_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "against": self.against,
            "compute": self.compute.to_dict() if self.compute else None,
            "channels": self.channels,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Guidance:
        """Inverse of `to_dict`. Raises PlanError for unknown keys."""
        try:
            fields = dict(data)
            if fields.get("compute") is not None:
                fields["compute"] = Compute.from_dict(fields["compute"])
            return Guidance(**fields)
        except TypeError as error:
            raise PlanError(f"guidance takes scale, against, compute, channels: {error}") from None


def guide(conditional: Tensor, reference: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """`reference + scale*(conditional - reference)` on the first `channels`; the rest stays conditional.

    (B, C, ...) both. scale = 1 returns the conditional prediction itself, bit for bit.
    """
    if scale == 1.0:
        return conditional
    if channels is None or channels >= conditional.shape[1]:
        return torch.lerp(reference, conditional, scale)
    guided = torch.lerp(reference[:, :channels], conditional[:, :channels], scale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)
