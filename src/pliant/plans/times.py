"""The times of a plan's steps, as presets make them of what was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.paths import make_grid
from pliant.paths.levels import resolution_shift

Times: TypeAlias = Tensor | Sequence[float] | str | Mapping[str, Any] | None
"""House times, or the name or options of a grid, or the default."""


def make_times(model: Denoiser, steps: int, times: Times) -> list[float]:
    """The grid a preset uses: the given one, or the path's default for `steps`.

    For a network from another path, a grid that is made here keeps to that network's noise where the grid can.
    """
    if times is not None and not isinstance(times, str | Mapping):
        given: list[float] = torch.as_tensor(times, dtype=torch.float64).tolist()
        if len(given) != steps + 1:
            raise PlanError(f"{steps} steps need {steps + 1} times, got {len(given)}")
        return given
    options = {"name": times} if isinstance(times, str) else dict(times or {"name": "default"})
    if options.get("name") == "resolution":
        options = resolution_grid(model, options)
    grid: list[float] = make_grid(model.path, steps, options, model.known_noise).tolist()
    return grid


def resolution_grid(model: Denoiser, options: Mapping[str, Any]) -> dict[str, Any]:
    """The grid "resolution": "shifted" by `sqrt(pixels / base_pixels)` for the model's size (SD3's, sheet B, 3).

    base_pixels: size of states that need no shift; by default the largest of training. Larger states spend more steps
    near noise, smaller ones fewer. Raises PlanError for another option.
    """
    given = {k: v for k, v in options.items() if k not in ("name", "base_pixels")}
    if given:
        raise PlanError(f"the grid 'resolution' has one option, base_pixels; not {min(given)!r}")
    base = int(options.get("base_pixels", model.core.reference_pixels))
    return {"name": "shifted", "shift": resolution_shift(math.prod(model.sample_size), base)}


def how_timed(model: Denoiser, times: Times, grid: Sequence[float]) -> dict[str, Any]:
    """Provenance of a grid: its name if it has one, and the starts of steps where the network's noise was clipped."""
    found: dict[str, Any] = {}
    if isinstance(times, str | Mapping):
        found["times"] = times if isinstance(times, str) else dict(times)
    matched = model.match(torch.tensor(grid[:-1], dtype=torch.float64))
    if matched is not None and bool(matched.clipped.any()):
        found["clipped"] = [t for t, clipped in zip(grid, matched.clipped.tolist(), strict=False) if clipped]
    return found
