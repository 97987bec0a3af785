"""The objective that decides: the Fréchet distance of few samples to real images, with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    Reference,
    distance_name,
    extract,
    frechet_distance,
    to_uint8,
)
from pliant.evaluation.bootstrap import bootstrap_interval, normal_interval, spread
from pliant.planning.objective import LEVEL, Remembered, Score
from pliant.planning.teacher import labels_of
from pliant.plans import AnyPlan, sample

Decode: TypeAlias = Callable[[Tensor], Tensor]
"""Latents (B, C, H, W) -> images."""
SEARCHED = 50_000_000
"""Where the seeds of searches begin where nobody names others: 'pliant eval' and pictures begin at 0."""
FRESH = 1_000_000_000
"""Where the seeds of confirmations begin: no search draws there (`apart`)."""
MEASURED = 2 * FRESH
"""Where the seeds of frontiers begin: what a planner finds is not even confirmed there."""


def apart(first: int) -> int:
    """Where a search's images begin that would begin at `first`: there, or where that is not well below `FRESH`, far
    above everything that confirms or measures."""
    return first if first < FRESH - 1_000_000 else first + 10 * FRESH


def features_of(images: Tensor, extractor: FeatureExtractor, decode: Decode | None = None) -> Tensor:
    """(B, D) features of samples (B, C, H, W), made images by `decode` and 8-bit first."""
    images = images if decode is None else decode(images)
    return extract(extractor, [to_uint8(images.float().cpu())])


def sampled_features(
    model: Denoiser,
    plan: AnyPlan,
    labels: Tensor,
    seeds: Sequence[int],
    extractor: FeatureExtractor,
    batch: int,
    decode: Decode | None = None,
) -> Tensor:
    """(N, D) features of a plan's samples, `batch` at a time."""
    parts = (slice(start, start + batch) for start in range(0, len(seeds), batch))
    return torch.cat(
        [features_of(sample(model, plan, labels[p], seeds[p], batch), extractor, decode) for p in parts]
    )


class FrechetObjective(Remembered):
    """Fréchet distance of `num` images per plan to a reference, in an extractor's features.

    Image k has seed first_seed + k and the class of that seed, for every plan: differences between plans are much
    smaller than intervals suggest, see `difference`. Features are kept per plan, so that resampling costs milliseconds.
    The value is biased upwards by the finite number, equally for all plans: compare at one `num` only.
    decode: latents (B, C, H, W) -> images, for latent models.
    """

    def __init__(
        self,
        model: Denoiser,
        reference: Reference,
        extractor: FeatureExtractor,
        num: int = 500,
        first_seed: int = 0,
        batch: int = 256,
        decode: Decode | None = None,
    ) -> None:
        super().__init__()
        self.model, self.reference, self.extractor = model, reference, extractor
        self.num, self.first_seed, self.batch, self.decode = num, first_seed, batch, decode
        self.seeds: Sequence[int] = range(first_seed, first_seed + num)
        self.labels = labels_of(model, self.seeds)
        self._features: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        return distance_name(self.extractor)

    def describe(self) -> dict[str, Any]:
        return {
            "objective": "frechet",
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.fingerprint,
            "reference": self.reference.name,
            "reference_sha256": self.reference.statistics.provenance.get("reference_sha256", "unknown"),
            "images": self.num,
            "seeds": f"{self.first_seed}..{self.first_seed + self.num - 1}",
            "classes": "balanced",
        }

    def on_fresh_seeds(self, num: int | None = None, repeat: int = 0) -> FrechetObjective:
        """The same measure on images that no search has seen; each `repeat` has seeds of its own."""
        num = num or self.num
        return self.starting_at(FRESH + repeat * num, num)

    def starting_at(self, first_seed: int, num: int | None = None) -> FrechetObjective:
        """The same measure on `num` images (default: as many) from this seed on; nothing is remembered."""
        num = num or self.num
        return FrechetObjective(self.model, self.reference, self.extractor, num, first_seed, self.batch, self.decode)

    def features(self, plan: AnyPlan) -> Tensor:
        """(num, D) features of the plan's images, sampled when first needed."""
        key = plan.digest()
        if key not in self._features:
            self._features[key] = sampled_features(
                self.model, plan, self.labels, self.seeds, self.extractor, self.batch, self.decode
            )
        return self._features[key]

    def measure(self, plan: AnyPlan) -> Score:
        # Where most classes have one image, as 256 of 1000 classes, there is nothing to resample within a class.
        groups = self.labels if self.num >= 2 * len(self.labels.unique()) else None
        found = bootstrap_interval(self.features(plan), self.reference.statistics, LEVEL, groups=groups)
        return Score(found.value, max(0.0, found.low), found.high, self.num)

    def difference(self, plan: AnyPlan, other: AnyPlan) -> Score:
        """How much worse `plan` is than `other`; both are resampled alike, so what they share cancels.

        The 90 % interval excludes 0 where the difference is significant. Value and ends may be negative.
        """
        pair = [self.features(p) for p in (plan, other)]
        statistics = self.reference.statistics
        value = [frechet_distance(FeatureStatistics.of(f, statistics.provenance), statistics) for f in pair]
        first, second = (spread(f, statistics, groups=self.labels) for f in pair)
        found = normal_interval(value[0] - value[1], (first - second).error, LEVEL)
        return Score(found.value, found.low, found.high, self.num)
