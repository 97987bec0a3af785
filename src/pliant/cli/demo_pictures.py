"""The demo's two pictures: images by budget and class, and quality against what it costs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pliant import imaging

if TYPE_CHECKING:
    from pliant.cli.demo_runs import Judgement, Row

TILE, GAP, MARGIN = 64, 4, 168
INK, QUIET, BACK = (28, 32, 38), (105, 112, 122), (255, 255, 255)
COLOURS = ("#1b6f8f", "#2a9d8f", "#d98c21", "#c8553d")
"""One per budget, from full to least; told apart in grey and by colour-blind readers too."""


def comparison(rows: list[Row], names: list[str]) -> bytes:
    """PNG: a band per budget with its label, a column per class; several images of a class stand below each other."""
    from PIL import Image, ImageDraw, ImageFont

    large, small = ImageFont.load_default(size=22), ImageFont.load_default(size=14)
    lines = max(1, *(len(row.pixels) // len(names) for row in rows if row.pixels is not None))
    band = max(lines * (TILE + GAP), 72) + 3 * GAP
    top = 30
    sheet = Image.new("RGB", (MARGIN + len(names) * (TILE + GAP) + GAP, top + len(rows) * band), BACK)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((MARGIN + column * (TILE + GAP) + TILE / 2, top - 8), _short(name), QUIET, small, anchor="ms")
    for number, row in enumerate(rows):
        y = top + number * band
        centre = y + (band - 3 * GAP) / 2
        draw.text((12, centre - 22), row.label, INK, large, anchor="lm")
        draw.text((12, centre + 3), f"{row.cost.flops / 1e9:.3g} GFLOP", QUIET, small, anchor="lm")
        draw.text((12, centre + 22), f"{row.seconds * 1e3:.3g} ms per image", QUIET, small, anchor="lm")
        for k, pixels in enumerate([] if row.pixels is None else row.pixels):
            line, column = divmod(k, len(names))
            zoom = max(1, TILE // max(pixels.shape[-2:]))
            place = (MARGIN + column * (TILE + GAP), y + line * (TILE + GAP))
            sheet.paste(imaging.to_picture(imaging.enlarged(pixels, zoom)).convert("RGB"), place)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _short(name: str) -> str:
    first = name.split(",")[0]
    return first if len(first) <= 9 else first[:8] + "."


def plot(rows: list[Row], judgement: Judgement) -> bytes | None:
    """PNG: distance against FLOPs and against measured seconds. None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(row, colour) for row, colour in zip(rows, COLOURS, strict=False) if row.distance is not None]
    figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.9), sharey=True, layout="constrained")
    figure.suptitle(f"{judgement.metric}, {judgement.images:,} images per point, 95 % intervals", fontsize=11)
    panels = (
        (axes[0], [row.cost.flops / 1e9 for row, _ in shown], "GFLOP per image"),
        (axes[1], [row.seconds * 1e3 for row, _ in shown], "milliseconds per image, measured on this machine"),
    )
    for axis, places, label in panels:
        _draw(axis, places, shown)
        axis.set_xlabel(label)
    axes[0].set_ylabel("Fréchet distance (lower is better)")
    axes[0].set_ylim(bottom=0, top=1.15 * max(row.distance.high for row, _ in shown if row.distance))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return buffer.getvalue()


def _draw(axis: Any, places: list[float], shown: list[tuple[Row, str]]) -> None:
    values = [row.distance.value for row, _ in shown if row.distance]
    axis.plot(places, values, color="#b9c0c8", zorder=1, linewidth=1.5)
    for x, (row, colour) in zip(places, shown, strict=True):
        if row.distance is None:
            continue
        d = row.distance
        axis.errorbar(
            x, d.value, [[d.value - d.low], [d.high - d.value]], fmt="o", color=colour, capsize=3, markersize=8
        )
        axis.annotate(
            row.label, (x, d.high), (0, 5), textcoords="offset points", ha="center", color=colour, fontsize=10
        )
    axis.set_xlim(left=0, right=1.12 * max(places))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
