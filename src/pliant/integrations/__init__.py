"""Pliant inside other libraries. Everything here is loaded on first use: it needs the library it integrates with."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CachedPipeline": "pliant.integrations.diffusers_cache",
    "PliantPipeline": "pliant.integrations.diffusers_pipeline",
    "ProgramScheduler": "pliant.integrations.diffusers_schedulers",
    "SiteTransformer": "pliant.integrations.diffusers_cache",
    "cached": "pliant.integrations.diffusers_cache",
    "plan_from_scheduler": "pliant.integrations.diffusers_import",
    "program_from_scheduler": "pliant.integrations.diffusers_import",
    "scheduler_form": "pliant.integrations.diffusers_import",
    "sites_of": "pliant.integrations.sites",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from pliant.integrations.diffusers_cache import CachedPipeline as CachedPipeline
    from pliant.integrations.diffusers_cache import SiteTransformer as SiteTransformer
    from pliant.integrations.diffusers_cache import cached as cached
    from pliant.integrations.diffusers_import import plan_from_scheduler as plan_from_scheduler
    from pliant.integrations.diffusers_import import program_from_scheduler as program_from_scheduler
    from pliant.integrations.diffusers_import import scheduler_form as scheduler_form
    from pliant.integrations.diffusers_pipeline import PliantPipeline as PliantPipeline
    from pliant.integrations.diffusers_schedulers import ProgramScheduler as ProgramScheduler
    from pliant.integrations.sites import sites_of as sites_of


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pliant.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
