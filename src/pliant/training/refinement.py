"""Learning rates refined from a finished run's gradient norms (arXiv 2310.07831; sheet G, 7).

For positive weights w_t the rates `eta_t = w_t * sum_{p>t} w_p / sum_p w_p` give the last iterate a bound that is least
for w_t = 1/G_t^2 (SGD, G the L2 norm of the gradient) or 1/G_t (Adam, L1 norm). Constant norms give linear decay. What
a run records goes to `gradient-norms.jsonl`; a later run with `decay: refined` takes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger("pliant.training")

NORMS = "gradient-norms.jsonl"
SMOOTH_RANGE = 20.0
"""Smoothed norms that spread by more fall back to linear decay: refining would move almost only at the end."""
FLOOR = 0.1
"""Norms below this share of their median count as so much."""


def linear_decay(steps: int) -> NDArray[np.float64]:
    """(steps,) `1 - t/T` for t = 1..T: the schedule of constant norms, 0 at the end."""
    import numpy as np

    return 1.0 - np.arange(1, steps + 1, dtype=np.float64) / steps


def refine_schedule(
    norms: Sequence[float] | NDArray[np.float64], power: int = 1, tau: float = 0.1, resolution: int = 10_000
) -> NDArray[np.float64]:
    """Rates relative to their peak, of the length to which norms are resampled (the norms' own if that is more).

    norms: one per step of an earlier run; power: 1 for Adam (L1 norms), 2 for SGD (L2 norms); tau: share of the run
    over which the median smooths. Raises DataError for norms that say nothing.
    """
    import numpy as np

    if power not in (1, 2):
        raise ConfigError(f"the power of gradient norms is 1 (Adam, L1) or 2 (SGD, L2), not {power!r}")
    if not 0.0 < tau < 1.0:
        raise ConfigError(f"tau is a share of the run between 0 and 1, got {tau}")
    values = np.asarray(norms, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 8 or not (values > 0).all():
        raise DataError(f"a schedule needs at least 8 positive gradient norms, got {len(values)} finite ones")
    values = values[2:-2]
    if len(values) < resolution:
        values = np.interp(np.linspace(0, len(values) - 1, resolution), np.arange(len(values)), values)
    smooth = _median_smoothed(values, tau)
    smooth = np.maximum(smooth, FLOOR * np.median(smooth))
    if smooth.max() / smooth.min() > SMOOTH_RANGE:
        logger.warning("gradient norms spread by more than %g: linear decay instead of a refined one", SMOOTH_RANGE)
        return linear_decay(len(smooth))
    return schedule_of_weights(smooth ** -float(power))


def schedule_of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """`w_t * sum_{p>t} w_p`, divided by its maximum; the last entry is 0."""
    import numpy as np

    after = np.cumsum(weights[::-1])[::-1] - weights
    after[-1] = 0.0
    rates: NDArray[np.float64] = weights * after
    return rates / rates.max()


def _median_smoothed(values: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """Median over an odd window of about tau of the run; the end is reflected, the start repeated."""
    import numpy as np

    width = 2 * (int(tau * len(values)) // 2) + 1
    tail = values[-1 : -1 - 2 * width : -1]
    extended = np.concatenate([np.full(width // 2, values[0]), values, tail])[: len(values) + 2 * (width // 2)]
    windows = np.lib.stride_tricks.sliding_window_view(extended, width)
    stride = max(1, len(windows) // 2000)  # medians of neighbours hardly differ
    places = np.unique(np.append(np.arange(0, len(windows), stride), len(windows) - 1))
    smooth: NDArray[np.float64] = np.interp(np.arange(len(windows)), places, np.median(windows[places], axis=1))
    return smooth


class Refined:
    """A refined schedule as a function of the step, for runs of any length."""

    def __init__(self, rates: NDArray[np.float64]) -> None:
        self.rates = rates

    def __call__(self, step: int, steps: int) -> float:
        """Share of the peak rate at optimizer step `step` (from 0) of `steps`."""
        import numpy as np

        place = (step + 1) / max(1, steps) * len(self.rates) - 1.0
        return float(np.interp(place, np.arange(len(self.rates)), self.rates))


def gradient_norm(gradients: Sequence[Tensor], kind: int = 1) -> Tensor:
    """L1 (Adam) or L2 norm of all gradients together, on their device."""
    norms = torch._foreach_norm(list(gradients), kind)
    stacked = torch.stack([n.float() for n in norms])
    return stacked.sum() if kind == 1 else stacked.norm()


class NormRecord:
    """Gradient norms of a run's steps, written at its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._norms: list[tuple[int, Tensor]] = []

    def add(self, step: int, gradients: Sequence[Tensor]) -> None:
        self._norms.append((step, gradient_norm(gradients)))

    def write(self) -> None:
        """Append the norms since the last time; a failure costs the record, not the run."""
        lines = [json.dumps({"step": step, "norm": float(norm)}) + "\n" for step, norm in self._norms]
        self._norms = []
        try:
            with (self.folder / NORMS).open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            logger.warning("cannot write gradient norms (%s); training goes on", error.strerror or error)


def read_norms(folder: str | Path) -> list[float]:
    """Norms that a run recorded, one per step; of steps that were repeated after an interruption, the last.

    Raises DataError if there are none.
    """
    file = Path(folder) / NORMS
    found: dict[int, float] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[int(row["step"])] = float(row["norm"])
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {NORMS}: train it with optimizer.record_norms=true first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error})") from None
    return [found[step] for step in sorted(found)]
