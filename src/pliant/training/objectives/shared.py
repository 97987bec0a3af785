"""Recipe S of FlexiDiT (arXiv 2502.20126; sheet A, 1.5): one set of weights, random patch sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, Objective
from pliant.training.objectives.mmd import mmd_squared

if TYPE_CHECKING:
    from pliant.denoiser import Prediction

Patch = tuple[int, ...]


def choose(patches: Sequence[Patch], draws: Draws) -> Patch:
    """One patch size, uniformly, equal on all processes of the step."""
    return patches[int(torch.randint(len(patches), (1,), generator=draws.shared()))]


def model_patches(denoiser: Denoiser) -> list[Patch]:
    """The patch sizes of a flexible denoiser, its own first. Raises ConfigError if there is only one."""
    patches: list[Patch] = list(denoiser.patch_sizes)
    if len(patches) < 2:
        raise ConfigError(
            f"this objective needs a flexible model, but the model has only patch size {patches[0]}; "
            f"add sizes with `flexify: {{patch_sizes: [...]}}`"
        )
    return patches


def _weakest_first(patches: Sequence[Patch]) -> list[Patch]:
    return sorted(patches, key=lambda patch: (-math.prod(patch), patch))


@dataclass(frozen=True)
class MMDBootstrap:
    """Make the weak-then-powerful chain land on the data's own noisy distribution (sheet A, 1.5, 7.3).

    Noise real images up to a time, walk down a few steps of the sampling grid with ever smaller patches, and
    compare with other images of the same classes noised to the end time. Gradients flow through the steps at
    the smallest patch only. The walk is the deterministic DDIM step, so its only randomness is the starting
    noise.
    """

    weight: float = 0.1
    weak_steps: int = 2
    powerful_steps: int = 2
    grid: int = 250
    """Steps of the sampling grid in which the chain is a piece."""
    clean_bias: float = 2.0
    """The end time is `u**clean_bias` of its range, u uniform: above 1 favours the clean end."""

    def __post_init__(self) -> None:
        if self.weak_steps < 1 or self.powerful_steps < 1 or self.weak_steps + self.powerful_steps >= self.grid:
            raise ConfigError("mmd needs weak_steps >= 1, powerful_steps >= 1 and a grid longer than their sum")

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws, patches: Sequence[Patch]) -> Tensor:
        if batch.partners is None:
            raise ConfigError("the MMD bootstrap needs a second sample per label (Batch.partners)")
        length = self.weak_steps * (len(patches) - 1) + self.powerful_steps
        u = float(torch.rand(1, generator=draws.shared(), dtype=torch.float64))
        # At least one grid step away from t = 0, where the target would be the noise-free data itself.
        low = 1 + int(u**self.clean_bias * (self.grid - length))
        times = [(low + length - i) / self.grid for i in range(length + 1)]
        path, shape = denoiser.path, batch.images.shape[1:]
        target = path.mix(batch.images, draws.noise(path, shape), times[-1])
        x = path.mix(batch.partners, draws.noise(path, shape), times[0])
        *weak, powerful = _weakest_first(patches)
        schedule = [patch for patch in weak for _ in range(self.weak_steps)] + [powerful] * self.powerful_steps
        for i, patch in enumerate(schedule):
            with torch.set_grad_enabled(patch == powerful and torch.is_grad_enabled()):
                x = _ddim_step(denoiser, x, times[i], times[i + 1], batch.labels, patch)
        return mmd_squared(x, target)

    def flops(self, denoiser: Denoiser, patches: Sequence[Patch]) -> float:
        *weak, powerful = _weakest_first(patches)
        walk = self.weak_steps * sum(denoiser.flops(Compute(patch=patch)) for patch in weak)
        return walk + 3.0 * self.powerful_steps * denoiser.flops(Compute(patch=powerful))


def _ddim_step(denoiser: Denoiser, x: Tensor, t: float, s: float, labels: Tensor, patch: Patch) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 with sigma = 0) from time t to s."""
    prediction = denoiser(x, t, labels, Compute(patch=patch, merged=False))
    return denoiser.path.mix(prediction.to("sample"), prediction.to("epsilon"), s)


@dataclass(frozen=True)
class AtPatch(Denoiser):
    """A denoiser whose calls run at `patch`, unmerged, unless they name a patch themselves."""

    patch: Patch = ()

    @staticmethod
    def of(denoiser: Denoiser, patch: Patch) -> AtPatch:
        return AtPatch(**{f.name: getattr(denoiser, f.name) for f in fields(Denoiser)}, patch=patch)

    def __call__(
        self,
        x: Tensor,
        t: float | Tensor,
        cond: Tensor,
        compute: Compute | None = None,
        lands: float | Tensor | None = None,
    ) -> Prediction:
        compute = compute or Compute()
        if compute.patch is None:
            compute = replace(compute, patch=(self.patch[0], self.patch[1]), merged=False)
        return super().__call__(x, t, cond, compute, lands)


@dataclass(frozen=True)
class SharedPatches:
    """Another objective at a random patch size per batch, plus (optionally) the MMD bootstrap.

    Only the model in training runs at that size: teachers and targets keep theirs.
    """

    own: Objective
    mmd: MMDBootstrap | None = None

    @property
    def needs_partners(self) -> bool:
        return self.mmd is not None

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        patches = model_patches(denoiser)
        patch = choose(patches, draws)
        own = self.own(AtPatch.of(denoiser, patch), batch, draws)
        logs = {**own.logs, f"loss_patch_{'x'.join(map(str, patch))}": own.loss.detach()}
        if self.mmd is None:
            return Loss(own.loss, logs)
        gap = self.mmd(denoiser, batch, draws, patches)
        return Loss(own.loss + self.mmd.weight * gap, {**logs, "mmd": gap.detach()})

    def check(self, denoiser: Denoiser) -> None:
        model_patches(denoiser)
        self.own.check(denoiser)

    def flops(self, denoiser: Denoiser) -> float:
        patches = model_patches(denoiser)
        own = 3.0 * sum(denoiser.flops(Compute(patch=patch)) for patch in patches) / len(patches)
        return own + (0.0 if self.mmd is None else self.mmd.flops(denoiser, patches))
