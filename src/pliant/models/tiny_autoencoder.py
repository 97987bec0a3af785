"""Tiny autoencoders: plain stacks of convolutions distilled from large ones (madebyollin/taesd, MIT).

TAESD, TAESD3, TAEF1 and TAEF2 share one shape: 8 image pixels per latent pixel and side, 64 features everywhere, and
residual blocks of three convolutions. TAEF2 (FLUX.2's latents) adds a normalisation over the whole image to the blocks
at the latents' resolution. Their files are two state dicts, `*_encoder.pth` and `*_decoder.pth`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import FormatError, ShapeError

WIDTH = 64
FACTOR = 8
"""Image pixels per latent pixel along one side."""
ENDINGS = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class TinyConfig:
    """Under the names that diffusers' autoencoders use, so that nobody needs to tell them apart."""

    latent_channels: int
    middle_norm: bool
    """Blocks at the latents' resolution see statistics of the whole image (TAEF2)."""
    in_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class Latents(NamedTuple):
    """What `encode` returns."""

    latents: Tensor


class Images(NamedTuple):
    """What `decode` returns."""

    sample: Tensor


def _conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=bias)


class _Residual(nn.Module):
    """`relu(conv(x) + x)`, with a normalised global branch first where the model has one."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )
        self.pool = None
        if norm:
            wide = 4 * WIDTH
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, wide, 1, bias=False),
                nn.GroupNorm(4, wide),
                nn.ReLU(),
                nn.Conv2d(wide, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class _SoftClamp(nn.Module):
    """Latents beyond what training saw are pulled to within (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _encoder(config: TinyConfig) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(config.in_channels, WIDTH), _Residual(False)]
    for level in range(3):
        layers.append(_conv(WIDTH, WIDTH, stride=2, bias=False))
        layers += [_Residual(config.middle_norm and level == 2) for _ in range(3)]
    return nn.Sequential(*layers, _conv(WIDTH, config.latent_channels))


def _decoder(config: TinyConfig) -> nn.Sequential:
    layers: list[nn.Module] = [_SoftClamp(), _conv(config.latent_channels, WIDTH), nn.ReLU()]
    for level in range(3):
        layers += [_Residual(config.middle_norm and level == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, _Residual(False), _conv(WIDTH, config.in_channels))


class TinyAutoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/8, W/8), with the interface of diffusers' autoencoders.

    H and W must be multiples of 8. Latents are those of the large autoencoder, not normalised.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _encoder(config), _decoder(config)

    def encode(self, images: Tensor) -> Latents:
        """Raises ShapeError for sides that are not multiples of 8."""
        height, width = images.shape[-2:]
        if height % FACTOR or width % FACTOR or not height or not width:
            nearest = "x".join(str(max(FACTOR, round(n / FACTOR) * FACTOR)) for n in (height, width))
            raise ShapeError(f"images of {height}x{width} do not divide into latents of 1/{FACTOR}; nearest: {nearest}")
        return Latents(self.encoder((images + 1) / 2))

    def decode(self, latents: Tensor) -> Images:
        """Values a little outside [-1, 1] are possible."""
        return Images(self.decoder(latents) * 2 - 1)


def find_tiny(source: Path) -> tuple[Path, Path] | None:
    """The (encoder, decoder) files that a source means: a folder with one pair, or either file of a pair.

    None where there are no such files. Raises FormatError for half a pair, or several in one folder.
    """
    if source.is_dir():
        found = [f for f in sorted(source.iterdir()) if f.stem.endswith("_encoder") and f.suffix in ENDINGS]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise FormatError(f"{source} holds several autoencoders ({names}); name one of these files")
        return _pair(found[0]) if found else None
    if source.is_file() and source.suffix in ENDINGS and source.stem.endswith(("_encoder", "_decoder")):
        return _pair(source)
    return None


def _pair(file: Path) -> tuple[Path, Path]:
    stem = file.stem.removesuffix("_encoder").removesuffix("_decoder")
    encoder, decoder = (file.with_name(f"{stem}_{part}{file.suffix}") for part in ("encoder", "decoder"))
    for wanted in (encoder, decoder):
        if not wanted.is_file():
            raise FormatError(f"an autoencoder is two files; {wanted} is missing")
    return encoder, decoder


def tiny_autoencoder(encoder: dict[str, Tensor], decoder: dict[str, Tensor], name: str) -> TinyAutoencoder:
    """From two state dicts, in fp32, frozen, in eval mode. Raises FormatError, in one line, for anything else."""
    for which, state in (("encoder", encoder), ("decoder", decoder)):
        if not any(key.endswith(".conv.0.weight") for key in state):
            raise FormatError(f"{name}: the {which} is no TAESD-like stack of convolutions")
    outputs = {int(key.split(".")[0]): value for key, value in encoder.items() if re.fullmatch(r"\d+\.bias", key)}
    if not outputs:
        raise FormatError(f"{name}: the encoder ends in no convolution")
    config = TinyConfig(len(outputs[max(outputs)]), any(".pool." in key for key in encoder))
    network = TinyAutoencoder(config)
    for which, module, state in (("encoder", network.encoder, encoder), ("decoder", network.decoder, decoder)):
        wanted = module.state_dict()
        for key in sorted(wanted.keys() | state.keys()):
            if key not in state or key not in wanted or state[key].shape != wanted[key].shape:
                raise FormatError(f"{name}: the {which}'s tensor {key!r} does not fit an 8x tiny autoencoder")
        module.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval().requires_grad_(False)
