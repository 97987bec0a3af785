"""What is measured by where nobody said by what."""

from __future__ import annotations

from pliant.denoiser import Denoiser
from pliant.evaluation import FeatureExtractor, bundled_extractor, get_extractor
from pliant.planning.distribution import SEARCHED
from pliant.planning.relative import RelativeObjective
from pliant.plans import Plan

IMAGES = 256
"""Samples of the default measure."""


def default_objective(
    model: Denoiser, steps: int = 50, guidance: float | None = None, num: int = IMAGES, first_seed: int = SEARCHED
) -> RelativeObjective:
    """How far a plan's samples are from those of full compute, guidance and all, as distributions.

    It keeps what the user asked for, and needs no data. To be nearer to data than full compute is, give a
    `FrechetObjective` with a reference.
    """
    full = Plan.uniform(model, steps, guidance=guidance)
    return RelativeObjective(model, full, default_extractor(model), num, first_seed)


def default_extractor(model: Denoiser) -> FeatureExtractor | None:
    """A trained extractor from the package for images of this size; None for others: `PooledFeatures`."""
    name = bundled_extractor(model.sample_shape)
    return None if name is None else get_extractor(name)
