"""The Inception score: how sure a classifier is of each image, and how many classes it sees in all.

Salimans et al. 2016 (arXiv 1606.03498): exp of the mean Kullback-Leibler divergence of p(y|x) from p(y). It is named
after its classifier; it looks at no real image, so a memorised image per class scores best. Never judge by it alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import DataError, ShapeError


@dataclass(frozen=True, eq=False)
class Predictions:
    """The sums that the score needs, so that no image or logit has to be kept.

    n: images; negentropy: sum over images of sum_y p log p, nats; probabilities: (classes,) sum of p, float64.
    """

    n: int
    negentropy: float
    probabilities: Tensor

    @staticmethod
    def of(logits: Tensor) -> Predictions:
        """logits: (n, classes).  Raises ShapeError, DataError for NaN."""
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ShapeError(f"expected logits (n, classes) of at least two classes, got {tuple(logits.shape)}")
        logs = logits.detach().to("cpu", torch.float64).log_softmax(1)
        p = logs.exp()
        if not bool(torch.isfinite(p).all()):
            raise DataError("the logits contain NaN or infinity; look at the samples before measuring them")
        # p log p is 0 where p underflows.
        return Predictions(len(p), float(torch.where(p > 0, p * logs, 0.0).sum()), p.sum(0))

    def __add__(self, other: Predictions) -> Predictions:
        if self.probabilities.shape != other.probabilities.shape:
            raise ShapeError("predictions over different classes cannot be added")
        return Predictions(
            self.n + other.n, self.negentropy + other.negentropy, self.probabilities + other.probabilities
        )

    @property
    def score(self) -> float:
        """1 (every image looks alike to the classifier) to the number of classes.  Raises DataError without images."""
        if self.n < 1:
            raise DataError("the Inception score needs at least one image")
        mean = self.probabilities / self.n
        marginal = float(torch.where(mean > 0, mean * mean.log(), 0.0).sum())
        return math.exp(self.negentropy / self.n - marginal)


def inception_score(logits: Tensor, splits: int = 1) -> tuple[float, ...]:
    """The score of each of `splits` consecutive parts of logits (n, classes).

    Papers quote mean and deviation over 10 splits of 50,000 images; a split's score grows with its size.
    Raises DataError when the parts would be empty.
    """
    if splits < 1 or len(logits) < splits:
        raise DataError(f"{len(logits)} logits do not make {splits} parts")
    edges = [len(logits) * i // splits for i in range(splits + 1)]
    return tuple(Predictions.of(logits[a:b]).score for a, b in pairwise(edges))
