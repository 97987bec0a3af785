"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate(
    step: int,
    base: float,
    warmup: int = 0,
    decay: str = "constant",
    steps: int = 0,
    refined: Callable[[int, int], float] | None = None,
) -> float:
    """The rate of step `step` (from 0): linear warm-up over `warmup` steps, then constant, a half cosine or a line.

    "cosine" and "linear" reach 0 after `steps`. "refined" is `base` times `refined(step, steps)`, which has a warm-up
    of its own. The first warm-up step already moves (rate base/warmup).
    """
    if decay == "refined" and refined is not None:
        return base * refined(step, steps)
    if step < warmup:
        return base * (step + 1) / warmup
    if decay == "constant":
        return base
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if decay == "linear":
        return base * (1.0 - progress)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))
