"""The frontier as a picture: quality with its bands, against FLOPs and against seconds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.cli.frontier_rows import Row

PLANNER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's, which colour-blind readers tell apart."""
BASELINE_COLOURS = ("#555555", "#8C8C8C", "#B0B0B0", "#6B7785")
MARKERS = ("o", "s", "^", "D", "v", "P")
BASELINE_DASHES = ("--", ":", "-.", (0, (1, 1)))
INK = "#1c2026"
LOG_ABOVE = 6.0
"""Ratio of largest to smallest distance from which the axis is logarithmic."""


def plot(rows: Sequence[Row], title: str, metric: str, level: float, machine: str) -> tuple[bytes, str] | None:
    """(PNG, SVG), the same picture; None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = all(row.seconds is not None for row in rows)
    style = {
        "font.size": 10.5,
        "axes.edgecolor": "#9aa3ad",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "pliant",
    }
    with pyplot.rc_context(style):
        count = 2 if timed else 1
        figure, axes = pyplot.subplots(
            1, count, figsize=(6.1 * count if timed else 7.2, 5.0), sharey=True, squeeze=False, layout="constrained"
        )
        shares = f"{level:.0%} bands" if any(row.interval for row in rows) else "no bands"
        figure.suptitle(f"{title}, {shares}", fontsize=11.5)
        _panel(axes[0, 0], rows, [row.cost.flops / 1e9 for row in rows], "GFLOP per image (multiply-add = 2)")
        _shares(axes[0, 0], max(row.cost.flops for row in rows if row.entry.kind == "full") / 1e9)
        if timed:
            places = [1e3 * (row.seconds or 0.0) for row in rows]
            _panel(axes[0, 1], rows, places, f"milliseconds per image ({machine})")
        axes[0, 0].set_ylabel(f"{metric}, lower is better")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9.5
        )
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return png.getvalue(), svg.getvalue()


def _panel(axis: Any, rows: Sequence[Row], places: Sequence[float], label: str) -> None:
    """One curve per family of several points, single points as markers; the full plan as a line across."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, NullFormatter

    families: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        families.setdefault(row.entry.family, []).append(k)
    planners, baselines = (
        cycle(zip(PLANNER_COLOURS, MARKERS, strict=True)),
        cycle(zip(BASELINE_COLOURS, MARKERS, BASELINE_DASHES, strict=False)),
    )
    number = -1  # of the planner
    for family, members in families.items():
        number += rows[members[0]].entry.kind == "planner"
        members = sorted(members, key=lambda k: places[k])
        x = [places[k] for k in members]
        y = [rows[k].quality.value for k in members]
        low = [max(0.0, i.low) if (i := rows[k].interval) else rows[k].quality.value for k in members]
        high = [i.high if (i := rows[k].interval) else rows[k].quality.value for k in members]
        kind = rows[members[0]].entry.kind
        if kind == "full":
            axis.axhline(y[0], color=INK, linewidth=0.9, alpha=0.5, zorder=1)
            axis.plot(x, y, marker="*", markersize=14, color=INK, linestyle="none", zorder=5, label=family)
            across = {"color": INK, "alpha": 0.07, "linewidth": 0, "zorder": 0}
            axis.axhspan(low[0], high[0], **across)
            continue
        if kind == "baseline":
            colour, marker, dashes = next(baselines)
            width, size = 1.4, 4.5
        else:
            (colour, marker), dashes = next(planners), "-"
            width, size = 2.2, 6.5
        if len(members) == 1 or kind == "own":
            axis.errorbar(
                x, y, [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]],
                fmt=marker, color=colour, markersize=size + 1.5, capsize=3, label=family, zorder=4,
            )  # fmt: skip
            continue
        axis.plot(x, y, dashes, marker=marker, color=colour, linewidth=width, markersize=size, label=family, zorder=3)
        axis.fill_between(x, low, high, color=colour, alpha=0.18 if kind == "planner" else 0.1, linewidth=0, zorder=2)
        if kind == "planner" and number == 0:
            for k, place, value in zip(members, x, y, strict=True):
                axis.annotate(
                    rows[k].entry.budget, (place, value), (0, -8), textcoords="offset points", ha="center", va="top",
                    fontsize=8.5, color=colour, zorder=6, path_effects=[withStroke(linewidth=2.5, foreground="white")],
                )  # fmt: skip
    values = [row.quality.value for row in rows]
    positive = [v for v in values if v > 0]
    axis.set_xscale("log")
    if positive and len(positive) == len(values) and max(values) > LOG_ABOVE * min(values):
        axis.set_yscale("log")
        lows = [i.low for row in rows if (i := row.interval) and i.low > 0]
        axis.set_ylim(bottom=0.8 * min([*positive, *(v for v in lows if v > 0.3 * min(positive))]))
        spread = max(values) / min(positive)
        axis.yaxis.set_minor_formatter(FuncFormatter(_two_and_five) if spread < 100 else NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_formatter(FuncFormatter(_two_and_five))
    axis.tick_params(axis="x", which="minor", labelsize=8.5)
    axis.set_xlabel(label)
    axis.grid(which="major", alpha=0.3)
    axis.grid(which="minor", alpha=0.1)
    axis.spines[["top", "right"]].set_visible(False)


def _shares(axis: Any, full: float) -> None:
    """The top of the FLOPs panel in percent of the full plan."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    top = axis.secondary_xaxis("top", functions=(lambda x: 100 * x / full, lambda p: p * full / 100))
    top.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200]))
    top.xaxis.set_minor_locator(NullLocator())
    top.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
    top.tick_params(labelsize=8.5, length=3, color="#9aa3ad", labelcolor="#5d6570")
    top.spines["top"].set_visible(False)


def _two_and_five(value: float, _: int) -> str:
    """Labels between powers of ten: 2 and 5 only."""
    digit = f"{value:.0e}"[0]
    return f"{value:g}" if digit in "25" else ""
