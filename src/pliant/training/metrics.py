"""What a run reports: a line per interval, `metrics.jsonl`, TensorBoard if installed, and a progress bar."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("pliant.training")


class Window:
    """Running sums of scalars since the last report. Kept on the device: adding does not wait for it."""

    def __init__(self) -> None:
        self.reset()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """One step's scalars."""
        self.steps += 1
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach().float(), count + 1)

    def means(self) -> dict[str, float]:
        """Means over the window. A scalar that was reported in only some steps is averaged over those."""
        if not self._sums:
            return {}
        stacked = torch.stack([torch.as_tensor(total) / count for total, count in self._sums.values()])
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def reset(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self.steps = 0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Reporter:
    """Writes metrics to every place that is available. Failing to write (disk full) never stops a run."""

    def __init__(self, folder: Path, start: int, steps: int, quiet: bool) -> None:
        self._file = folder / "metrics.jsonl"
        self._board = _tensorboard(folder, start)
        self._steps = steps
        self._progress: Any = None
        self._warned = False
        if not quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._task = self._progress.add_task("", total=steps, completed=start)

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line for the reader of the terminal."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report scalars after `step` finished steps."""
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write metrics (%s); training goes on", error.strerror or error)
                self._warned = True
        self.say(_line(step, self._steps, values))


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # purge_step hides the points that a killed run wrote after its last checkpoint.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)


def _line(step: int, steps: int, values: Mapping[str, float]) -> str:
    width = len(str(steps))
    words = [f"step {step:{width}d}/{steps}"]
    for name, value in values.items():
        if name == "lr":
            words.append(f"lr {value:.2e}")
        elif name == "images_per_second":
            words.append(f"{value:.1f} images/s" if value < 100 else f"{value:.0f} images/s")
        elif name == "flops_per_second":
            words.append(f"{_si(value)}FLOP/s")
        else:
            words.append(f"{name} {value:.4f}")
    return "  ".join(words)


def _si(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "
