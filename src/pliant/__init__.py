"""Pliant: generative flow and diffusion transformers whose compute bends to a budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Loaded on first use: importing pliant costs nothing that a caller does not need.
_PUBLIC = {
    "Compute": "pliant.compute",
    "DiT": "pliant.models",
    "DiTConfig": "pliant.models",
    "Denoiser": "pliant.denoiser",
    "Guidance": "pliant.guidance",
    "Plan": "pliant.plans",
    "PliantError": "pliant.errors",
    "attach_exits": "pliant.adapters.exits",
    "flexify": "pliant.adapters.flexify",
    "get_path": "pliant.paths",
    "get_solver": "pliant.solvers",
    "load": "pliant.formats",
    "load_adapter": "pliant.formats",
    "plan": "pliant.planning",
    "route_width": "pliant.adapters.route_width",
    "sample": "pliant.plans",
    "sample_steps": "pliant.plans",
    "save": "pliant.formats",
    "save_adapter": "pliant.formats",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from pliant.adapters.exits import attach_exits as attach_exits
    from pliant.adapters.flexify import flexify as flexify
    from pliant.adapters.route_width import route_width as route_width
    from pliant.compute import Compute as Compute
    from pliant.denoiser import Denoiser as Denoiser
    from pliant.errors import PliantError as PliantError
    from pliant.formats import load as load
    from pliant.formats import load_adapter as load_adapter
    from pliant.formats import save as save
    from pliant.formats import save_adapter as save_adapter
    from pliant.guidance import Guidance as Guidance
    from pliant.models import DiT as DiT
    from pliant.models import DiTConfig as DiTConfig
    from pliant.paths import get_path as get_path
    from pliant.planning import plan as plan
    from pliant.plans import Plan as Plan
    from pliant.plans import sample as sample
    from pliant.plans import sample_steps as sample_steps
    from pliant.solvers import get_solver as get_solver


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pliant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
