"""The base of every part of a configuration tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.training.objectives.base import Objective


class Section(BaseModel):
    """Frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ObjectiveSection(Section):
    """Settings of an objective that know how to make it. `name` tells it apart in a config's `objective`."""

    def build(self, denoiser: Denoiser) -> Objective:
        """The objective for a denoiser, whose teachers are read now. Raises PliantError."""
        raise NotImplementedError  # pragma: no cover - every section has its own
