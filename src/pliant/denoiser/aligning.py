"""How calls are fed and read where a network was trained on another path, at other patches, or bare as in EDM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.adapters.alignment import Alignment, alignment, preconditioned, seen_from
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import carried

if TYPE_CHECKING:
    from pliant.denoiser.denoiser import Denoiser


def align(model: Denoiser, compute: Compute, t: Tensor) -> Alignment | None:
    """Of calls with this compute at house times t (any shape); None: as they are.

    Raises ConfigError where the network's prediction does not say what is asked of it.
    """
    found = model.match(t)
    if found is None:
        return _on_own_path(model, compute, t)
    native = model.native
    p, q = carried(native.path, found.time, native.prediction, model.path, t, model.prediction)
    if not bool((torch.isfinite(p) & torch.isfinite(q)).all()):
        raise ConfigError(
            f"at some time the network's {native.prediction} prediction does not determine {model.prediction} on "
            f"path {model.path.name!r}; keep to times between 0.001 and 0.999"
        )
    one, zero = torch.ones_like(p), torch.zeros_like(p)
    inner = _on_own_path(model, compute, found.time) or Alignment(one, found.time, zero, zero, one)
    return seen_from(inner, found, p, q)


def _on_own_path(model: Denoiser, compute: Compute, t: Tensor) -> Alignment | None:
    """On the network's own path, for the kind it was trained to predict."""
    path, kind, core = model.native.path, model.native.prediction, model.core
    if isinstance(core, FlexiDiT) and compute.patch is not None:
        pixels = core.aligned_pixels((compute.patch[0], compute.patch[-1]))
        if pixels != 1:
            return alignment(path, kind, t, pixels, core.spec.missing_power, model.preconditioning)
    return None if model.preconditioning is None else preconditioned(path, model.preconditioning, t)
