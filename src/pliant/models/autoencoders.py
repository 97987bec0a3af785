"""Autoencoders of diffusers, for models that live in latents. diffusers is imported late: it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.errors import ConfigError, FormatError


def load_autoencoder(source: str) -> Any:
    """Any diffusers autoencoder from a folder or Hub id, frozen, in eval mode. Raises FormatError or ConfigError."""
    try:
        import diffusers
    except ImportError:
        raise ConfigError("autoencoders need diffusers: pip install 'pliant[diffusers]'") from None
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


@torch.no_grad()
def downscale_factor(autoencoder: Any) -> int:
    """Image pixels per latent pixel along one side, read off one small image."""
    parameter = next(autoencoder.parameters())
    channels = int(getattr(autoencoder.config, "in_channels", 3))
    out = autoencoder.encode(torch.zeros(1, channels, 64, 64, device=parameter.device, dtype=parameter.dtype))
    latents = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
    return 64 // int(latents.shape[-1])


def config_scaling(autoencoder: Any) -> tuple[float, float]:
    """The (shift, scale) an autoencoder's config prescribes: models see `(latent - shift) * scale`."""
    config = autoencoder.config
    shift, scale = getattr(config, "shift_factor", None), getattr(config, "scaling_factor", None)
    return float(shift or 0.0), float(scale or 1.0)


@torch.no_grad()
def encoded(autoencoder: Any, images: Tensor, normalisation: dict[str, Any] | None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32 as a model sees them; inverse of `decoded`.

    Autoencoders with a distribution of latents give its mean.
    """
    parameter = next(autoencoder.parameters())
    out = autoencoder.encode(images.to(parameter.device, parameter.dtype))
    latents: Tensor = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
    shift, scale = (v.to(latents.device) for v in _shift_scale(autoencoder, normalisation))
    return (latents.float() - shift) * scale


def decoded(autoencoder: Any, latents: Tensor, normalisation: dict[str, Any] | None) -> Tensor:
    """Latents (B, C, h, w) as a model makes them -> images (B, 3, H, W) float32 in about [-1, 1].

    normalisation: {"shift": [...], "scale": [...]} per channel that the model's training data had (its metadata's
    "latents"); None: what the autoencoder's config says. The model saw `(latent - shift) * scale`.
    """
    shift, scale = _shift_scale(autoencoder, normalisation)
    parameter = next(autoencoder.parameters())
    x = latents.float() / scale.to(latents.device) + shift.to(latents.device)
    images: Tensor = autoencoder.decode(x.to(parameter.device, parameter.dtype)).sample
    return images.float()


def _shift_scale(autoencoder: Any, normalisation: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """What models see is `(latent - shift) * scale`; (C, 1, 1) or numbers."""
    if normalisation:
        shift, scale = (torch.tensor(normalisation[k])[:, None, None] for k in ("shift", "scale"))
    else:
        shift, scale = (torch.tensor(v) for v in config_scaling(autoencoder))
    return shift, scale
