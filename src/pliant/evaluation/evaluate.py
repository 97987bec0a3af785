"""From a sampler to numbers with a complete recipe beside them.

Image with seed s has the class that `assigned_labels` gives to s and nothing else about it depends on the
batch size, the number of processes or the other images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation.bootstrap import Interval, bootstrap_interval, student_interval
from pliant.evaluation.features import FeatureExtractor, SpatialExtractor, distance_name
from pliant.evaluation.frechet import frechet_distance, frechet_distance_unbiased
from pliant.evaluation.gaussian_kernel import gaussian_distance
from pliant.evaluation.images import ImageSet, to_uint8
from pliant.evaluation.kid import kernel_distance
from pliant.evaluation.manifold import density_coverage, precision_recall
from pliant.evaluation.npz import NpzImages
from pliant.evaluation.processes import ALONE, Processes
from pliant.evaluation.references import Reference
from pliant.evaluation.report import DENSITY_NEIGHBOURS, NEIGHBOURS, OTHERS, EvaluationReport, Measure
from pliant.evaluation.statistics import SAME_SPACE
from pliant.evaluation.streaming import KEPT_FEATURES, Measured

# (labels (B,) int64, seeds) -> images (B, C, H, W) float in [-1, 1]; image i depends on labels[i] and
# seeds[i] only.
Sampler = Callable[[Tensor, list[int]], Tensor]
ClassSampling = Literal["balanced", "random", "none"]
LEVEL = 0.95
BOOTSTRAP_DIM = 256
"""Largest feature for which two hundred resampled distances take seconds."""


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
    processes: Processes = ALONE,
) -> Iterator[tuple[int, Tensor]]:
    """Calls the sampler batch by batch and yields (place of the first, uint8 images (<= batch, C, H, W)).

    Of several processes, each takes every so-manieth batch: the batches, and so the images, are those of one process.
    `progress(done, total)` after each. Raises ConfigError for a batch below 1, ShapeError/DataError for what the
    sampler returns.
    """
    if batch < 1:
        raise ConfigError(f"the batch must hold at least one image, got {batch}")
    starts = range(processes.rank * batch, len(seeds), processes.size * batch)
    for number, start in enumerate(starts):
        part = list(seeds[start : start + batch])
        images = sampler(labels[start : start + batch], part)
        if images.ndim != 4 or len(images) != len(part):
            raise ShapeError(f"the sampler returned {tuple(images.shape)} for {len(part)} seeds; expected (B, C, H, W)")
        yield start, to_uint8(images.detach().cpu())
        if progress is not None:
            progress(len(seeds) if number + 1 == len(starts) else (number + 1) * processes.size * batch, len(seeds))


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
    processes: Processes = ALONE,
) -> EvaluationReport:
    """Draw `repeats` x `num` images with the seeds first_seed, first_seed + 1, ... and measure them against
    `reference`.

    num: images per repeat, the n of every distance; num_classes: None for an unconditional model; describe:
    facts for the recipe that only the caller knows (model, solver, NFE, guidance, plan hash); processes: who shares the
    work, all of which call this and get the same report. Class accuracy is measured when the
    extractor is a `Classifier` of as many classes.  Raises ConfigError, DataError or ShapeError.
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
    batches = sampled_batches(sampler, seeds, labels, batch, progress, processes)
    fits = conditional and getattr(extractor, "num_classes", None) == num_classes
    parts = _measure(batches, extractor, num, repeats, labels if fits else None)
    gathered = processes.gather(parts)
    report = None
    if gathered is not None:
        for others in gathered[1:]:
            for part, other in zip(gathered[0], others, strict=True):
                part.merge(other)
        groups = labels if conditional and class_sampling == "balanced" else None
        report = _report(gathered[0], reference, extractor, groups, facts)
    return processes.share(report)


def evaluate_images(
    images: ImageSet | NpzImages,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    batch: int = 256,
    repeats: int = 1,
    describe: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """Measure images that exist already, such as `NpzImages(path)`, cut into `repeats` equal consecutive parts; their
    labels are not used, for they may be of another data set than the extractor's.

    Raises DataError when the images do not divide into the parts or the reference was made by another extractor.
    """
    if repeats < 1 or len(images) % repeats or len(images) < 2 * repeats:
        raise DataError(f"{len(images)} images do not make {repeats} equal repeats of at least two images")
    facts = {"samples": images.name, "samples_sha256": images.fingerprint(), **(describe or {})}
    batches = ((k * batch, part) for k, part in enumerate(images.batches(batch)))
    parts = _measure(batches, extractor, len(images) // repeats, repeats, None)
    return _report(parts, reference, extractor, None, facts)


def _measure(
    batches: Iterable[tuple[int, Tensor]],
    extractor: FeatureExtractor,
    num: int,
    repeats: int,
    labels: Tensor | None,
) -> list[Measured]:
    """One `Measured` per repeat from (place, images); a batch may reach into the next repeat."""
    parts = [Measured() for _ in range(repeats)]
    for start, images in batches:
        for first in range(start - start % num, start + len(images), num):
            low, high = max(start, first), min(start + len(images), first + num)
            own = None if labels is None else labels[low:high]
            parts[first // num].add(extractor, images[low - start : high - start], low - first, own)
    return parts


def _report(
    parts: Sequence[Measured],
    reference: Reference,
    extractor: FeatureExtractor,
    groups: Tensor | None,
    facts: Mapping[str, Any],
) -> EvaluationReport:
    """groups: (N,) classes that were balanced on purpose, which the extrapolation then respects."""
    num = parts[0].moments.n
    # The three facts that must agree with the reference's.
    space = dict(zip(SAME_SPACE, (extractor.name, extractor.fingerprint, extractor.preprocessing), strict=True))
    distance = Measure(tuple(frechet_distance(p.moments.statistics(space), reference.statistics) for p in parts))
    whole = num <= KEPT_FEATURES and num * len(parts) >= 4 * extractor.dim
    extrapolated = None
    if whole:
        features = torch.cat([p.features for p in parts])
        extrapolated = frechet_distance_unbiased(features, reference.statistics, groups).value
    recipe: dict[str, Any] = {
        **space,
        "images": num,
        "repeats": len(parts),
        "reference": reference.name,
        "reference_images": reference.statistics.n or "not stated by the file",
        "reference_sha256": reference.statistics.provenance.get("reference_sha256", "unknown"),
        "reference_features": 0 if reference.features is None else len(reference.features),
        "sample_features": min(num, KEPT_FEATURES),
    }
    if isinstance(extractor, SpatialExtractor):
        recipe["spatial_features"] = extractor.spatial_name
    recipe |= {"pliant": _version(), "torch": str(torch.__version__), **facts}
    interval, how = _interval(distance, parts[0], reference, groups)
    others = _others(parts, reference, space)
    return EvaluationReport(distance_name(extractor), distance, interval, how, extrapolated, **others, recipe=recipe)


def _interval(
    distance: Measure, part: Measured, reference: Reference, groups: Tensor | None
) -> tuple[Interval | None, str]:
    """Student's over repeats, or a bootstrap over the samples of a single one."""
    count = len(distance.values)
    if count > 1:
        return student_interval(distance.values, LEVEL), f"{LEVEL:.0%}, Student, {count} repeats with other seeds"
    n = part.moments.n
    if n > KEPT_FEATURES or part.features.shape[1] > BOOTSTRAP_DIM:
        return None, ""
    if groups is not None and n < 2 * len(groups.unique()):
        groups = None
    found = bootstrap_interval(part.features, reference.statistics, LEVEL, groups=groups)
    return found, f"{LEVEL:.0%}, bootstrap over the samples"


def _others(parts: Sequence[Measured], reference: Reference, space: dict[str, str]) -> dict[str, Measure | None]:
    """Every measure beside the distance, None where it cannot be had."""
    found: dict[str, Measure | None] = dict.fromkeys(OTHERS)

    def keep(name: str, values: Iterable[float]) -> None:
        found[name] = Measure(tuple(values))

    real = reference.features
    if real is not None and min(len(real), parts[0].moments.n) > DENSITY_NEIGHBOURS:
        samples = [p.features for p in parts]
        keep("kernel", (kernel_distance(x, real) for x in samples))
        keep("gaussian", (gaussian_distance(x, real) for x in samples))
        shares = [precision_recall(real, x, NEIGHBOURS) for x in samples]
        keep("precision", (s.precision for s in shares))
        keep("recall", (s.recall for s in shares))
        balls = [density_coverage(real, x, DENSITY_NEIGHBOURS) for x in samples]
        keep("density", (b.density for b in balls))
        keep("coverage", (b.coverage for b in balls))
    if reference.spatial is not None:
        spatial = [p.spatial for p in parts if p.spatial is not None]
        if len(spatial) == len(parts):
            keep("spatial", (frechet_distance(s.statistics(space), reference.spatial) for s in spatial))
    predictions = [p.predictions for p in parts if p.predictions is not None]
    if len(predictions) == len(parts):
        keep("score", (p.score for p in predictions))
    if all(p.asked for p in parts):
        keep("class_accuracy", (p.right / p.asked for p in parts))
    return found


def _version() -> str:
    from pliant import __version__

    return __version__
