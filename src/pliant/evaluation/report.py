"""The numbers of one evaluation, their names, and the recipe beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pliant.evaluation.bootstrap import Interval
from pliant.evaluation.features import ENCODERS, INCEPTION
from pliant.evaluation.gaussian_kernel import BANDWIDTH, SCALE

NEIGHBOURS = 3  # of the precision/recall balls
DENSITY_NEIGHBOURS = 5  # of the density/coverage balls


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
    """What was measured and how. `metric` is the only name `distance` may be quoted under.

    A measure is None where the reference or the extractor cannot give it: the kernel distances and the shares need
    reference features, the spatial distance spatial features on both sides, score and accuracy a classifier.
    """

    metric: str  # e.g. "Fréchet distance (digits-classifier)"
    distance: Measure  # each value from recipe["images"] images
    interval: Interval | None  # of the distance's mean; None where features are too many or long for a bootstrap
    interval_how: str  # level and method, "" without one
    extrapolated: float | None  # `distance` for infinitely many samples, from all images; None if too few or too many
    spatial: Measure | None  # Fréchet distance of spatial features; sFID with Inception's
    kernel: Measure | None  # unbiased, cubic kernel; KID with Inception's features
    gaussian: Measure | None  # Gaussian kernel on unit features; CMMD with CLIP's
    precision: Measure | None
    recall: Measure | None
    density: Measure | None
    coverage: Measure | None
    score: Measure | None  # Inception score of the extractor's classifier
    class_accuracy: Measure | None  # share of images that the extractor's classifier sees as what was asked for
    recipe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, text, lists and dicts, ready for JSON."""
        measures = {n: m.to_dict() if (m := getattr(self, n)) is not None else None for n in ("distance", *OTHERS)}
        return {
            "metric": self.metric,
            **measures,
            "interval": None if self.interval is None else {**asdict(self.interval), "how": self.interval_how},
            "extrapolated": self.extrapolated,
            "recipe": dict(self.recipe),
        }

    def __str__(self) -> str:
        lines = [f"{self.metric}: {self.distance}"]
        if self.distance.std is not None:
            lines[0] += f"  (mean ± standard deviation of {len(self.distance.values)} repeats with disjoint seeds)"
        if self.interval is not None:
            lines.append(f"  interval: {self.interval.low:.4g} to {self.interval.high:.4g} ({self.interval_how})")
        if self.extrapolated is not None:
            lines.append(f"  extrapolated to infinitely many samples: {self.extrapolated:.4g}")
        called = titles(self.recipe)
        lines += [f"  {called[n]}: {m}" for n in OTHERS if (m := getattr(self, n)) is not None]
        lines.append("recipe")
        lines += [f"  {k}: {v}" for k, v in self.recipe.items()]
        return "\n".join(lines)


OTHERS = ("spatial", "kernel", "gaussian", "precision", "recall", "density", "coverage", "score", "class_accuracy")
"""Measures beside the distance, in order."""


def titles(recipe: dict[str, Any]) -> dict[str, str]:
    """What each of `OTHERS` may be called: the papers' short names belong to the papers' networks only."""
    space = recipe.get("extractor", "")
    inception, clip = space == INCEPTION, ENCODERS["clip"] in space
    return {
        "spatial": f"{'sFID' if inception else 'spatial Fréchet distance'} ({space}, {recipe.get('spatial_features')})",
        "kernel": f"{'KID' if inception else 'kernel distance'} ({space}, cubic)",
        "gaussian": f"{'CMMD' if clip else 'kernel distance'} ({space}, Gaussian of width {BANDWIDTH:g}, x {SCALE:g})",
        "precision": f"precision ({space}, k={NEIGHBOURS})",
        "recall": f"recall ({space}, k={NEIGHBOURS})",
        "density": f"density ({space}, k={DENSITY_NEIGHBOURS})",
        "coverage": f"coverage ({space}, k={DENSITY_NEIGHBOURS})",
        "score": f"Inception score ({space})",
        "class_accuracy": f"class accuracy ({space})",
    }
