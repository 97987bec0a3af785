"""Recipes that turn a trained model into one of fewer, cheaper steps, all through the one trainer.

from pliant.distillation import distil, load_recipe
model = distil(load_recipe("reflow"), teacher="digits", out="runs/reflow")

A recipe is a file with its settings (a `Recipe`) and a few lines that order stages: pairs from a teacher, training runs
with some objective, and at the end the plan for which the model was made. `registry.py` names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pliant.distillation.registry import RECIPES, Entry, get_entry

if TYPE_CHECKING:
    from pliant.distillation.recipe import Recipe, distil, load_recipe

__all__ = ["RECIPES", "Entry", "Recipe", "distil", "get_entry", "load_recipe"]


def __getattr__(name: str) -> Any:
    # Settings are pydantic models and stages need accelerate: both are loaded when a recipe is.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pliant.distillation import recipe

    return getattr(recipe, name)
