"""Latents to images with an autoencoder of diffusers. Imported late: diffusers takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.denoiser import Denoiser


def open_decoder(source: str, model: Denoiser) -> Callable[[Tensor], Tensor]:
    """A function from this model's latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1].

    source: folder (or Hub id) of any diffusers autoencoder. Latents are un-normalised as the model's training data
    were, or as the autoencoder's config says. Raises FormatError or ConfigError.
    """
    import torch

    autoencoder = _load(source).to(model.device)
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


def _load(source: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise ConfigError("--decode needs diffusers: pip install 'pliant[diffusers]'") from None
    folder = Path(source)
    name = "AutoencoderKL"
    if folder.exists():
        try:
            name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise FormatError(
                f"{source} is not a diffusers autoencoder: it holds no config.json with a class"
            ) from None
    loader = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if loader is None:
        raise FormatError(f"{source} is a {name}; expected an autoencoder such as AutoencoderKL or AutoencoderTiny")
    try:
        return loader.from_pretrained(source).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"cannot load the autoencoder {source}: {reason}") from None


def _normalisation(model: Denoiser, autoencoder: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale), broadcastable to latents: the model saw `(latent - shift) * scale`."""
    import torch

    stored = model.metadata.get("latents")
    if stored:
        shift, scale = (torch.tensor(stored[k], dtype=torch.float32) for k in ("shift", "scale"))
        return shift[:, None, None], scale[:, None, None]
    config = autoencoder.config
    own_shift, own_scale = getattr(config, "shift_factor", None), getattr(config, "scaling_factor", None)
    return torch.tensor(float(own_shift or 0.0)), torch.tensor(float(own_scale or 1.0))
