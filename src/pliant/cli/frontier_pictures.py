"""What the plans of a frontier make: one strip of images per plan, the same seeds in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pliant import imaging

if TYPE_CHECKING:
    from pliant.cli.frontier_rows import Row
    from pliant.planning.distribution import FrechetObjective

IMAGES, MOST = 10, 7
"""Per strip, and strips."""


def shown(rows: Sequence[Row], best: set[int]) -> list[Row]:
    """The full plan, then the undominated ones from dear to cheap; evenly thinned where there are too many."""
    full = [row for row in rows if row.entry.kind == "full"]
    others = [rows[k] for k in best if rows[k].entry.kind != "full"]
    others.sort(key=lambda row: -row.cost.flops)
    room = MOST - len(full)
    if len(others) > room:
        others = [others[round(k * (len(others) - 1) / (room - 1))] for k in range(room)]
    return [*full, *others]


def strip(row: Row, objective: FrechetObjective, file: Path) -> bytes:
    """PNG of the first images that the distance was measured on; from `file` if it is there, else kept there."""
    from pliant.files import replaced_file
    from pliant.plans import sample

    try:
        return file.read_bytes()
    except FileNotFoundError:
        count = min(IMAGES, objective.num)
        images = sample(objective.model, row.entry.plan, objective.labels[:count], objective.seeds[:count])
        images = images if objective.decode is None else objective.decode(images)
        pixels = imaging.to_pixels(images)
        zoom = imaging.zoom_for(int(pixels.shape[-2]), int(pixels.shape[-1]))
        png = imaging.encode_png(imaging.grid(imaging.enlarged(pixels, zoom), count))
        with replaced_file(file) as temporary:
            temporary.write_bytes(png)
        return png
