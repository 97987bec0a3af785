"""Distances to the all-powerful plan's own samples: for models without reference images, and Flexiffusion's measure.

A relative Fréchet distance asks whether a plan makes the same distribution as full compute does, guidance and all, not
whether that distribution is a good one.
"""

from __future__ import annotations

import hashlib
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.evaluation import FeatureExtractor, FeatureStatistics, Reference
from pliant.planning.distribution import Decode, FrechetObjective, sampled_features
from pliant.planning.teacher import labels_of, weights_of
from pliant.plans import Plan

GRID, BANDS = 4, 6
REACH = 4.0
"""Latents are about normal and images end at 1: latents are divided by this before they are made 8-bit."""


class PooledFeatures:
    """Features that need no trained network: for images or latents of any size and number of channels.

    Means over a 4x4 grid of cells per channel, and the logarithm of the power in six rings of frequency per channel.
    They see colour, layout and sharpness, not what things are.
    """

    name = "pooled-pixels-and-spectrum"
    preprocessing = f"8-bit; means of {GRID}x{GRID} cells, log power in {BANDS} rings of frequency"

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.dim = channels * (GRID * GRID + BANDS)
        self.fingerprint = hashlib.sha256(f"{self.name} 1 {channels} {GRID} {BANDS}".encode()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, dim) float32."""
        x = images.float()
        cells = torch.nn.functional.adaptive_avg_pool2d(x, GRID).flatten(1)
        power = torch.fft.rfft2(x, norm="ortho").abs().square()
        rows = torch.fft.fftfreq(x.shape[-2]).abs()[:, None]
        columns = torch.fft.rfftfreq(x.shape[-1])[None]
        ring = (2 * BANDS * torch.maximum(rows, columns)).floor().clamp(max=BANDS - 1).long()
        means = [power[..., ring == k].mean(-1) if bool((ring == k).any()) else power[..., 0, 0] for k in range(BANDS)]
        return torch.cat([cells, 0.1 * torch.stack(means, -1).add(1e-4).log().flatten(1)], 1)


def within_reach(latents: Tensor) -> Tensor:
    """Latents as 8-bit images can hold them: cut at +-REACH instead of +-1."""
    return latents / REACH


def decode_for(model: Denoiser, extractor: FeatureExtractor) -> Decode | None:
    """What makes 8-bit images of a model's samples for an extractor where nobody named an autoencoder."""
    latents = model.config.in_channels not in (1, 3)
    return within_reach if latents and isinstance(extractor, PooledFeatures) else None


def teacher_features(
    model: Denoiser,
    plan: Plan,
    extractor: FeatureExtractor,
    num: int,
    first_seed: int = 0,
    batch: int = 256,
    decode: Decode | None = None,
) -> Tensor:
    """(num, D) features of a plan's samples, seeds first_seed, first_seed + 1, ..., classes in turn."""
    every = range(first_seed, first_seed + num)
    return sampled_features(model, plan, labels_of(model, every), every, extractor, batch, decode)


def teacher_reference(
    model: Denoiser, plan: Plan, extractor: FeatureExtractor, features: Tensor, first_seed: int = 0
) -> Reference:
    """What samples are compared with: `teacher_features` of so many seeds, and their statistics."""
    name = f"plan {plan.digest()}, seeds {first_seed}..{first_seed + len(features) - 1}"
    facts = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "preprocessing": extractor.preprocessing,
        "reference": name,
        "reference_sha256": hashlib.sha256(f"{name} {weights_of(model)}".encode()).hexdigest(),
    }
    return Reference(name, FeatureStatistics.of(features, facts), features)


class RelativeObjective(FrechetObjective):
    """Fréchet distance to the samples of `full` from the same seeds (Flexiffusion's rFID, arXiv 2409.17566).

    extractor: None for `PooledFeatures`, which needs no weights. `full` itself scores 0. features: (num, D) of `full`'s
    samples, where they are known. decode: latents -> images; None for `PooledFeatures` of latents as they are
    (`within_reach`).
    """

    def __init__(
        self,
        model: Denoiser,
        full: Plan,
        extractor: FeatureExtractor | None = None,
        num: int = 256,
        first_seed: int = 0,
        features: Tensor | None = None,
        decode: Decode | None = None,
    ) -> None:
        extractor = extractor or PooledFeatures(model.config.in_channels)
        decode = decode or decode_for(model, extractor)
        begun = perf_counter()
        if features is None:
            features = teacher_features(model, full, extractor, num, first_seed, decode=decode)
        reference = teacher_reference(model, full, extractor, features, first_seed)
        self.seconds = perf_counter() - begun
        """What sampling full compute took."""
        super().__init__(model, reference, extractor, num, first_seed, decode=decode)
        self.full = full

    @property
    def name(self) -> str:
        return f"relative {super().name}"

    def describe(self) -> dict[str, Any]:
        seen = {"latents": f"divided by {REACH:g}"} if self.decode is within_reach else {}
        return {**super().describe(), **seen}

    def starting_at(self, first_seed: int, num: int | None = None) -> RelativeObjective:
        return RelativeObjective(
            self.model, self.full, self.extractor, num or self.num, first_seed, decode=self.decode
        )

    def on_first(self, num: int) -> RelativeObjective:
        """The same on the first `num` of these seeds."""
        known = self.reference.features
        features = None if known is None else known[:num]
        return RelativeObjective(self.model, self.full, self.extractor, num, self.first_seed, features, self.decode)
