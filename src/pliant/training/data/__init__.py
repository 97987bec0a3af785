"""Training data: sources, decoding, in-memory and lazy sets, latent caches, stateless order."""

from pliant.training.data.feed import EqualBlocks, Feed
from pliant.training.data.images import ImageSet, LazyImageSet, PairedSet, TrainingSet, digits, open_images
from pliant.training.data.latents import (
    Encoded,
    LatentSet,
    autoencoder_encode,
    cached_latents,
)
from pliant.training.data.order import EpochOrder
from pliant.training.data.packs import Packs, TokenFeed
from pliant.training.data.pairs import JoinedPairs, PairSet, TwoSets, is_pair_store
from pliant.training.data.sizes import AnySizeImages, SizedSet, fitted_size, open_any_size
from pliant.training.data.sources import Source, open_source

__all__ = [
    "AnySizeImages",
    "Encoded",
    "EpochOrder",
    "EqualBlocks",
    "Feed",
    "ImageSet",
    "JoinedPairs",
    "LatentSet",
    "LazyImageSet",
    "Packs",
    "PairSet",
    "PairedSet",
    "SizedSet",
    "Source",
    "TokenFeed",
    "TrainingSet",
    "TwoSets",
    "autoencoder_encode",
    "cached_latents",
    "digits",
    "fitted_size",
    "is_pair_store",
    "open_any_size",
    "open_images",
    "open_source",
]
