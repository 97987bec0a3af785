"""What must be equal for a resumed run to be the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pliant.denoiser import Denoiser
from pliant.files import tensors_sha256
from pliant.training.sharded import whole

# Settings that may differ without changing what a step computes.
HARMLESS = frozenset({"steps", "checkpoint", "sampling", "log_every", "output", "resume", "checkpointing"})


def weights_hash(denoiser: Denoiser) -> str:
    """SHA-256 of all weights by name: the same whatever file they came from."""
    return tensors_sha256(denoiser.network.state_dict())


def frozen_hash(network: nn.Module) -> str:
    """Fingerprint of the parameters that do not train and are therefore not stored; "" if there are none."""
    frozen = [(name, p) for name, p in network.named_parameters() if not p.requires_grad]
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in frozen:
        digest.update(name.encode())
        digest.update(whole(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if frozen else ""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of top-level settings that differ and matter for exact resumption."""
    changed = [name for name in now if name not in HARMLESS and before.get(name) != now[name]]
    # A cosine knows where it ends.
    if now.get("optimizer", {}).get("decay") != "constant" and before.get("steps") != now.get("steps"):
        changed.append("steps")
    return changed
