"""Between frames and what the model sees: nothing for models of pixels, an autoencoder for models of latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.autoencoders import decoded, downscale_factor, encoded, load_autoencoder


class Codec(Protocol):
    """Frames (B, C, H, W) in [-1, 1] <-> latents (B, c, h, w)."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a frame."""
        ...

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """The model sees the frames themselves."""

    frame_shape: tuple[int, int, int]

    def encode(self, frames: Tensor) -> Tensor:
        return frames

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class Latents:
    """The model sees an autoencoder's latents, without its sampling noise."""

    autoencoder: Any
    normalisation: dict[str, Any] | None
    frame_shape: tuple[int, int, int]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        return encoded(self.autoencoder, frames, self.normalisation)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.autoencoder, latents, self.normalisation)


def open_codec(model: Denoiser, autoencoder: str | None = None) -> Codec:
    """The codec of a model. autoencoder: folder or Hub id, for models of latents. Raises ConfigError or FormatError."""
    channels, height, width = model.image_shape
    if autoencoder is None:
        if channels not in (1, 3):
            raise ConfigError(
                f"this model sees latents of {channels} channels, not images: name its autoencoder (--autoencoder)"
            )
        return Pixels(model.image_shape)
    loaded = load_autoencoder(autoencoder).to(model.device)
    found = getattr(loaded.config, "latent_channels", None)
    if found is not None and found != channels:
        raise ConfigError(f"{autoencoder} makes {found} channels, the model sees {channels}")
    factor = downscale_factor(loaded)
    pixels = int(getattr(loaded.config, "in_channels", 3))
    return Latents(loaded, model.metadata.get("latents"), (pixels, height * factor, width * factor))
