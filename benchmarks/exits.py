"""Early exits measured: error to the full network by time, and sample quality when early or late steps leave early.

    pliant train configs/digits-exits.yaml
    python benchmarks/exits.py runs/digits-exits/model --output docs/exits.json

First table: mean square distance of every exit's prediction to the full one, on noised images of the reference that the
training saw, at three ranges of time; "bare head" is the same exit without its block (the frozen head straight on the
tokens). Second: Fréchet distance (mean and standard deviation over `repeats` disjoint sets of seeds) of plans whose
early, late or all steps use an exit, against fewer full steps at equal FLOPs; "to full" is the mean square distance
of the final images to those of the full plan from the same noise. Finished rows are kept in the output file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pliant
from pliant import Compute, Denoiser
from pliant.adapters import ExitDiT
from pliant.evaluation import digits, evaluate, get_extractor, load_reference
from pliant.files import write_json
from pliant.plans import Plan, Sampler

RANGES = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))


def bare_head(model: Denoiser, depth: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The frozen head on the tokens after `depth` blocks, no block of the exit's."""
    assert isinstance(model.network, ExitDiT)
    plain = model.network.plain
    rows, tokens = plain.modulations(model.encode(t).float(), y), plain.embed(x)
    for i in range(depth):
        tokens = plain.blocks[i](tokens, rows[:, 6 * i : 6 * i + 6])
    return model.split(plain.read(tokens, rows))[0]


@torch.no_grad()
def gaps(model: Denoiser, count: int) -> list[dict[str, Any]]:
    """MSE to the full prediction of every exit in every range of times."""
    generator = torch.Generator().manual_seed(0)
    images = digits("all")
    assert images.labels is not None
    chosen = torch.randperm(len(images), generator=generator)[:count]
    x0, y = images.images[chosen] / 127.5 - 1, images.labels[chosen]
    found = []
    for low, high in (*RANGES, (0.0, 1.0)):
        t = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        x = model.path.mix(x0, torch.randn(x0.shape, generator=generator), t)
        full, exits = model.exit_predictions(x, t, y)
        power = float(full.value.square().mean())
        for depth, prediction in exits.items():
            mse = float((prediction.value - full.value).square().mean())
            bare = float((bare_head(model, depth, x, t, y) - full.value).square().mean())
            found.append({"exit": depth, "low": low, "high": high, "mse": mse, "bare_head": bare, "power": power})
    return found


def schedules(model: Denoiser, steps: int, solver: str) -> Iterator[tuple[str, Plan]]:
    """(row name, plan)."""
    full = Plan.uniform(model, steps, solver)
    yield f"{steps} full steps", full
    half, plans = steps // 2, []
    for depth in model.exit_depths:
        early = [replace(s, compute=Compute(exit=depth)) for s in full.steps]
        plans.append((f"exit {depth} in the first {half} steps", full.with_steps([*early[:half], *full.steps[half:]])))
        plans.append((f"exit {depth} in the last {steps - half} steps", full.with_steps([*full.steps[:half], *early[half:]])))
        plans.append((f"exit {depth} in all steps", full.with_steps(early)))
    yield from plans
    shares = sorted({plan.cost(model).flops for _, plan in plans}, reverse=True)
    counts = {round(steps * share / full.cost(model).flops) for share in shares}
    for count in sorted(counts, reverse=True):
        yield f"{count} full steps", Plan.uniform(model, count, solver)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--rows", default="", help="only plans with this in their name (and the full one)")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    model = pliant.load(args.model)
    model.network.requires_grad_(False)
    extractor = get_extractor(args.extractor)
    reference = load_reference(args.reference, extractor)
    output = Path(args.output)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "batch", "rows")}
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if done.get("settings") != settings:
        done = {"settings": settings, "rows": {}}
    done["gaps"] = gaps(model, 1024)
    for g in done["gaps"]:
        print(f"exit {g['exit']}  t {g['low']:.2f}-{g['high']:.2f}  MSE {g['mse']:.5f}  bare head {g['bare_head']:.4f}  full^2 {g['power']:.3f}", flush=True)
    every = dict(schedules(model, args.steps, args.solver))
    plans = {name: plan for name, plan in every.items() if args.rows in name or name == f"{args.steps} full steps"}
    samplers = {name: Sampler(model, plan) for name, plan in plans.items()}
    labels, seeds = [k % model.num_classes for k in range(100)], list(range(100))
    first = next(iter(samplers))
    target = samplers[first](labels, seeds)
    full_flops = plans[first].cost(model).flops
    for name, sampler in samplers.items():
        if name not in done["rows"]:
            flops = plans[name].cost(model).flops
            report = evaluate(
                lambda y, s, run=sampler: run(y, s).clamp(-1, 1), reference, extractor, args.num, batch=args.batch,
                num_classes=model.num_classes, repeats=args.repeats, first_seed=0, describe={"plan": plans[name].digest()},
            )  # fmt: skip
            away = float((sampler(labels, seeds) - target).square().mean())
            row = {"name": name, "flops": flops, "share": flops / full_flops, "to_full": away}
            done["rows"][name] = {**row, "report": report.to_dict()}
            write_json(output, done)
        row = done["rows"][name]
        distance = row["report"]["distance"]
        print(f"{name:32s} {row['share']:6.1%}  {distance['mean']:.4f} ± {distance['std'] or 0:.4f}  to full {row['to_full']:.4f}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(4):  # all rows in turn: a slow moment of the machine hits all of them; the first round warms up
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampler(labels, seeds)
            times[name].append((time.perf_counter() - start) / len(seeds))
    for name, values in times.items():
        done["rows"][name]["seconds_per_image"] = statistics.median(values[1:])
    write_json(output, done)


if __name__ == "__main__":
    main()
