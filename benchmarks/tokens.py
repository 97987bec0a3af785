"""Fewer tokens per call on a real model: what region-adaptive sampling and token merging cost and are worth.

    python benchmarks/tokens.py digits --output tokens.json

Fréchet distance of plans that compute a share of the tokens (RAS) or merge some (ToMe) against the plain plan and
against fewer plain steps of about RAS's FLOPs; how far, root mean square, the images are
from the plain plan's with the same seeds; and seconds per image, all rows in turn in one process. Finished rows are
kept in the output file, with the number of samples they were measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pliant
from pliant import Denoiser
from pliant.evaluation import evaluate, get_extractor, load_reference
from pliant.files import write_json
from pliant.plans import Plan, Sampler


def plans(model: Denoiser, steps: int, solver: str) -> Iterator[tuple[str, Plan]]:
    """(row name, plan)."""
    full = Plan.uniform(model, steps, solver)
    yield f"{steps} full steps", full
    cheap: list[tuple[str, Plan]] = []
    for ratio in (0.75, 0.5, 0.25):
        cheap.append((f"RAS {ratio:.0%} of the tokens", full.cached(model, "ras", ratio=ratio)))
    cheap.append(("RAS 50%, high metric first", full.cached(model, "ras", ratio=0.5, sign=1)))
    for ratio in (0.25, 0.5):
        cheap.append((f"ToMe {ratio:.0%} merged", full.cached(model, "tome", ratio=ratio)))
    yield from cheap
    counts = {round(steps * plan.cost(model).share) for name, plan in cheap if name.startswith("RAS")}
    for count in sorted(counts - {steps}, reverse=True):
        yield f"{count} full steps", Plan.uniform(model, count, solver)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--num", type=int, default=500, help="samples per repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--timed", type=int, default=50, help="samples of one timed batch, and of the distance by pixel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    model = pliant.load(args.model)
    model.network.requires_grad_(False)
    extractor = get_extractor(args.extractor)
    reference = load_reference(args.reference, extractor)
    output = Path(args.output)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "batch", "repeats", "rounds")}
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if done.get("settings") != settings:
        done = {"settings": settings, "rows": {}}
    rows = dict(plans(model, args.steps, args.solver))
    samplers = {name: Sampler(model, plan) for name, plan in rows.items()}
    labels, seeds = [k % model.num_classes for k in range(args.timed)], list(range(args.timed))
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    images = {}
    for _ in range(args.rounds + 1):  # in turn: a slow moment of the machine hits all rows; the first round warms up
        for name, sampler in samplers.items():
            start = time.process_time()
            images[name] = sampler(labels, seeds)
            seconds[name].append((time.process_time() - start) / args.timed)
    first = next(iter(samplers))
    for name, sampler in samplers.items():
        if name not in done["rows"]:
            report = evaluate(
                lambda y, s, run=sampler: run(y, s).clamp(-1, 1), reference, extractor, args.num, batch=args.batch,
                num_classes=model.num_classes, repeats=args.repeats,
            )  # fmt: skip
            done["rows"][name] = {"share": rows[name].cost(model).flops / rows[first].cost(model).flops}
            done["rows"][name]["report"] = report.to_dict()
        row = done["rows"][name]
        row["off"] = float((images[name] - images[first]).square().mean().sqrt())
        row["seconds"] = row.get("seconds") if args.rounds == 0 else statistics.median(seconds[name][1:])
        write_json(output, done)
        distance, accuracy = row["report"]["distance"], row["report"]["class_accuracy"]
        print(
            f"| {name} | {row['share']:.1%} | {row['seconds'] / done['rows'][first]['seconds']:.1%} | {row['off']:.3f} | "
            f"{distance['mean']:.3f} ± {distance['std'] or 0:.3f} | {accuracy['mean']:.1%} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
