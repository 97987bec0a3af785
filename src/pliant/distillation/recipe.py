"""What a recipe is: settings, and an order of stages in a `Workshop`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pliant.denoiser import Denoiser
from pliant.distillation.registry import get_entry
from pliant.distillation.workshop import Workshop
from pliant.errors import ConfigError
from pliant.training.config import CheckpointConfig, EMAConfig, OptimizerConfig, parse_section, read_tree
from pliant.training.flow_config import PlanConfig
from pliant.training.section import Section


class PairsPart(Section):
    """Pairs (noise, sample, label) of a teacher."""

    count: int = Field(default=4096, ge=1)
    plan: PlanConfig = PlanConfig(steps=12, solver="dpmpp-2m")
    """How the teacher samples; its guidance becomes the student's own behaviour."""
    first_seed: int = Field(default=10_000_000, ge=0)
    """Pair k has seed first_seed + k; far from the small seeds that evaluations use."""
    shard_size: int = Field(default=512, ge=1)
    batch_size: int = Field(default=128, ge=1)
    folder: str | None = None
    """A finished store to use instead."""


class TrainPart(Section):
    """One training run of a recipe; the same names as in `pliant train` configs."""

    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)
    precision: str = "fp32"
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, warmup=50, decay="cosine")
    ema: EMAConfig = EMAConfig(decay=0.995)
    checkpoint: CheckpointConfig = CheckpointConfig(every=200, keep=1)
    log_every: int = Field(default=50, ge=1)
    trainable: str = "all"
    """all: every weight; lora: low-rank changes, merged at the end."""
    lora_rank: int = Field(default=4, ge=1)
    flip: bool = False
    """Mirror pairs, both members, at random: for teachers that do not know left from right."""


class Recipe(Section):
    """Settings of a recipe; subclasses add theirs and say in `run` which stages follow each other.

    `recipe` in files is the name in the registry.
    """

    recipe: str
    seed: int = Field(default=0, ge=0)
    plan: PlanConfig = PlanConfig(steps=1)
    """The plan that is saved beside the result, for which it was made."""

    def run(self, work: Workshop) -> str:
        """Do all stages; the folder of the final model. Every stage resumes, and a finished one costs nothing."""
        raise NotImplementedError  # pragma: no cover - every registered recipe has its own

    def final_plan(self, work: Workshop) -> PlanConfig:
        """The plan of the result, after `run`."""
        return self.plan


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name with its shipped settings, or from a YAML file with a key `recipe`; `key.sub=value` changes.

    Raises ConfigError for unknown names, keys and values.
    """
    text = str(source)
    file = Path(source) if text.endswith((".yaml", ".yml")) else get_entry(text).settings
    return parse_recipe(read_tree(file, overrides))


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """A recipe from nested mappings. Raises ConfigError."""
    name = tree.get("recipe")
    if not isinstance(name, str):
        raise ConfigError("a recipe's settings name it: `recipe: reflow`; see pliant distill --list")
    entry = get_entry(name)
    section: type[Recipe] = getattr(importlib.import_module(f"pliant.distillation.{entry.module}"), entry.recipe)
    return parse_section(section, tree)


def distil(
    recipe: Recipe, teacher: str, out: str | Path, *, resume: bool = False, quiet: bool = False, **hooks: Any
) -> Denoiser:
    """Run (or resume) a recipe: `out/model` is the result with its plan beside the weights.

    hooks: `progress`, see `Workshop`. Raises PliantError for unusable input, a folder that is in use, or settings other
    than those the folder was begun with.
    """
    settings = _settings(recipe, teacher)
    work = Workshop(teacher, Path(out), recipe.seed, settings, resume=resume, quiet=quiet, read=_completed, **hooks)
    model = recipe.run(work)
    return work.finish(model, recipe.final_plan(work))


def _settings(recipe: Recipe, teacher: str) -> dict[str, Any]:
    return {"teacher": teacher, **recipe.model_dump(mode="json", by_alias=True)}


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Stored settings with the defaults of settings that Pliant did not have yet; unreadable ones as they are."""
    try:
        tree = dict(stored)
        teacher = tree.pop("teacher")
        return _settings(parse_recipe(tree), teacher)
    except (ConfigError, KeyError):
        return stored
