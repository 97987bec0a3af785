"""From a sampler to numbers with a complete recipe beside them.

Image with seed s has the class that `assigned_labels` gives to s and nothing else about it depends on the
batch size, the number of processes or the other images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation.features import Classifier, FeatureExtractor, distance_name, extract
from pliant.evaluation.frechet import frechet_distance, frechet_distance_unbiased
from pliant.evaluation.images import ImageSet, to_uint8
from pliant.evaluation.kid import kernel_distance
from pliant.evaluation.manifold import precision_recall
from pliant.evaluation.references import Reference
from pliant.evaluation.statistics import SAME_SPACE, FeatureStatistics

# (labels (B,) int64, seeds) -> images (B, C, H, W) float in [-1, 1]; image i depends on labels[i] and
# seeds[i] only.
Sampler = Callable[[Tensor, list[int]], Tensor]
ClassSampling = Literal["balanced", "random", "none"]
NEIGHBOURS = 3  # of the precision/recall balls


@dataclass(frozen=True)
class Measure:
    """One number per repeat (disjoint seeds)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over repeats; None for a single one."""
        n = len(self.values)
        return (sum((v - self.mean) ** 2 for v in self.values) / (n - 1)) ** 0.5 if n > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "values": list(self.values)}

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.std is None else f"{self.mean:.4g} ± {self.std:.2g}"


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured and how. `metric` is the only name `distance` may be quoted under."""

    metric: str  # e.g. "Fréchet distance (digits-classifier)"
    distance: Measure  # each value from recipe["images"] images
    extrapolated: float | None  # `distance` for infinitely many samples, from all images; None if there are too few
    kernel: Measure | None  # unbiased kernel distance; None without reference features, as precision and recall
    precision: Measure | None
    recall: Measure | None
    class_accuracy: Measure | None  # share of images that the extractor's classifier sees as what was asked for
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, text, lists and dicts, ready for JSON."""
        names = ("distance", "kernel", "precision", "recall", "class_accuracy")
        measures = {n: m.to_dict() if (m := getattr(self, n)) is not None else None for n in names}
        return {
            "metric": self.metric,
            **measures,
            "extrapolated": self.extrapolated,
            "recipe": dict(self.recipe),
        }

    def __str__(self) -> str:
        space = self.recipe.get("extractor", "")
        lines = [f"{self.metric}: {self.distance}"]
        if self.distance.std is not None:
            lines[0] += f"  (mean ± standard deviation of {len(self.distance.values)} repeats with disjoint seeds)"
        if self.extrapolated is not None:
            lines.append(f"  extrapolated to infinitely many samples: {self.extrapolated:.4g}")
        for name, measure in (
            (f"kernel distance ({space})", self.kernel),
            (f"precision ({space}, k={NEIGHBOURS})", self.precision),
            (f"recall ({space}, k={NEIGHBOURS})", self.recall),
            (f"class accuracy ({space})", self.class_accuracy),
        ):
            if measure is not None:
                lines.append(f"  {name}: {measure}")
        lines.append("recipe")
        lines += [f"  {k}: {v}" for k, v in self.recipe.items()]
        return "\n".join(lines)


def assigned_labels(seeds: Sequence[int], num_classes: int | None, sampling: ClassSampling = "balanced") -> Tensor:
    """Class of every seed, (len(seeds),) int64: seed % num_classes ("balanced"), a hash of the seed
    ("random", uniform and independent of the noise that the seed also draws), or zeros ("none" or no
    classes).

    Raises ConfigError for an unknown rule.
    """
    if sampling not in ("balanced", "random", "none"):
        raise ConfigError(f"class sampling is 'balanced', 'random' or 'none', not {sampling!r}")
    if num_classes is None or sampling == "none":
        return torch.zeros(len(seeds), dtype=torch.int64)
    if num_classes < 1:
        raise ConfigError(f"num_classes must be positive, got {num_classes}")
    if sampling == "balanced":
        return torch.tensor([s % num_classes for s in seeds], dtype=torch.int64)
    hashed = (hashlib.sha256(f"pliant class of seed {s}".encode()).digest()[:8] for s in seeds)
    return torch.tensor([int.from_bytes(h, "big") % num_classes for h in hashed], dtype=torch.int64)


def sampled_batches(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Tensor,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Calls the sampler batch by batch and yields uint8 images (<= batch, C, H, W); `progress(done, total)`
    after each.

    Raises ConfigError for a batch below 1, ShapeError/DataError for what the sampler returns.
    """
    if batch < 1:
        raise ConfigError(f"the batch must hold at least one image, got {batch}")
    for start in range(0, len(seeds), batch):
        part = list(seeds[start : start + batch])
        images = sampler(labels[start : start + batch], part)
        if images.ndim != 4 or len(images) != len(part):
            raise ShapeError(f"the sampler returned {tuple(images.shape)} for {len(part)} seeds; expected (B, C, H, W)")
        yield to_uint8(images.detach().cpu())
        if progress is not None:
            progress(start + len(part), len(seeds))


def evaluate(
    sampler: Sampler,
    reference: Reference,
    extractor: FeatureExtractor,
    num: int,
    *,
    batch: int = 64,
    num_classes: int | None = None,
    class_sampling: ClassSampling = "balanced",
    first_seed: int = 0,
    repeats: int = 1,
    describe: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Draw `repeats` x `num` images with the seeds first_seed, first_seed + 1, ... and measure them against
    `reference`.

    num: images per repeat, the n of every distance; num_classes: None for an unconditional model; describe:
    facts for the recipe that only the caller knows (model, solver, NFE, guidance, plan hash). Class accuracy
    is measured when the extractor is a `Classifier` of as many classes.  Raises ConfigError, DataError or
    ShapeError.
    """
    if num < 2 or repeats < 1:
        raise ConfigError(f"expected num >= 2 and repeats >= 1, got {num} and {repeats}")
    seeds = range(first_seed, first_seed + num * repeats)
    labels = assigned_labels(seeds, num_classes, class_sampling)
    conditional = num_classes is not None and class_sampling != "none"
    rule = {"balanced": "balanced (seed mod {n})", "random": "uniform over {n}, by a hash of the seed"}
    facts = {
        "seeds": f"{first_seed}..{seeds[-1]}, one generator per image",
        "class_sampling": rule[class_sampling].format(n=num_classes) if conditional else "none (unconditional)",
        **(describe or {}),
    }
    batches = sampled_batches(sampler, seeds, labels, batch, progress)
    fits = conditional and getattr(extractor, "num_classes", None) == num_classes
    return evaluate_batches(
        batches,
        reference,
        extractor,
        labels=labels if fits else None,
        groups=labels if conditional and class_sampling == "balanced" else None,
        repeats=repeats,
        describe=facts,
    )


def evaluate_images(
    images: ImageSet,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    batch: int = 256,
    repeats: int = 1,
    describe: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """Measure images that exist already, such as `read_npz(path)`; their labels are not used, for they may be
    of another data set than the extractor's. See `evaluate`."""
    facts = {"samples": images.name, "samples_sha256": images.fingerprint(), **(describe or {})}
    return evaluate_batches(images.batches(batch), reference, extractor, repeats=repeats, describe=facts)


def evaluate_batches(
    batches: Iterable[Tensor],
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    labels: Tensor | None = None,
    groups: Tensor | None = None,
    repeats: int = 1,
    describe: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """Measure a stream of uint8 batches (B, C, H, W), cut into `repeats` equal consecutive parts.

    labels: (N,) classes that were asked for, in the extractor's numbering, or None; groups: (N,) classes that
    were balanced on purpose, which the extrapolation then respects.  Raises DataError when the images do not
    divide into the parts or the reference was made by another extractor.
    """
    features = extract(extractor, batches)
    if repeats < 1 or len(features) % repeats or len(features) < 2 * repeats:
        raise DataError(f"{len(features)} images do not make {repeats} equal repeats of at least two images")
    parts = features.split(len(features) // repeats)
    # The three facts that must agree with the reference's.
    space = dict(zip(SAME_SPACE, (extractor.name, extractor.fingerprint, extractor.preprocessing), strict=True))
    statistics = [FeatureStatistics.of(p, space) for p in parts]
    distance = Measure(tuple(frechet_distance(s, reference.statistics) for s in statistics))
    enough = len(features) >= 4 * extractor.dim
    extrapolated = frechet_distance_unbiased(features, reference.statistics, groups).value if enough else None

    real = reference.features
    kernel = precision = recall = None
    if real is not None and min(len(real), len(parts[0])) > NEIGHBOURS:
        kernel = Measure(tuple(kernel_distance(p, real) for p in parts))
        both = [precision_recall(real, p, NEIGHBOURS) for p in parts]
        precision, recall = Measure(tuple(b.precision for b in both)), Measure(tuple(b.recall for b in both))
    recipe: dict[str, Any] = {
        **space,
        "images": len(parts[0]),
        "repeats": repeats,
        "reference": reference.name,
        "reference_images": reference.statistics.n or "not stated by the file",
        "reference_sha256": reference.statistics.provenance.get("reference_sha256", "unknown"),
        "reference_features": 0 if real is None else len(real),
        **(describe or {}),
    }
    accuracy = _class_accuracy(extractor, parts, labels)
    return EvaluationReport(
        distance_name(extractor), distance, extrapolated, kernel, precision, recall, accuracy, recipe
    )


def class_accuracy(predicted: Tensor, asked: Tensor) -> float:
    """Share of samples classified as asked; both (N,) int64.  Raises ShapeError when they differ in length or
    are empty.
    """
    if predicted.shape != asked.shape or predicted.ndim != 1 or len(asked) == 0:
        raise ShapeError(f"expected two equal lists of classes, got {tuple(predicted.shape)} and {tuple(asked.shape)}")
    return float((predicted == asked).double().mean())


def _class_accuracy(extractor: FeatureExtractor, parts: Sequence[Tensor], labels: Tensor | None) -> Measure | None:
    if labels is None or not isinstance(extractor, Classifier):
        return None
    asked = labels.split(len(parts[0]))
    return Measure(tuple(class_accuracy(extractor.classify(p), a) for p, a in zip(parts, asked, strict=True)))
