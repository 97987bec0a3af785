"""`pliant demo`: the shipped model at four budgets, as pictures, numbers and one page. Offline, within a minute."""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, progress, table
from pliant.errors import ConfigError, PliantError, suggest

if TYPE_CHECKING:
    from pliant.cli.demo_runs import Judgement, Row, Setting
    from pliant.cli.models import Opened

EXAMPLES = """\b
Examples:
  pliant demo
  pliant demo -o my-demo --seconds 120    more images behind every number
  pliant demo --model digits --json
"""

COLUMNS, LINES = 10, 2
"""Classes in the comparison, and images of each."""
DRAWING = 15.0
"""Seconds that the comparison may take; slow models get one image per class, or fewer classes."""


def register(app: typer.Typer) -> None:
    app.command("demo", epilog=EXAMPLES)(demo)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("demo"),
    model: Annotated[
        str | None, typer.Option("--model", help="Bundled model: cifar10 or digits. Default: the first there is.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Time for measuring.")] = 25.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first picture.")] = 0,
    json: opt.JSON = False,
) -> None:
    """Sample the bundled model at 100, 75, 60 and 45 % of its compute and compare."""
    begun = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from pliant.cli import demo_runs
    from pliant.cli.labels import class_name
    from pliant.cli.models import open_model

    name = _choose(model)
    setting = demo_runs.SETTINGS[name]
    if setting.reference == "digits" and importlib.util.find_spec("sklearn") is None:
        setting = replace(setting, reference=None)  # the digits come with scikit-learn; without it, pictures and times
    opened = open_model(name, device="cpu")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the folder {out}: {error.strerror or error}") from None
    rows = demo_runs.make_rows(opened, setting)
    classes = list(range(min(COLUMNS, opened.denoiser.num_classes)))
    pace = demo_runs.choose_threads(rows[0], classes)
    affordable = int(DRAWING / pace / sum(row.cost.share for row in rows))
    classes = classes[: max(4, affordable)]
    lines = max(1, min(LINES, affordable // len(classes)))
    with progress("sampling four budgets") as advance:
        demo_runs.draw_pictures(rows, classes * lines, seed, advance)
    with progress("measuring (seconds)") as advance:
        demo_runs.measure(rows, setting, opened.denoiser.num_classes, pace, seconds, advance)
    judgement = demo_runs.judge(rows, setting, demo_runs.stored_quality(name))
    names = [class_name(c, opened.denoiser) for c in classes]
    files = _write(out, name, opened, setting, rows, names, judgement)
    report: dict[str, Any] = {
        "model": name,
        "metric": judgement.metric if judgement else None,
        "images": judgement.images if judgement else 0,
        "rows": [_facts(row) for row in rows],
        "files": {k: str(v) for k, v in files.items()},
        "seconds": time.perf_counter() - begun,
    }
    if json:
        emit_json(report)
    else:
        _print(rows, judgement, files, report["seconds"])


def _choose(model: str | None) -> str:
    from pliant.cli.demo_runs import SETTINGS
    from pliant.formats.locate import bundled_models

    there = [name for name in SETTINGS if name in bundled_models()]
    if model is None and there:
        return there[0]
    if not there:
        raise ConfigError("no bundled model is installed; reinstall Pliant")
    if model not in there:
        raise ConfigError(f"there is no demo of {model!r}: {suggest(str(model), there)}")
    return model


def _write(
    out: Path,
    name: str,
    opened: Opened,
    setting: Setting,
    rows: list[Row],
    names: list[str],
    judgement: Judgement | None,
) -> dict[str, Path]:
    from pliant.cli.demo_page import page
    from pliant.cli.demo_pictures import comparison, plot
    from pliant.files import replaced_file

    sheet = comparison(rows, names)
    chart = plot(rows, judgement) if judgement else None
    files = {"page": out / "index.html", "comparison": out / "comparison.png"}
    facts = _provenance(opened, setting)
    html = page(setting.title, rows, judgement, sheet, chart, commands(name, setting, out), facts)
    contents = {"page": html.encode(), "comparison": sheet}
    if chart is not None:
        files["plot"], contents["plot"] = out / "quality.png", chart
    try:
        for row in rows:
            files[f"plan {row.label}"] = file = out / f"plan-{row.budget * 100:.0f}.json"
            row.plan.save(file)
        for key, content in contents.items():
            with replaced_file(files[key]) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise PliantError(f"could not write to {out}: {error.strerror or error}") from None
    return files


def commands(name: str, setting: Setting, out: Path) -> list[str]:
    """What a reader may type next."""
    guidance = f" --guidance {setting.guidance:g}" if setting.guidance else ""
    plan = f"--budget 60% --steps {setting.steps} --solver {setting.solver}{guidance}"
    lines = [
        "pliant demo",
        f"pliant info {name}",
        f"pliant plan {name} {plan} -o plan.json",
        f"pliant sample {name} --plan plan.json -o samples.png      # or --plan {out}/plan-60.json",
        "pliant sample --replay samples.png",
    ]
    if setting.reference:
        lines.append(f"pliant eval {name} --plan plan.json --reference {setting.reference} --num 1000")
    return lines


def _provenance(opened: Opened, setting: Setting) -> dict[str, str]:
    import platform

    import torch

    from pliant import __version__
    from pliant.cli.models import weights_hash
    from pliant.cli.planning import own_precision

    return {
        "model": f"{opened.name}, weights sha256 {weights_hash(opened.denoiser)[:16]}",
        "sampler": f"{setting.solver}, {setting.steps} steps, guidance {setting.guidance or 'none'}",
        "precision": own_precision(opened.denoiser) or "as stored",
        "software": f"pliant {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _facts(row: Row) -> dict[str, Any]:
    d = row.distance
    return {
        "budget": row.budget,
        "share": row.cost.share,
        "flops_per_image": row.cost.flops,
        "weak_steps": row.plan.provenance.get("weak_steps"),
        "steps": len(row.plan.steps),
        "seconds_per_image": row.seconds,
        "batch": row.batch,
        "images_timed": row.images,
        "distance": None if d is None else {"value": d.value, "low": d.low, "high": d.high},
        "plan_digest": row.plan.digest(),
    }


def _print(rows: list[Row], judgement: Judgement | None, files: dict[str, Path], seconds: float) -> None:
    from pliant.cli.demo_page import judgement_text, row_cells

    columns = ["budget", "FLOPs used", "GFLOP/image", "weak steps", "ms/image", "time used"]
    columns += ["distance", "95 % interval"] if judgement else []
    table(columns, [row_cells(row, rows[0])[: len(columns)] for row in rows])
    print(judgement_text(judgement))
    print(f"\npage        {files['page']}")
    print(f"comparison  {files['comparison']}")
    if "plot" in files:
        print(f"plot        {files['plot']}")
    elif judgement:
        print("plot        needs matplotlib: pip install 'pliant[plots]'")
    print(f"done in {seconds:.0f} s")
