"""The frontier's page: one HTML file with everything inside, readable on a phone and in the dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pliant.cli.demo_page import STYLE

if TYPE_CHECKING:
    from pliant.planning.entries import Skipped

OWN_STYLE = """
.chart { background: #fff; border-radius: 8px; padding: .6rem }
.chart svg { width: 100%; height: auto; min-width: 44rem }
tr.best td { font-weight: 600 }
tr.head td { color: var(--quiet); padding-top: 1.1rem; border-bottom-color: var(--quiet) }
th.mark, td.mark { padding-right: 0; border-bottom-color: transparent }
td.plan { text-align: left }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; font-size: .88em }
.strips td { border: 0; padding: .15rem .8rem .15rem 0; line-height: 1.3 }
.strips img { min-width: 32rem; border-radius: 3px }
.recipe td { white-space: normal; text-align: left; overflow-wrap: anywhere }
.recipe td:first-child { white-space: nowrap }
"""


def page(
    title: str,
    metric: str,
    level: float,
    rows: Sequence[dict[str, Any]],
    chart: str | None,
    pictures: Sequence[tuple[str, str, bytes]],
    recipe: dict[str, Any],
    commands: Sequence[str],
    skipped: Sequence[Skipped],
) -> str:
    """The whole document. rows: as `frontier_rows.as_dicts` gives them; chart: SVG; pictures: (name, cost, PNG)."""
    figure = "" if chart is None else f'<figure class="wide chart">{_inline(chart)}</figure>'
    missing = ""
    if skipped:
        lines = "".join(f"<li>{escape(s.family)} at {escape(s.budget)}: {escape(s.reason)}</li>" for s in skipped)
        missing = f"<h2>What has no plan</h2><ul>{lines}</ul>"
    listed = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in recipe.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pliant frontier: {escape(title)}</title>
<style>{STYLE}{OWN_STYLE}</style>
</head>
<body>
<h1>Quality against compute: {escape(title)}</h1>
<p>Every point is a plan that can be run. Lower and further left is better. {escape(metric)},
{recipe["images"]:,} images per plan and repeat, the same seeds for every plan, none of which a planner has seen. It
grows as images get fewer: compare equal numbers only.</p>
{figure}
<h2>What they make</h2>
<p class="quiet">The full plan, then the plans marked &#9733; below from dear to cheap. The same seeds in every row.</p>
<div class="wide">{_strips(pictures)}</div>
<h2>Every plan</h2>
<p class="quiet">&#9733; no other plan here is cheaper and at least as good. Intervals cover {level:.0%} by which
samples were drawn; plans share their seeds, so small differences between plans are surer than intervals suggest.</p>
<div class="wide">{_table(rows)}</div>
{missing}
<h2>Run one</h2>
<pre>{escape(chr(10).join(commands))}</pre>
<h2>How these numbers were made</h2>
<div class="wide"><table class="recipe">{listed}</table></div>
</body>
</html>
"""


def _inline(svg: str) -> str:
    """The drawing without its XML prologue."""
    return svg[svg.index("<svg") :]


def _strips(pictures: Sequence[tuple[str, str, bytes]]) -> str:
    """A row per plan: what it is, and its images."""
    rows = []
    for name, cost, png in pictures:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        label = f'{escape(name)}<br><span class="quiet">{escape(cost)}</span>'
        rows.append(f'<tr><td>{label}</td><td><img alt="Samples of {escape(name)}" src="{source}"></td></tr>')
    return f'<table class="strips">{"".join(rows)}</table>'


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("", "budget", "FLOPs", "GFLOP", "steps", "NFE", "ms", "distance", "interval", "file")
    body, family = [], None
    for row in rows:
        if row["family"] != family:
            family = row["family"]
            body.append(f'<tr class="head"><td colspan="{len(head)}">{escape(family)}</td></tr>')
        cells = "".join(f"<td>{escape(c)}</td>" for c in cells_of(row))
        best = ' class="best"' if row["on_frontier"] else ""
        star = "&#9733;" if row["on_frontier"] else ""
        file = f'<td class="plan"><code>{escape(row["plan_file"])}</code></td>'
        body.append(f'<tr{best}><td class="mark">{star}</td>{cells}{file}</tr>')
    heads = "".join(f"<th>{h}</th>" for h in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def cells_of(row: dict[str, Any]) -> list[str]:
    """Budget, share, GFLOP, steps, NFE, ms, distance and interval of a row as text."""
    seconds = row["seconds_per_image"]
    return [
        row["budget"] or "-",
        f"{row['share_of_full']:.1%}",
        _three_digits(row["flops_per_image"] / 1e9),
        str(row["steps"]),
        str(row["NFE"]),
        "-" if seconds is None else _three_digits(1e3 * seconds),
        f"{row['distance']:.4g}",
        "-" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}",
    ]


def _three_digits(value: float) -> str:
    """Three significant digits, never with an exponent for large numbers."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
