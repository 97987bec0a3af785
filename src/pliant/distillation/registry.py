"""The recipes by name. A new one is a file with a `Recipe`, a line here, and its settings in `assets/distill/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pliant.errors import ConfigError, suggest

SETTINGS = Path(__file__).resolve().parents[1] / "assets" / "distill"
"""NAME.yaml: the settings that `pliant distill NAME` starts from (also as configs/distill/)."""


@dataclass(frozen=True)
class Entry:
    """What is known of a recipe without importing it."""

    name: str
    module: str
    """Module of `pliant.distillation`."""
    recipe: str
    """Its subclass of `Recipe`."""
    summary: str
    source: str
    """Paper and section."""

    @property
    def settings(self) -> Path:
        return SETTINGS / f"{self.name}.yaml"


_ENTRIES = (
    Entry(
        "direct", "direct", "Direct", "regress the teacher's samples in a given number of steps",
        "Rectified Flow, arXiv 2209.03003",
    ),
    Entry(
        "weak-first", "direct", "Direct", "direct distillation whose first step runs at a coarse patch",
        "with FlexiDiT, arXiv 2502.20126",
    ),
    Entry(
        "rfpp", "rfpp", "RFPP", "one reflow with U-shaped times and a Huber (perceptual) loss",
        "2-rectified flow++, arXiv 2405.20320",
    ),
    Entry(
        "instaflow", "instaflow", "InstaFlow", "reflow on guided pairs, then direct distillation to one step",
        "InstaFlow, arXiv 2309.06380",
    ),
    Entry(
        "slimflow", "slimflow", "SlimFlow", "annealed reflow into a smaller network, then flow-guided distillation",
        "SlimFlow, arXiv 2407.12718",
    ),
    Entry(
        "rectified-diffusion", "rectified_diffusion", "RectifiedDiffusion",
        "the teacher's pairs on its own path and prediction, then consistency", "Rectified Diffusion, arXiv 2410.07303",
    ),
    Entry(
        "phased", "rectified_diffusion", "PhasedRectification", "one straight piece per phase, from real data",
        "Rectified Diffusion, arXiv 2410.07303",
    ),
    Entry(
        "reflow", "reflow", "Reflow", "retrain on the flow's own pairs, k rounds: straighter, so fewer steps",
        "Rectified Flow, arXiv 2209.03003",
    ),
)  # fmt: skip

RECIPES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def get_entry(name: str) -> Entry:
    """A recipe's entry. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: {suggest(name, RECIPES)}")
    return RECIPES[name]
