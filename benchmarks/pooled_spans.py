"""Averaged tokens at some depths of a real model (`Compute.tokens = Pool(...)`): what they cost and are worth.

    python benchmarks/pooled_spans.py digits --output pooled_spans.json

Mean square gap between the velocity with averaged tokens and the full network's on noised data, by time; Fréchet distance
of plans that average at every step, or in the first half only, against the plain plan and against fewer plain steps of
about the same FLOPs; how far, root mean square, the images are from the plain plan's with the same seeds. Finished rows
are kept in the output file, with the number of samples they were measured on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pliant
from pliant import Denoiser
from pliant.compute import Compute, Moment, Pool
from pliant.evaluation import digits, evaluate, from_uint8, get_extractor, images_from_parquet, load_reference
from pliant.files import write_json
from pliant.plans import Plan, Sampler
from pliant.plans.engine import Lowered

TIMES = (0.95, 0.8, 0.5, 0.3, 0.1)
RATIOS = ((2, 1), (2, 2), (4, 4))


def pools(blocks: int) -> dict[str, Pool]:
    """Row name -> the first, the middle and the last two blocks, and a schedule over depth, at every strength."""
    found = {}
    middle = blocks // 2
    for name, first in (("first two", 0), ("middle two", middle - 1), ("last two", blocks - 2)):
        for ratio in RATIOS:
            found[f"{name} blocks on 1/{ratio[0] * ratio[1]}"] = Pool.of(2 * first, 2 * first + 4, ratio)
    found["last block on 1/4"] = Pool.of(2 * blocks - 2, 2 * blocks, 2)
    found["all but the first and last on 1/4"] = Pool.of(2, 2 * blocks - 2, 2)
    return found


@torch.no_grad()
def gaps(model: Denoiser, compute: Compute, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean square difference from the full velocity on noised images, by time."""
    eps, out = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), {}
    few, full = (Lowered(model, c).bind(TIMES, labels) for c in (compute, Compute()))
    for k, t in enumerate(TIMES):
        x = model.path.mix(images, eps, t)
        values = [bound.call(k, x, Moment(k, t, 0.0))[0] for bound in (few, full)]
        a, b = (model.path.convert(value, x, t, model.prediction, "velocity") for value in values)
        out[f"{t:g}"] = float((a - b).square().mean())
    return out


def plans(model: Denoiser, steps: int, solver: str) -> dict[str, Plan]:
    """Row name -> plan."""
    full = Plan.uniform(model, steps, solver)
    rows = {f"{steps} full steps": full}
    for name, pool in pools(model.config.depth).items():
        rows[name] = Plan.uniform(model, steps, solver, compute=Compute(tokens=pool))
    late = Compute(tokens=pools(model.config.depth)["last two blocks on 1/4"])
    rows["last two blocks on 1/4, first half of the steps"] = full.with_steps(
        replace(step, compute=late if i < steps // 2 else step.compute) for i, step in enumerate(full.steps)
    )
    shares = {plan.cost(model).flops / full.cost(model).flops for plan in rows.values()}
    for count in sorted({round(steps * share) for share in shares} - {steps}, reverse=True):
        rows[f"{count} full steps"] = Plan.uniform(model, count, solver)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--images", type=int, default=256, help="of the gaps")
    parser.add_argument("--num", type=int, default=500, help="samples per repeat; 0 measures gaps only")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--followed", type=int, default=50, help="seeds of the root mean square")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    model = pliant.load(args.model)
    model.network.requires_grad_(False)
    data = digits("all") if args.data == "digits" else images_from_parquet(args.data)
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[: args.images]
    images, labels = from_uint8(data.images[chosen]), data.labels[chosen].long()
    output = Path(args.output)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "batch")}
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if done.get("settings") != settings:
        done = {"settings": settings, "gaps": {}, "rows": {}}
    for name, pool in pools(model.config.depth).items():
        compute = Compute(tokens=pool)
        found = done["gaps"].setdefault(name, gaps(model, compute, images, labels))
        share = model.flops(compute) / model.flops()
        print(f"| {name} | {share:.0%} | " + " | ".join(f"{v:.3g}" for v in found.values()) + " |", flush=True)
    write_json(output, done)
    if not args.num:
        return
    extractor = get_extractor(args.extractor)
    reference = load_reference(args.data, extractor)
    rows = plans(model, args.steps, args.solver)
    first = next(iter(rows))
    follow = [k % model.num_classes for k in range(args.followed)], list(range(args.followed))
    plain = Sampler(model, rows[first])(*follow).clamp(-1, 1)
    for name, plan in rows.items():
        if name not in done["rows"]:
            sampler = Sampler(model, plan)
            off = float((sampler(*follow).clamp(-1, 1) - plain).square().mean().sqrt())
            report = evaluate(
                lambda y, s, run=sampler: run(y, s).clamp(-1, 1), reference, extractor, args.num, batch=args.batch,
                num_classes=model.num_classes, repeats=args.repeats,
            )  # fmt: skip
            share = plan.cost(model).flops / rows[first].cost(model).flops
            done["rows"][name] = {"share": share, "off": off, "report": report.to_dict()}
            write_json(output, done)
        row = done["rows"][name]
        distance, accuracy = row["report"]["distance"], row["report"]["class_accuracy"]
        print(
            f"| {name} | {row['share']:.1%} | {row['off']:.3f} | {distance['mean']:.3f} | {accuracy['mean']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
