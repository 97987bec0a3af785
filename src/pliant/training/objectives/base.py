"""What an objective is: `objective(denoiser, batch, draws) -> Loss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pliant.training.draws import Draws

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class Batch:
    """Training samples on the training device.

    images: (B, C, H, W) float32, pixels in [-1, 1] or normalised latents. labels: (B,) int64 classes.
    partners: (B, C, H, W) other samples with the same labels, only for objectives with `needs_partners`.
    sources: (B, C, H, W) the other ends of the path (noise, or another data set's samples), only of data with pairs.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor | None = None
    sources: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclass(frozen=True)
class SizedBatch:
    """Training samples of several sizes, those of one size together.

    groups: (B_g, C, *size_g) float32 each, normalised. labels: (sum of B_g,) int64 classes, group by group.
    """

    groups: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def pixels(self) -> Tensor:
        """(B,) pixels of every sample."""
        return torch.cat([torch.full((len(x),), x[0, 0].numel()) for x in self.groups])


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise and detached scalars to log (tensors: logging must not wait for the device)."""

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss for a denoiser. Pure: all randomness comes from `draws`.

    Two kinds of fields of an objective (a dataclass) are the trainer's business: denoisers, which are frozen teachers
    and are moved to the training device, and one called `average`, which is set to a denoiser that always holds the
    running average of the weights in training (the target network of consistency models).
    """

    @property
    def needs_partners(self) -> bool:
        """Whether batches must carry a second sample of each label."""
        ...

    def __call__(self, denoiser: Denoiser, batch: Any, draws: Draws) -> Loss:
        """batch: a `Batch`, or a `SizedBatch` of objectives for samples of any size."""
        ...

    def check(self, denoiser: Denoiser) -> None:
        """Raise ConfigError if this denoiser cannot be trained with this objective."""
        ...

    def flops(self, denoiser: Denoiser) -> float:
        """Expected FLOPs per training image (a backward pass counts as two forward passes)."""
        ...


def drop_labels(batch: Batch | SizedBatch, denoiser: Denoiser, probability: float, draws: Draws) -> Tensor:
    """(B,) labels, each replaced by the null label with `probability`: classifier-free guidance training.

    Always consumes one draw, so the rest of a step's randomness does not depend on the probability.
    """
    dropped = draws.uniform() < probability
    return torch.where(dropped, denoiser.null_label, batch.labels) if probability > 0 else batch.labels
