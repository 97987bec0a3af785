"""A random tiny autoencoder and its pair of files."""

from __future__ import annotations

from pathlib import Path

import torch

from pliant.models.tiny_autoencoder import TinyAutoencoder, TinyConfig


def written_tiny(folder: Path, config: TinyConfig) -> TinyAutoencoder:
    """Writes `tae_encoder.pth` and `tae_decoder.pth`, fp16 as the published ones are, and returns what they hold."""
    torch.manual_seed(0)
    network = TinyAutoencoder(config)
    for part in ("encoder", "decoder"):
        state = {k: v.half() for k, v in getattr(network, part).state_dict().items()}
        torch.save(state, folder / f"tae_{part}.pth")
        getattr(network, part).load_state_dict(state)
    return network
