"""`pliant train`: a training run from a config file."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, note, warnings
from pliant.errors import ConfigError

EXAMPLES = """\b
Examples:
  pliant train configs/digits.yaml
  pliant train configs/digits.yaml steps=500 optimizer.lr=3e-4 output=runs/short
  pliant train configs/digits.yaml --resume                           goes on, bit for bit as if never stopped
  accelerate launch -m pliant.cli train configs/cifar10-flow.yaml     several processes or GPUs
"""


def register(app: typer.Typer) -> None:
    app.command("train", epilog=EXAMPLES)(train)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's settings.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")] = False,
    json: opt.JSON = False,
) -> None:
    """Train, fine-tune or distil a model. All results land in the config's `output`."""
    for name in ("accelerate", "pydantic"):
        _need(name)
    from pliant.training import load_config
    from pliant.training import train as run

    settings = load_config(config, [*(overrides or ()), *(["resume=latest"] if resume else [])])
    with contextlib.redirect_stdout(sys.stderr):  # progress and log lines; stdout is for the report
        result = run(settings, quiet=json)
    if int(os.environ.get("RANK", "0")):  # one report, from the main process
        return
    report = {
        "steps": result.step,
        "loss": result.loss,
        "model": str(result.model_folder),
        "checkpoint": str(result.checkpoint),
        "output": settings.output,
        "parameters": sum(p.numel() for p in result.denoiser.parameters()),
        "fingerprint": result.denoiser.fingerprint(),
        "patch_sizes": [list(p) for p in result.denoiser.patch_sizes],
        "warnings": warnings(),
    }
    if json:
        emit_json(report)
    else:
        print(f"{result.model_folder}: trained for {result.step} steps, loss {result.loss:.4f}")
        note(f"look at it: pliant sample {result.model_folder} -o samples.png")


def _need(module: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"training needs {module}: pip install 'pliant[train]'")
