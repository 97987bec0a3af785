"""Training data: sources, decoding, in-memory and lazy sets, latent caches, and the stateless sample order."""

from pliant.training.data.feed import Feed
from pliant.training.data.images import ImageSet, LazyImageSet, TrainingSet, digits, open_images
from pliant.training.data.order import EpochOrder
from pliant.training.data.sources import Source, open_source

__all__ = [
    "EpochOrder",
    "Feed",
    "ImageSet",
    "LazyImageSet",
    "Source",
    "TrainingSet",
    "digits",
    "open_images",
    "open_source",
]
