"""95 % intervals of Fréchet distances: over repeats with other seeds, or from the samples of a single run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.evaluation import Interval, Measure, Reference



def interval(distance: Measure, features: list[Tensor], reference: Reference, classes: int) -> dict[str, Any] | None:
    """{"low", "high", "how"}: Student's over repeats, or a bootstrap over a single one; None without its features."""
    import torch

    count = len(distance.values)
    if distance.std is not None:
        reach = student(count - 1) * distance.std / math.sqrt(count)
        how = f"Student, {count} repeats with other seeds"
        return {"low": max(0.0, distance.mean - reach), "high": distance.mean + reach, "how": how}
    if not features:
        return None
    found = bootstrap(torch.cat(features), reference, classes)
    return {"low": max(0.0, found.low), "high": found.high, "how": "bootstrap over the samples"}


def bootstrap(features: Tensor, reference: Reference, classes: int) -> Interval:
    """95 % interval of the distance of `features` (N, D), whose classes come in turn: 0, 1, ..., classes - 1, 0, ..."""
    import torch

    from pliant.evaluation import bootstrap_interval

    groups = torch.arange(len(features)) % classes if len(features) > classes else None
    return bootstrap_interval(features, reference.statistics, level=0.95, groups=groups)


def student(freedom: int) -> float:
    """97.5 % point of Student's t distribution; exact to three digits (table, then Cornish-Fisher)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
