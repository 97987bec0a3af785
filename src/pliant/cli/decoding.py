"""Latents to images with an autoencoder of diffusers. Imported late: diffusers takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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

    from pliant.models.autoencoders import load_autoencoder

    autoencoder = load_autoencoder(source).to(model.device)
    shift, scale = _normalisation(model, autoencoder)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        x = latents.float() / scale.to(latents.device) + shift.to(latents.device)
        images: Tensor = autoencoder.decode(x.to(latents.device)).sample
        return images.float()

    channels = getattr(autoencoder.config, "latent_channels", None)
    if channels is not None and channels != model.config.in_channels:
        raise ConfigError(f"{source} decodes {channels} channels, the model makes {model.config.in_channels}")
    return decode


def _normalisation(model: Denoiser, autoencoder: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale), broadcastable to latents: the model saw `(latent - shift) * scale`."""
    import torch

    from pliant.models.autoencoders import config_scaling

    stored = model.metadata.get("latents")
    if stored:
        shift, scale = (torch.tensor(stored[k], dtype=torch.float32) for k in ("shift", "scale"))
        return shift[:, None, None], scale[:, None, None]
    own_shift, own_scale = config_scaling(autoencoder)
    return torch.tensor(own_shift), torch.tensor(own_scale)
