"""Distances to the all-powerful plan's own samples: for models without reference images, and Flexiffusion's measure.

A relative Fréchet distance asks whether a plan makes the same distribution as full compute does, guidance and all, not
whether that distribution is a good one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.evaluation import FeatureExtractor, FeatureStatistics, Reference, extract, to_uint8
from pliant.planning.distribution import FrechetObjective
from pliant.planning.teacher import labels_of
from pliant.plans import Plan, sample

GRID, BANDS = 4, 6


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


def teacher_reference(
    model: Denoiser, plan: Plan, extractor: FeatureExtractor, num: int, batch: int = 256
) -> Reference:
    """Feature statistics of `num` samples of a plan, seeds 0, 1, ..., classes in turn."""
    labels = labels_of(model, range(num))
    parts = []
    for start in range(0, num, batch):
        seeds = range(start, min(num, start + batch))
        images = sample(model, plan, labels[start : start + batch], seeds, batch)
        parts.append(extract(extractor, [to_uint8(images.float().cpu())]))
    name = f"{num} samples of plan {plan.digest()}"
    facts = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "preprocessing": extractor.preprocessing,
        "reference": name,
        "reference_sha256": hashlib.sha256(f"{name} {model.fingerprint()}".encode()).hexdigest(),
    }
    features = torch.cat(parts)
    return Reference(name, FeatureStatistics.of(features, facts), features)


def relative_objective(
    model: Denoiser, full: Plan, extractor: FeatureExtractor | None = None, num: int = 256, first_seed: int = 0
) -> FrechetObjective:
    """Fréchet distance to the samples of `full` from the same seeds (Flexiffusion's rFID, arXiv 2409.17566).

    extractor: None for `PooledFeatures`, which needs no weights. The plan itself scores 0 at first_seed 0.
    """
    extractor = extractor or PooledFeatures(model.config.in_channels)
    return FrechetObjective(model, teacher_reference(model, full, extractor, num), extractor, num, first_seed)
