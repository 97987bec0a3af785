"""Measuring samples: Fréchet and kernel distances, precision and recall, class accuracy, with complete
recipes.
"""

from pliant.evaluation.bootstrap import Interval, bootstrap_interval, resampled_distances
from pliant.evaluation.evaluate import (
    EvaluationReport,
    Measure,
    assigned_labels,
    class_accuracy,
    evaluate,
    evaluate_batches,
    evaluate_images,
)
from pliant.evaluation.features import (
    Classifier,
    FeatureExtractor,
    available_extractors,
    distance_name,
    extract,
    get_extractor,
)
from pliant.evaluation.frechet import (
    Extrapolation,
    frechet_distance,
    frechet_distance_unbiased,
)
from pliant.evaluation.images import (
    ImageSet,
    digits,
    from_uint8,
    images_from_folder,
    images_from_parquet,
    to_uint8,
)
from pliant.evaluation.kid import kernel_distance
from pliant.evaluation.manifold import PrecisionRecall, precision_recall
from pliant.evaluation.npz import npz_batches, npz_statistics, read_npz, write_npz, write_npz_statistics
from pliant.evaluation.references import Reference, load_reference, reference_of
from pliant.evaluation.statistics import FeatureStatistics

__all__ = [
    "Classifier",
    "EvaluationReport",
    "Extrapolation",
    "FeatureExtractor",
    "FeatureStatistics",
    "ImageSet",
    "Interval",
    "Measure",
    "PrecisionRecall",
    "Reference",
    "assigned_labels",
    "available_extractors",
    "bootstrap_interval",
    "class_accuracy",
    "digits",
    "distance_name",
    "evaluate",
    "evaluate_batches",
    "evaluate_images",
    "extract",
    "frechet_distance",
    "frechet_distance_unbiased",
    "from_uint8",
    "get_extractor",
    "images_from_folder",
    "images_from_parquet",
    "kernel_distance",
    "load_reference",
    "npz_batches",
    "npz_statistics",
    "precision_recall",
    "read_npz",
    "reference_of",
    "resampled_distances",
    "to_uint8",
    "write_npz",
    "write_npz_statistics",
]
