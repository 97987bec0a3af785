"""Rectified flow on samples of any size in one packed pass, at a random patch size per batch: the native backbone's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.models.network import Size, Taps
from pliant.paths import TimeDensity, get_time_density
from pliant.paths.levels import shifted_times
from pliant.training.draws import Draws
from pliant.training.objectives.base import Loss, SizedBatch, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def _logit_normal() -> TimeDensity:
    return get_time_density("logit-normal")


@dataclass(frozen=True)
class AnySizeFlow:
    """Mean over samples of the mean squared error of the velocity over a sample's own elements (sheet B, section 1).

    shift_pixels: size at which times are as drawn; larger samples see later (noisier) times, smaller ones earlier, by
    `s = sqrt(pixels / shift_pixels)` (SD3's resolution-dependent shift, arXiv 2403.03206, eq. 23); None: no shift.
    patches: how often each of the network's patch sizes is trained, in its order; None: all equally often.
    """

    time: TimeDensity = field(default_factory=_logit_normal)
    class_dropout: float = 0.1
    shift_pixels: int | None = None
    patches: tuple[float, ...] | None = None

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: SizedBatch, draws: Draws) -> Loss:
        return self.tapped(denoiser, batch, draws, None)

    def tapped(self, denoiser: Denoiser, batch: SizedBatch, draws: Draws, taps: Taps | None) -> Loss:
        """The loss, and the hidden states that `taps` asks for filled in."""
        patch = self.choose(denoiser.patch_sizes, draws)
        t = draws.each(self.time.sample)
        if self.shift_pixels is not None:
            t = shift_by_size(t, batch.pixels.to(t.device), self.shift_pixels)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        noise = draws.noises(denoiser.path, [x.shape[1:] for x in batch.groups for _ in range(len(x))])
        xs, targets, at = [], [], 0
        for images in batch.groups:
            here = slice(at, at + len(images))
            at += len(images)
            own = torch.stack(noise[here])
            xs.append(denoiser.path.mix(images, own, t[here]))
            targets.append(denoiser.path.target("velocity", images, own, t[here]))
        found = denoiser.packed(xs, t, labels, Compute(patch=patch), taps)
        errors = [
            (p.to("velocity").float() - target).square().flatten(1).mean(1)
            for p, target in zip(found, targets, strict=True)
        ]
        loss = torch.cat(errors).mean()
        return Loss(loss, {f"loss_patch_{'x'.join(map(str, patch))}": loss.detach()})

    def choose(self, sizes: tuple[Size, ...], draws: Draws) -> Size:
        """The batch's patch size, equal on all processes of the step."""
        weights = torch.tensor(self.patches or (1.0,) * len(sizes))
        return sizes[int(torch.multinomial(weights, 1, generator=draws.shared()))]

    def check(self, denoiser: Denoiser) -> None:
        if not denoiser.core.any_size:
            raise ConfigError(
                f"objective 'any_size' trains networks for any size (`model: {{flexible: ...}}` or `{{fit: ...}}`), "
                f"this is a {denoiser.core.family}"
            )
        if not denoiser.path.gaussian_source:
            raise ConfigError(f"any_size trains paths with a Gaussian source, not {denoiser.path.name!r}")
        if self.patches is not None and (
            len(self.patches) != len(denoiser.patch_sizes) or min(self.patches) < 0 or sum(self.patches) <= 0
        ):
            raise ConfigError(
                f"`patches` says how often each of {len(denoiser.patch_sizes)} patch sizes is trained, "
                f"got {list(self.patches)}"
            )

    def flops(self, denoiser: Denoiser) -> float:
        weights = self.patches or (1.0,) * len(denoiser.patch_sizes)
        each = zip(weights, denoiser.patch_sizes, strict=True)
        return 3.0 * sum(w * denoiser.flops(Compute(patch=p)) for w, p in each) / sum(weights)


def shift_by_size(t: Tensor, pixels: Tensor, reference: int) -> Tensor:
    """Times (B,) of states of `pixels` (B,) as noisy to the eye as times t of states of `reference` pixels."""
    shift = (pixels.double() / reference).sqrt()
    return shifted_times(t.double(), shift).to(t.dtype)

