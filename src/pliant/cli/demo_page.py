"""The demo's page: one HTML file with everything inside, readable on a phone and in the dark."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pliant.cli.demo_runs import Judgement, Row

STYLE = """
:root { color-scheme: light dark; --ink: #1c2026; --quiet: #5d6570; --back: #fff; --soft: #f3f5f7; --line: #dfe3e8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --quiet: #a3abb5; --back: #16191d; --soft: #20252b; --line: #363d46 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem 1rem 4rem; color: var(--ink); background: var(--back);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { max-width: 44rem } .quiet, figcaption { color: var(--quiet); font-size: .92rem }
figure { margin: 1rem 0 } .wide { overflow-x: auto }
img { border-radius: 6px; max-width: 100%; height: auto; background: #fff } .wide img { min-width: 40rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .88rem }
"""


def page(
    title: str,
    rows: list[Row],
    judgement: Judgement | None,
    comparison: bytes,
    plot: bytes | None,
    commands: list[str],
    facts: dict[str, str],
) -> str:
    """The whole document."""
    figure = ""
    if plot is not None:
        figure = f'<figure class="wide">{_image(plot, "Quality against FLOPs and against seconds")}</figure>'
    listed = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pliant: {escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>One model, four budgets</h1>
<p>A class-conditional diffusion transformer ({escape(title)}) that Pliant made flexible. Its first denoising steps run
on coarse patches, which cost a fraction; its last ones on fine patches. How many are coarse follows from the budget.
Every row starts from the same noise.</p>
<figure class="wide">{_image(comparison, "Samples by budget and class")}
<figcaption>Rows: share of the full compute. Columns: classes. The same seeds in every row.</figcaption></figure>
<h2>What it costs, and what is left of the quality</h2>
<div class="wide">{_table(rows, judgement)}</div>
<p class="quiet">{escape(judgement_text(judgement))}
Seconds: median over batches of {rows[0].batch} on this machine after a warm-up; the budgets took turns.</p>
{figure}
<h2>Do it yourself</h2>
<pre>{escape(chr(10).join(commands))}</pre>
<h2>How this page was made</h2>
<div class="wide"><table>{listed}</table></div>
</body>
</html>
"""


def judgement_text(judgement: Judgement | None) -> str:
    """What the distances are and how to read them."""
    if judgement is None:
        return "No distance: too few images were drawn in the time given to say anything about quality."
    where = "" if judgement.here else ", measured when the model was made"
    return (
        f"Distance: {judgement.metric}, {judgement.images:,} images per budget{where}. Lower is better; it depends on "
        f"the number of images, so compare equal numbers only."
    )


def _table(rows: list[Row], judgement: Judgement | None) -> str:
    head = ["budget", "FLOPs used", "GFLOP per image", "weak steps", "ms per image", "time used"]
    head += ["distance", "95 % interval"] if judgement else []
    body = []
    for row in rows:
        cells = row_cells(row, rows[0])
        body.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells[: len(head)]) + "</tr>")
    return (
        "<table><thead><tr>"
        + "".join(f"<th>{escape(h)}</th>" for h in head)
        + "</tr></thead><tbody>"
        + "".join(body)
        + "</tbody></table>"
    )


def row_cells(row: Row, full: Row) -> list[str]:
    """The numbers of one budget as text, in the order of the table's columns."""
    weak = row.plan.provenance.get("weak_steps", 0)
    d = row.distance
    return [
        row.label,
        f"{row.cost.share:.1%}",
        f"{row.cost.flops / 1e9:.4g}",
        f"{weak} of {len(row.plan.steps)}",
        f"{row.seconds * 1e3:.3g}",
        f"{row.seconds / full.seconds:.1%}",
        "-" if d is None else f"{d.value:.3g}",
        "-" if d is None else f"{d.low:.3g} to {d.high:.3g}",
    ]


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
