"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, base: float, warmup: int = 0, decay: str = "constant", steps: int = 0) -> float:
    """The rate of step `step` (from 0): linear warm-up over `warmup` steps, then constant or a half cosine.

    The cosine reaches 0 after `steps`. The first warm-up step already moves (rate base/warmup).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if decay == "constant":
        return base
    progress = (step - warmup) / max(1, steps - warmup)
    return base * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
