"""Latents to images with an autoencoder of diffusers. Imported late: diffusers takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pliant.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.denoiser import Denoiser


def open_decoder(source: str, model: Denoiser) -> Callable[[Tensor], Tensor]:
    """A function from this model's latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1].

    source: folder (or Hub id) of any diffusers autoencoder. Latents are un-normalised as the model's training data
    were, or as the autoencoder's config says. Raises FormatError or ConfigError.
    """
    import torch

    from pliant.models.autoencoders import decoded, load_autoencoder

    autoencoder = load_autoencoder(source).to(model.device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return decoded(autoencoder, latents, model.metadata.get("latents"))

    channels = getattr(autoencoder.config, "latent_channels", None)
    if channels is not None and channels != model.config.in_channels:
        raise ConfigError(f"{source} decodes {channels} channels, the model makes {model.config.in_channels}")
    return decode
