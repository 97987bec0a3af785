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
        "boss", "boss", "Boss", "the best few Euler times, then straightening of just these segments",
        "BOSS, arXiv 2312.16414",
    ),
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
        "flowturbo", "flowturbo", "FlowTurbo", "a small network updates the last velocity in the last steps",
        "FlowTurbo, arXiv 2409.18128",
    ),
    Entry(
        "get", "get", "GET", "one call of a weight-tied transformer that iterates to a fixed point",
        "GET, NeurIPS 2023",
    ),
    Entry(
        "mean-flow", "flow_maps", "FlowMap", "mean velocities of whole jumps, by the MeanFlow identity",
        "MeanFlow, arXiv 2505.13447",
    ),
    Entry(
        "improved-mean-flow", "flow_maps", "FlowMap", "MeanFlow as a regression of velocities",
        "improved MeanFlow, arXiv 2512.02012",
    ),
    Entry(
        "alpha-flow", "flow_maps", "FlowMap", "mean velocities without derivatives, on a curriculum",
        "alpha-Flow, arXiv 2510.20771",
    ),
    Entry(
        "split-mean-flow", "flow_maps", "FlowMap", "a jump is two jumps: no derivatives, no curriculum",
        "SplitMeanFlow, arXiv 2507.16884",
    ),
    Entry(
        "shortcut", "flow_maps", "FlowMap", "two steps of a length teach one of twice the length",
        "Shortcut models, arXiv 2410.12557",
    ),
    Entry(
        "ctm", "flow_maps", "FlowMap", "jumps from any time to any other agree with the teacher's flow",
        "CTM, arXiv 2310.02279",
    ),
    Entry(
        "ctm-adversarial", "flow_maps", "FlowMap", "CTM with a critic that tells samples from data",
        "CTM, arXiv 2310.02279",
    ),
    Entry(
        "tscd", "flow_maps", "SegmentedMap", "CTM in 8, 4, 2 and at last 1 segment of time",
        "Hyper-SD, arXiv 2404.13686",
    ),
    Entry(
        "scm", "flow_maps", "Consistent", "continuous-time consistency through TrigFlow: one call, or a few with noise",
        "sCM, arXiv 2410.11081",
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
