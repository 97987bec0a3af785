"""By what plans recognise a model: its architecture and conventions, not its weights."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pliant.adapters.exit_dit import ExitDiT
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.adapters.width import DynamicDiT

if TYPE_CHECKING:
    from pliant.denoiser.denoiser import Denoiser

ADDED = ("flex", "exits", "width", "routers")
"""What may be added to a model without making its plans meaningless; whether a plan needs it is checked there."""


def identity(model: Denoiser) -> dict[str, Any]:
    """JSON-ready."""
    network: dict[str, Any] = {model.core.family: model.config.to_dict()}
    if isinstance(model.core, FlexiDiT):
        network["flex"] = model.core.spec.to_dict()
    if isinstance(model.network, ExitDiT):
        network["exits"] = model.network.spec.to_dict()
    if isinstance(model.network, DynamicDiT):
        network["width"] = model.network.spec.to_dict()
    if isinstance(model.network, TokenRoutedDiT):
        network["routers"] = model.network.spec.to_dict()
    found = {
        "network": network,
        "path": model.path.to_config(),
        "prediction": model.prediction,
        "network_time": model.network_time.to_config(),
    }
    if model.preconditioning is not None:
        found["preconditioning"] = model.preconditioning.to_config()
    if model.trained is not None:
        found["trained"] = model.trained.to_config()
    return found


def fingerprint(model: Denoiser) -> str:
    """12 hex digits of the identity without what was added."""
    known = identity(model)
    for added in ADDED:
        known["network"].pop(added, None)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
