"""diffusers' transformer classes as sites, so that caches, gates, skipping and forecasts run inside its pipelines.

One file per class; a new class is a file and a line in `SITES`.
"""

from __future__ import annotations

import importlib
from typing import Any

from pliant.errors import FormatError, suggest
from pliant.integrations.sites.base import BlockSites

SITES: dict[str, tuple[str, str]] = {
    "DiTTransformer2DModel": ("dit", "DiTTransformerSites"),
    "FluxTransformer2DModel": ("flux", "FluxSites"),
    "Lumina2Transformer2DModel": ("lumina2", "Lumina2Sites"),
    "LuminaNextDiT2DModel": ("lumina_next", "LuminaNextSites"),
    "PixArtTransformer2DModel": ("pixart", "PixArtSites"),
    "SD3Transformer2DModel": ("sd3", "SD3Sites"),
}
"""By name of the class: module and adapter."""


def sites_of(transformer: Any) -> BlockSites:
    """The sites of a diffusers transformer. Raises FormatError for a class without an adapter."""
    for base in type(transformer).__mro__:
        if base.__name__ in SITES:
            module, name = SITES[base.__name__]
            adapter: BlockSites = getattr(importlib.import_module(f"{__name__}.{module}"), name)(transformer)
            return adapter
    known = type(transformer).__name__
    raise FormatError(f"there is no list of sites for {known}; {suggest(known, SITES)}")


__all__ = ["SITES", "BlockSites", "sites_of"]
