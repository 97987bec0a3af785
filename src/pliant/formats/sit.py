"""Official SiT files (willisma/SiT): DiT's layout, but a velocity of an interpolant in unit time (sheet A, section 4).

Nothing in the tensors tells SiT from DiT. It is told from what train.py stored beside them, else from the file's
name, else by the caller (`format="sit"`).
"""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Any

import torch

from pliant.denoiser import Denoiser
from pliant.formats.official_dit import OPTIONS, read_config, read_tensors, stated_path, write
from pliant.formats.source import Source, architecture, check_options, option_path, plain_source
from pliant.formats.state_files import StateFile
from pliant.paths import NetworkTime, prediction_type

# SiT's own words (train.py's --path-type and --prediction) -> ours.
PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
PREDICTIONS = {"velocity": "velocity", "score": "score", "noise": "epsilon"}


def says_sit(state: StateFile) -> bool | None:
    """Whether the file itself says that it is SiT; None if it says nothing."""
    said = state.facts.get("layout") or state.facts.get("model")
    if not isinstance(said, str) or not re.match(r"official-dit|dit|sit", said, re.IGNORECASE):
        return None
    return said.lower().startswith("sit")


def named_sit(file: FilePath) -> bool:
    """Whether a file's name contains the word SiT, as in SiT-XL-2-256x256.pt (but not as in website.pt)."""
    return re.search(r"(?<![a-z])sit(?![a-z])", file.name, re.IGNORECASE) is not None


def find(state: StateFile, options: dict[str, Any]) -> Source:
    """Read as SiT: what the file says of path and prediction, else linear velocity; `path`, `prediction` win."""
    check_options(options, OPTIONS, "sit")
    config = read_config(state, options)
    stored = PATHS.get(str(state.facts.get("path_type"))) or stated_path(state)
    predicted = options.get("prediction") or state.facts.get("prediction") or "velocity"
    notes = list(state.notes)
    if not stored and "path" not in options:
        notes.append("the file does not say which path it was trained on: assumed linear, as released SiT models are")
    return plain_source(
        format="sit",
        location=state.file,
        config=config,
        path=option_path(options.get("path") or stored or "linear"),
        prediction=prediction_type(PREDICTIONS.get(predicted, predicted)),
        network_time=NetworkTime.sit(),
        tensors=lambda: read_tensors(state, config),
        metadata={"name": architecture(config, "SiT")},
        notes=notes,
    )


def save(
    denoiser: Denoiser, file: str | FilePath, dtype: torch.dtype | None = None, allow_inexact: bool = False
) -> None:
    """Write the flat official state dict. A `.pt` file says nothing of path and prediction: tell its readers.

    Raises FormatError if SiT's code has no words for this model, unless `allow_inexact`.
    """
    wrong = []
    if denoiser.path.name not in PATHS.values():
        wrong.append(f"its path is {denoiser.path.name!r}, SiT knows {', '.join(PATHS.values())}")
    if denoiser.network_time != NetworkTime.sit():
        wrong.append("its network does not count time from 0 = noise to 1 = data")
    if denoiser.prediction not in PREDICTIONS.values():
        wrong.append(f"it predicts {denoiser.prediction}, SiT knows {', '.join(PREDICTIONS.values())}")
    write(denoiser, file, "sit", wrong, dtype, allow_inexact)
