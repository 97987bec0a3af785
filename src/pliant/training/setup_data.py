"""From a configuration to its training data, checked against the denoiser."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, DataError
from pliant.models.autoencoders import config_scaling, downscale_factor, load_autoencoder
from pliant.models.network import named
from pliant.training.config import DataConfig, TrainConfig
from pliant.training.data import (
    JoinedPairs,
    LatentSet,
    PairSet,
    SizedSet,
    TrainingSet,
    TwoSets,
    autoencoder_encode,
    cached_latents,
    is_pair_store,
    open_any_size,
    open_images,
)
from pliant.training.data.latents import INDEX as LATENT_INDEX
from pliant.training.data.latents import Scaling
from pliant.training.draws import Draws
from pliant.training.objectives import Objective
from pliant.training.objectives.refiner import VelocityRefiner


def data_model(objective: Objective, denoiser: Denoiser) -> Denoiser:
    """The denoiser whose states the training data are: a refiner's teacher, else the one in training."""
    return objective.teacher if isinstance(objective, VelocityRefiner) else denoiser


def build_data(config: TrainConfig, denoiser: Denoiser) -> TrainingSet:
    """The training set at the denoiser's size: images, their latents, or pairs. Raises DataError if unusable."""
    channels, height, width = denoiser.sample_shape
    if is_pair_store(config.data.source):
        parts = [PairSet(folder) for folder in (config.data.source, *config.data.more_pairs)]
        return parts[0] if len(parts) == 1 else JoinedPairs(parts)
    if config.data.more_pairs:
        raise ConfigError(f"data.more_pairs joins folders of pairs, but {config.data.source!r} is not one")
    if config.data.autoencoder is None:
        images = _images(config.data, channels, (height, width))
        if config.data.opposite is None:
            return images
        other = config.data.model_copy(update={"source": config.data.opposite})
        return TwoSets(images, _images(other, channels, (height, width)))
    if config.data.opposite is not None:
        raise ConfigError("data.opposite works on pixels: leave out data.autoencoder")
    autoencoder = load_autoencoder(config.data.autoencoder)
    factor = downscale_factor(autoencoder)
    size = (height * factor, width * factor)
    images = _images(config.data, int(getattr(autoencoder.config, "in_channels", 3)), size)
    return cached_latents(
        config.data.latents or f"{config.output}/latents",
        images,
        autoencoder_encode(autoencoder),
        f"{config.data.source} ({config.data.split}) at {size[0]}x{size[1]}, {config.data.autoencoder}",
        scaling=_latent_scaling(config, denoiser, autoencoder),
        flip=config.data.flip,
    )


def build_sized_data(config: TrainConfig, denoiser: Denoiser) -> SizedSet:
    """The training set of an objective for any size: a folder of latents (`pliant encode`), or images, nothing cropped.

    Raises DataError or ConfigError if it cannot be used.
    """
    data = config.data
    if (Path(data.source) / LATENT_INDEX).is_file():
        if data.autoencoder is not None:
            raise ConfigError(f"{data.source} holds latents already: leave out data.autoencoder")
        return LatentSet(data.source)
    if data.side is None:
        raise ConfigError("images of any size need `data.side`: those of more than side*side pixels are shrunk to that")
    steps = [math.lcm(*(patch[axis] for patch in denoiser.patch_sizes)) for axis in range(2)]
    unit = math.lcm(*steps)
    if data.autoencoder is None:
        return _sized_images(data, denoiser.config.in_channels, unit)
    autoencoder = load_autoencoder(data.autoencoder)
    unit *= downscale_factor(autoencoder)
    return cached_latents(
        data.latents or f"{config.output}/latents",
        _sized_images(data, int(getattr(autoencoder.config, "in_channels", 3)), unit),
        autoencoder_encode(autoencoder),
        f"{data.source} ({data.split}) within {data.side}x{data.side} by {unit}{cropped(data.crop)}, "
        f"{data.autoencoder}",
        scaling=_latent_scaling(config, denoiser, autoencoder),
        flip=data.flip,
    )


def _sized_images(data: DataConfig, channels: int, unit: int) -> SizedSet:
    assert data.side is not None
    return open_any_size(
        data.source, channels, data.side, unit, data.split, data.image_column, data.label_column, data.limit, data.crop
    )


def cropped(share: float) -> str:
    """What a cache of latents says of cropping: nothing where there is none."""
    return f", {share:g} cropped" if share else ""


def check_sized_data(data: SizedSet, denoiser: Denoiser) -> None:
    """Raise DataError if a sample or a label has no place in the network."""
    channels = int(data.samples(torch.tensor([0]), torch.tensor([False]), Draws.single(1)).shape[1])
    if channels != denoiser.config.in_channels:
        raise DataError(f"the data has {channels} channels, the model takes {denoiser.config.in_channels}")
    for size in data.sizes.unique(dim=0).tolist():
        denoiser.core.check_size(tuple(size))
        reason = denoiser.core.beyond(tuple(size))
        if reason is not None:
            raise DataError(
                f"the data has samples of size {named(tuple(size))}, the model says that it trains on {reason}; set "
                f"{_RANGE[denoiser.core.family]} to what the data has"
            )
    _check_labels(data.labels, denoiser, denoiser.core.family)


_RANGE = {"flexible": "model.flexible.train_sides and train_pixels", "fit": "model.fit.train_tokens"}


def _latent_scaling(config: TrainConfig, denoiser: Denoiser, autoencoder: Any) -> Scaling:
    """A trained model keeps the normalisation it was trained with; a new one gets latents of unit variance."""
    stored = denoiser.metadata.get("latents")
    if stored:
        return stored["shift"], stored["scale"]
    return "standardise" if config.model.from_ is None else config_scaling(autoencoder)


def open_data(config: DataConfig, denoiser: Denoiser) -> TrainingSet:
    """Images (not latents) at a denoiser's size. Raises DataError if they cannot be used."""
    if config.autoencoder is not None:
        raise ConfigError("this needs images as pixels: leave out the data's autoencoder")
    channels, height, width = denoiser.sample_shape
    return _images(config, channels, (height, width))


def _images(config: DataConfig, channels: int, size: tuple[int, int]) -> TrainingSet:
    return open_images(
        config.source, channels, size, config.split, config.image_column, config.label_column, config.limit
    )


def check_data(data: TrainingSet, denoiser: Denoiser) -> None:
    """Raise DataError if a sample or a label has no place in the network."""
    if tuple(data.shape) != denoiser.sample_shape:
        raise DataError(f"the data has samples of {tuple(data.shape)}, the model takes {denoiser.sample_shape}")
    _check_labels(data.labels, denoiser, "dit")


def _check_labels(labels: torch.Tensor, denoiser: Denoiser, family: str) -> None:
    highest = int(labels.max())
    if highest >= denoiser.num_classes:
        raise DataError(
            f"the data has labels up to {highest}, but the model has {denoiser.num_classes} classes; "
            f"set model.{family}.num_classes to at least {highest + 1}"
        )


def with_data_facts(denoiser: Denoiser, data: TrainingSet | SizedSet) -> Denoiser:
    """The denoiser with what its users must know of the data: class names, and how latents were normalised."""
    facts: dict[str, Any] = {}
    names = list(data.class_names)
    if "class_names" not in denoiser.metadata and len(names) == denoiser.num_classes:
        facts["class_names"] = names
    if isinstance(data, LatentSet):
        facts["latents"] = data.normalisation
    return replace(denoiser, metadata={**denoiser.metadata, **facts})
