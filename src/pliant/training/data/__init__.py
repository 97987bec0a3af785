"""Training data: sources, decoding, in-memory and lazy sets, latent caches, stateless order."""

from pliant.training.data.feed import Feed
from pliant.training.data.images import ImageSet, LazyImageSet, TrainingSet, digits, open_images
from pliant.training.data.latents import (
    Encoded,
    LatentSet,
    autoencoder_encode,
    cached_latents,
)
from pliant.training.data.order import EpochOrder
from pliant.training.data.sizes import AnySizeImages, SizedSet, fitted_size, open_any_size
from pliant.training.data.sources import Source, open_source

__all__ = [
    "AnySizeImages",
    "Encoded",
    "EpochOrder",
    "Feed",
    "ImageSet",
    "LatentSet",
    "LazyImageSet",
    "SizedSet",
    "Source",
    "TrainingSet",
    "autoencoder_encode",
    "cached_latents",
    "digits",
    "fitted_size",
    "open_any_size",
    "open_images",
    "open_source",
]
