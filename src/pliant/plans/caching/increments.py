"""Increment-calibrated caching (arXiv 2505.05829): reuse with a low-rank correction in every linear layer."""

from __future__ import annotations

from pliant.compute import Reuse
from pliant.compute.reuse import branch_slot
from pliant.plans.caching.options import period, whole
from pliant.plans.caching.rows import Row, Target


def icc(target: Target, *, interval: int = 2, rank: int | None = None) -> list[Row]:
    """Full where `i % interval == 0`; in between every linear layer is `y_kept + W_rank (x - x_kept)`.

    W_rank: the best approximation of that rank of the layer's own weight (the SVD variant; nothing is calibrated on
    data), of queries, keys and values each for itself. Attention itself is computed, from corrected queries, keys and
    values. Rank 0 is plain reuse; None: a ninth of the width, which of the published 1152 is the published 128.
    """
    every = period(interval, target)
    low = round(target.width / 9) if rank is None else whole("rank", rank, 0)
    cached = Row(sites=f"C{target.sites}", reuse=Reuse("increment", rank=low))
    return [Row(write=(branch_slot(low),)) if i % every == 0 else cached for i in range(target.steps)]
