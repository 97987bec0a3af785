"""`pliant straightness`: how straight a model's trajectories are, so how few steps it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, progress
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.evaluation.straightness import Straightness
    from pliant.training.data import TrainingSet

EXAMPLES = """\b
Examples:
  pliant straightness digits
  pliant straightness runs/reflow/model --plot straightness.png
  pliant straightness digits --data digits        crossing V of the data, and the identity that ties it to S
  pliant straightness digits --weak 2             trajectories at patch 2
"""


def register(app: typer.Typer) -> None:
    app.command("straightness", epilog=EXAMPLES)(straightness)


def straightness(
    model: opt.Model,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Heun steps of the trajectories.")] = 50,
    num: Annotated[int, typer.Option("--num", min=1, help="Trajectories, classes in turn.")] = 256,
    seed: opt.Seed = 0,
    data: Annotated[
        str | None, typer.Option("--data", help="A data set, to measure how much its pairs with noise cross.")
    ] = None,
    weak: opt.WeakKind = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG of S and curvature per step.")] = None,
    batch_size: opt.BatchSize = 64,
    device: opt.Device = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Straightness S of the flow (0: one Euler step is exact), transport cost, and curvature along the way."""
    from pliant.cli.models import open_model
    from pliant.cli.planning import weak_compute
    from pliant.compute import Compute
    from pliant.evaluation.straightness import straightness as measure

    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a .png, not {plot.name!r}")
    denoiser = open_model(model, format, option, device).denoiser
    compute = weak_compute(weak) if weak else None
    denoiser.patch_of(compute or Compute())
    images = _data(data, denoiser) if data else None
    with progress("trajectories") as advance:
        found = measure(
            denoiser,
            steps=steps,
            count=num,
            compute=compute,
            data=images,
            first_seed=seed,
            batch_size=batch_size,
            progress=advance,
        )
    if plot is not None:
        _plot(found, plot, model)
    if json:
        emit_json({"model": model, **found.to_dict(), "plot": str(plot) if plot else None})
        return
    print(f"S {found.straightness:.4g}  ({found.relative:.2%} of the transport cost {found.cost:.4g})")
    print(f"first-order gap {found.first_order_gap:.4g}  (of the noise prediction, per element)")
    if found.crossing is not None and found.residual is not None:
        print(
            f"V {found.crossing:.4g}, cost of independent pairs {found.independent_cost:.4g}: "
            f"cost before - cost after - S - V = {found.residual:.2%} of the cost before (0 for an exact velocity)"
        )
    if plot is not None:
        print(f"{plot} written")


def _data(source: str, denoiser: Denoiser) -> TrainingSet:
    from pliant.cli.train import _need

    _need("pydantic")
    from pliant.training.config import DataConfig
    from pliant.training.setup_data import open_data

    return open_data(DataConfig(source=source), denoiser)


def _plot(found: Straightness, file: Path, name: str) -> None:
    """S and curvature of every step against time."""
    from pliant.files import replaced_file

    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'pliant[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = [1.0 - (k + 0.5) / found.steps for k in range(found.steps)]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    above.bar(times, found.per_step, width=1.0 / found.steps)
    above.set_ylabel("S of the step")
    above.set_title(f"{name}: S = {found.straightness:.4g}, {found.relative:.2%} of the transport cost", fontsize=10)
    below.plot(times, found.curvature, marker=".")
    below.set_ylabel("curvature")
    below.set_xlabel("time (1 noise, 0 data)")
    below.invert_xaxis()
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    except OSError as error:
        raise PliantError(f"could not write {file}: {error.strerror or error}") from None
    finally:
        plt.close(figure)
