"""REPA: hidden tokens are led towards those of a frozen vision encoder (arXiv 2410.06940; sheet B, section 6).

`L = L_velocity - weight * mean cos(projector(h_d), encoder(clean image))`, over tokens and samples, at every time. The
projector is a part of the network while it trains and is dropped before export, so that sampling does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError, PliantError
from pliant.models.autoencoders import decoded
from pliant.models.flexible import FlexibleTransformer
from pliant.models.network import Taps
from pliant.models.patches import grid_of
from pliant.training.draws import Draws, derived_seed
from pliant.training.objectives.any_size import AnySizeFlow
from pliant.training.objectives.base import Loss, SizedBatch


class Encoder(Protocol):
    """What sees clean images."""

    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> maps of features (B, dim, rows, columns)."""
        ...


class TokenEncoder:
    """The last tokens of a vision transformer of transformers, as maps. Images are resized to its own size first."""

    def __init__(self, network: Any, processor: dict[str, Any]) -> None:
        config = getattr(network.config, "vision_config", network.config)
        self.network = getattr(network, "vision_model", network).eval().requires_grad_(False)
        self.size, self.patch, self.dim = int(config.image_size), int(config.patch_size), int(config.hidden_size)
        self.side = self.size // self.patch
        self._mean = torch.tensor(processor.get("image_mean", [0.485, 0.456, 0.406])).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.get("image_std", [0.229, 0.224, 0.225])).view(1, 3, 1, 1)

    @classmethod
    def load(cls, source: str) -> TokenEncoder:
        """A folder or Hub id of a ViT (DINOv2, CLIP, ...). Raises PliantError or FormatError for anything else."""
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise PliantError(f"alignment needs transformers: pip install 'pliant[diffusers]' ({error})") from error
        try:
            network = AutoModel.from_pretrained(source)
            file = Path(source) / "preprocessor_config.json"
            import json

            processor = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            return cls(network, processor)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"{source} is not a vision transformer that can be aligned with: {reason}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        self.network.to(images.device)
        x = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((x + 1) / 2 - self._mean.to(x)) / self._std.to(x)
        tokens = self.network(pixel_values=x).last_hidden_state
        patches = tokens[:, tokens.shape[1] - self.side**2 :]  # class and register tokens come first
        maps: Tensor = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        return maps.float()


def attach_projector(denoiser: Denoiser, features: int, hidden: int) -> None:
    """Give the network REPA's projector, in place: three linears with SiLU between. A function of the sizes alone."""
    network = denoiser.network
    if not isinstance(network, FlexibleTransformer):
        raise ConfigError(f"alignment is for flexible networks; this is a {denoiser.core.family}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("projector", features, hidden))
        layers = [nn.Linear(network.config.width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        network.projector = nn.Sequential(*layers, nn.Linear(hidden, features))


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """(B, N, z) both -> (B,) minus the mean cosine over tokens, in [-1, 1]."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)


@dataclass(frozen=True)
class RepresentationAlignment:
    """The flow's loss plus `weight` times the alignment of the tokens after `layer` blocks."""

    flow: AnySizeFlow
    encoder: Encoder
    layer: int
    weight: float = 0.5
    autoencoder: Any = None
    """What decodes samples to images; None: they are images."""

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: SizedBatch, draws: Draws) -> Loss:
        taps: Taps = {self.layer: []}
        own = self.flow.tapped(denoiser, batch, draws, taps)
        network = denoiser.network
        assert isinstance(network, FlexibleTransformer) and network.projector is not None
        terms = []
        for x, tokens in zip(batch.groups, taps[self.layer], strict=True):
            maps = self.encoder(self.images(x, denoiser))
            grid = self._grid(tuple(x.shape[2:]), tokens.shape[1], denoiser)
            features = F.interpolate(maps, grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
            terms.append(alignment_loss(network.projector(tokens), features))
        term = torch.cat(terms).mean()
        return Loss(own.loss + self.weight * term, {**own.logs, "alignment": term.detach()})

    def images(self, x: Tensor, denoiser: Denoiser) -> Tensor:
        """Clean samples (B, C, h, w) as images (B, 3, H, W)."""
        if self.autoencoder is not None:
            self.autoencoder.to(x.device)
            with torch.no_grad():
                return decoded(self.autoencoder, x, denoiser.metadata.get("latents"))
        return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x

    @staticmethod
    def _grid(size: tuple[int, ...], tokens: int, denoiser: Denoiser) -> tuple[int, int]:
        """Which patch size's tokens these are, as rows and columns."""
        grids = [grid_of(size, patch) for patch in denoiser.patch_sizes]
        rows, columns = next(grid for grid in grids if math.prod(grid) == tokens)
        return rows, columns

    def check(self, denoiser: Denoiser) -> None:
        self.flow.check(denoiser)
        if self.layer > denoiser.config.depth:
            raise ConfigError(f"alignment after {self.layer} blocks; the network has {denoiser.config.depth}")
        channels = denoiser.config.in_channels
        if self.autoencoder is None and channels not in (1, 3):
            raise ConfigError(f"an encoder sees images, not {channels} channels: name align.autoencoder")

    def flops(self, denoiser: Denoiser) -> float:
        """Of the denoiser's own loss; the encoder's forward pass is not counted."""
        return self.flow.flops(denoiser)
