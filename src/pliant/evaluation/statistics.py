"""Mean and covariance of features, in float64, mergeable and saved with where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import DataError, FormatError, ShapeError

FORMAT = "pliant-feature-statistics-1"
# What must agree before two statistics may be compared or merged, when both state it.
SAME_SPACE = ("extractor", "extractor_sha256", "preprocessing")


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and unbiased covariance of n feature vectors.

    n: how many, or None where a foreign file does not say; mean: (D,) float64; cov: (D, D) float64, divided
    by n - 1 (zeros for n = 1); provenance: text facts such as extractor, preprocessing, reference,
    reference_sha256.
    """

    n: int | None
    mean: Tensor
    cov: Tensor
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if d < 1 or self.cov.shape != (d, d):
            raise ShapeError(
                f"expected mean (D,) and cov (D, D), got {tuple(self.mean.shape)}, {tuple(self.cov.shape)}"
            )
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            raise ShapeError("statistics are kept in float64; use FeatureStatistics.of(features)")
        if self.n is not None and self.n < 1:
            raise DataError(f"statistics of {self.n} features do not exist; at least one is needed")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.cov).all()):
            raise DataError("the features contain NaN or infinity; look at the samples before measuring them")

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    @cached_property
    def factor(self) -> Tensor:
        """`covariance_factor` of the covariance, computed once: a reference is compared with many sets of samples."""
        return covariance_factor(self.cov)

    @classmethod
    def of(cls, features: Tensor, provenance: Mapping[str, str] | None = None) -> FeatureStatistics:
        """features: (n, D) of any float type.  Raises ShapeError, or DataError when there are none."""
        if features.ndim != 2:
            raise ShapeError(f"expected features (n, D), got {tuple(features.shape)}")
        if len(features) == 0:
            raise DataError("no features were given; at least one is needed")
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred / max(len(x) - 1, 1), dict(provenance or {}))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together, as if computed at once (Chan, Golub & LeVeque 1979).

        Raises DataError if the two come from different extractors or do not say their n.
        """
        require_same_space(self, other)
        if self.n is None or other.n is None:
            raise DataError("statistics without a sample count cannot be merged; recompute them from images")
        n = self.n + other.n
        shift = other.mean - self.mean
        scatter = self.cov * (self.n - 1) + other.cov * (other.n - 1)
        scatter = scatter + torch.outer(shift, shift) * (self.n * other.n / n)
        provenance = {k: v for k, v in self.provenance.items() if other.provenance.get(k) == v}
        return FeatureStatistics(n, self.mean + shift * (other.n / n), scatter / (n - 1), provenance)

    def save(self, path: str | Path) -> None:
        """One safetensors file; provenance and n in its metadata."""
        from safetensors.torch import save_file

        metadata = {**self.provenance, "format": FORMAT, "n": "unknown" if self.n is None else str(self.n)}
        tensors = {"mean": self.mean.contiguous(), "cov": self.cov.contiguous()}
        save_file(tensors, path, metadata={k: str(v) for k, v in metadata.items()})

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Raises FormatError for a missing, damaged or foreign file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as e:
            raise FormatError(f"{path} is not a readable safetensors file ({e})") from e
        if metadata.pop("format", None) != FORMAT or set(tensors) != {"mean", "cov"}:
            raise FormatError(f"{path} is not a file of feature statistics ({FORMAT}); write one with .save(path)")
        n = metadata.pop("n", "")
        if n != "unknown" and not n.isdecimal():
            raise FormatError(f"{path}: the sample count {n!r} is not a number; the file is damaged")
        return cls(None if n == "unknown" else int(n), tensors["mean"], tensors["cov"], metadata)


def require_same_space(a: FeatureStatistics, b: FeatureStatistics) -> None:
    """Raises ShapeError or DataError unless both live in the same feature space as far as they say."""
    if a.dim != b.dim:
        raise ShapeError(f"features have {a.dim} and {b.dim} dimensions; use the same extractor for both")
    for key in SAME_SPACE:
        x, y = a.provenance.get(key), b.provenance.get(key)
        if x is not None and y is not None and x != y:
            raise DataError(f"statistics differ in {key}: {x!r} and {y!r}; recompute one of them")


def covariance_factor(cov: Tensor) -> Tensor:
    """(D, D) symmetric positive semi-definite -> F (D, rank) with F F^T = cov.

    Eigenvalues within rounding of zero are left out: the root of a rounding error would be 1e8 times the error.
    n < D features have rank n - 1, which makes what follows cheaper.
    Raises DataError if the matrix is clearly not a covariance.
    """
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    largest = float(values[-1])
    if values[0] < -1e-3 * max(largest, torch.finfo(torch.float64).tiny):
        raise DataError(
            f"the covariance has the negative eigenvalue {float(values[0]):.3g}; the statistics are damaged"
        )
    rounding = len(values) * torch.finfo(torch.float64).eps * largest
    found = values > rounding
    return vectors[:, found] * values[found].sqrt()
