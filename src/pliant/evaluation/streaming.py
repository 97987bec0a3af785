"""Measurements that see every image once and keep none: sums, and at most a capped number of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pliant.errors import DataError, ShapeError
from pliant.evaluation.features import Classifier, FeatureExtractor, SpatialExtractor
from pliant.evaluation.images import from_uint8
from pliant.evaluation.inception_score import Predictions
from pliant.evaluation.statistics import FeatureStatistics

KEPT_FEATURES = 10_000
"""Per repeat, for the distances between neighbours and pairs, whose cost is quadratic; the first ones by seed."""


@dataclass
class Moments:
    """Running mean (D,) and scatter (D, D), float64: memory does not grow with the number of features."""

    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """features: (B, D), B >= 1."""
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        self._join(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        if other.n:
            self._join(other.n, other.mean, other.scatter)

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub & LeVeque 1979: no large squares are subtracted."""
        if not self.n:
            self.n, self.mean, self.scatter = n, mean, scatter
            return
        total = self.n + n
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def statistics(self, provenance: Mapping[str, str] | None = None) -> FeatureStatistics:
        """Raises DataError without features."""
        if not self.n:
            raise DataError("no features were given; at least one is needed")
        return FeatureStatistics(self.n, self.mean, self.scatter / max(self.n - 1, 1), dict(provenance or {}))


@dataclass
class Measured:
    """Everything known about one set of images (one repeat)."""

    moments: Moments = field(default_factory=Moments)
    spatial: Moments | None = None
    predictions: Predictions | None = None
    right: int = 0
    """Images that the classifier sees as what was asked for."""
    asked: int = 0
    kept: list[tuple[int, Tensor]] = field(default_factory=list)
    """(place of the first row, features) of the images at places below the cap."""

    def add(
        self,
        extractor: FeatureExtractor,
        images: Tensor,
        place: int,
        labels: Tensor | None = None,
        cap: int = KEPT_FEATURES,
    ) -> None:
        """images: (B, C, H, W) uint8 at places place, place + 1, ...; labels: (B,) of the extractor's classes."""
        x = from_uint8(images)
        if isinstance(extractor, SpatialExtractor):
            features, spatial = extractor.both(x)
            self.spatial = self.spatial or Moments()
            self.spatial.add(spatial)
        else:
            features = extractor(x)
        features = features.cpu()
        self.moments.add(features)
        if isinstance(extractor, Classifier):
            logits = extractor.logits(features).cpu()
            found = Predictions.of(logits)
            self.predictions = found if self.predictions is None else self.predictions + found
            if labels is not None:
                if labels.shape != (len(images),):
                    raise ShapeError(f"expected {len(images)} labels, got {tuple(labels.shape)}")
                self.right += int((logits.argmax(1) == labels).sum())
                self.asked += len(labels)
        if place < cap:
            self.kept.append((place, features[: cap - place]))

    def merge(self, other: Measured) -> None:
        """Take in what another process measured of the same set."""
        self.moments.merge(other.moments)
        if other.spatial is not None:
            self.spatial = self.spatial or Moments()
            self.spatial.merge(other.spatial)
        if other.predictions is not None:
            mine = self.predictions
            self.predictions = other.predictions if mine is None else mine + other.predictions
        self.right += other.right
        self.asked += other.asked
        self.kept += other.kept

    @property
    def features(self) -> Tensor:
        """(<= cap, D), in the order of places."""
        return torch.cat([rows for _, rows in sorted(self.kept, key=lambda entry: entry[0])])
