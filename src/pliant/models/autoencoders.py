"""Autoencoders for models that live in latents: any of diffusers', and the tiny ones of `tiny_autoencoder`.

diffusers is imported late: it takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.errors import ConfigError, FormatError, ShapeError
from pliant.models.tiny_autoencoder import find_tiny, tiny_autoencoder


def load_autoencoder(source: str) -> Any:
    """An autoencoder, frozen, in eval mode. Raises FormatError or ConfigError.

    source: folder or Hub id of any diffusers autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, ...), or a
    folder with `*_encoder.pth` and `*_decoder.pth` of TAESD's family, or one of the two files.
    """
    if (pair := find_tiny(Path(source))) is not None:
        return tiny_autoencoder(_read_tensors(pair[0]), _read_tensors(pair[1]), str(source))
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


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """A state dict; pickled files with `weights_only=True`. Raises FormatError, in one line, for anything else."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in any way at all
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise FormatError(f"{file} is truncated, damaged or no file of tensors ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FormatError(f"{file} holds no state dict (tensors by name)")
    return content


@torch.no_grad()
def posterior(autoencoder: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, 3, H, W) images in [-1, 1] -> mean and standard deviation (None: deterministic) of their raw latents.

    Raises ShapeError where the autoencoder's strides do not divide the images.
    """
    parameter = next(autoencoder.parameters())
    out = autoencoder.encode(images.to(parameter.device, parameter.dtype))
    if hasattr(out, "latent_dist"):
        mean, std = out.latent_dist.mean, out.latent_dist.std
    else:
        mean, std = out.latents if hasattr(out, "latents") else out.latent, None  # AutoencoderDC: one without the s
    rows, columns = images.shape[-2] / mean.shape[-2], images.shape[-1] / mean.shape[-1]
    if rows != columns or rows != int(rows):
        raise ShapeError(
            f"images of {images.shape[-2]}x{images.shape[-1]} do not divide into this autoencoder's latents; use sides "
            f"that are multiples of its factor ({downscale_factor(autoencoder)})"
        )
    return mean, std


@torch.no_grad()
def downscale_factor(autoencoder: Any) -> int:
    """Image pixels per latent pixel along one side, read off one small image."""
    parameter = next(autoencoder.parameters())
    channels = int(getattr(autoencoder.config, "in_channels", 3))
    mean, _ = posterior(autoencoder, torch.zeros(1, channels, 64, 64, device=parameter.device, dtype=parameter.dtype))
    return 64 // int(mean.shape[-1])


def latent_channels(autoencoder: Any) -> int | None:
    """Channels of its latents, where its config says so."""
    channels = getattr(autoencoder.config, "latent_channels", None)
    return None if channels is None else int(channels)


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
    latents, _ = posterior(autoencoder, images)
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
