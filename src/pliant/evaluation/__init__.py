"""Measuring samples: Fréchet and kernel distances, precision and recall, class accuracy, with complete
recipes.
"""

from pliant.evaluation.bootstrap import Interval, Spread, bootstrap_interval, spread, student_interval
from pliant.evaluation.evaluate import assigned_labels, evaluate, evaluate_images
from pliant.evaluation.features import (
    Classifier,
    FeatureExtractor,
    SpatialExtractor,
    available_extractors,
    bundled_extractor,
    distance_name,
    extract,
    get_extractor,
)
from pliant.evaluation.frechet import (
    Extrapolation,
    frechet_distance,
    frechet_distance_unbiased,
)
from pliant.evaluation.gaussian_kernel import gaussian_distance
from pliant.evaluation.images import (
    ImageSet,
    digits,
    from_uint8,
    images_from_folder,
    images_from_parquet,
    to_uint8,
)
from pliant.evaluation.inception_score import Predictions, inception_score
from pliant.evaluation.kid import kernel_distance
from pliant.evaluation.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from pliant.evaluation.npz import (
    NpzImages,
    npz_batches,
    npz_spatial_statistics,
    npz_statistics,
    read_npz,
    write_npz,
    write_npz_statistics,
)
from pliant.evaluation.processes import Processes
from pliant.evaluation.references import Reference, load_reference, reference_of, save_reference
from pliant.evaluation.report import EvaluationReport, Measure
from pliant.evaluation.statistics import FeatureStatistics

__all__ = [
    "Classifier",
    "DensityCoverage",
    "EvaluationReport",
    "Extrapolation",
    "FeatureExtractor",
    "FeatureStatistics",
    "ImageSet",
    "Interval",
    "Measure",
    "NpzImages",
    "PrecisionRecall",
    "Predictions",
    "Processes",
    "Reference",
    "SpatialExtractor",
    "Spread",
    "assigned_labels",
    "available_extractors",
    "bootstrap_interval",
    "bundled_extractor",
    "density_coverage",
    "digits",
    "distance_name",
    "evaluate",
    "evaluate_images",
    "extract",
    "frechet_distance",
    "frechet_distance_unbiased",
    "from_uint8",
    "gaussian_distance",
    "get_extractor",
    "images_from_folder",
    "images_from_parquet",
    "inception_score",
    "kernel_distance",
    "load_reference",
    "npz_batches",
    "npz_spatial_statistics",
    "npz_statistics",
    "precision_recall",
    "read_npz",
    "reference_of",
    "save_reference",
    "spread",
    "student_interval",
    "to_uint8",
    "write_npz",
    "write_npz_statistics",
]
