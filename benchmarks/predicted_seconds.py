"""Predicted against measured seconds of plans that the throughput table was not fitted on.

    python benchmarks/predicted_seconds.py [--model digits DiT-S/2 CIFAR FOLDER] [--precision fp32 bf16] [--rounds 3]
        [--clock wall|process] [--table FOLDER] [--json predicted.json] [--budgets] [--auto 16]

The table is the one of `pliant bench` (measured here first, or read from FOLDER, which keeps it). Measured: the median
of several whole runs of a prepared sampler, from labels and seeds to final states, plans taking turns. Gated caches are
frozen first: what a gate decides is not known before. DiT-S/2 and CIFAR (width 256, depth 8, 32x32 pixels, patch 2) are
untrained, with weights of normal size everywhere. `--budgets`: plans made for "X s", run, compared with X; `--auto N`:
those that `auto` finds with N evaluations, too.

Two distributions are printed. A machine that others use, too, runs as fast today as it did when the table was measured
or it does not: the first distribution has that in it. The second is of the same predictions times one number, how much
longer four plans (`GAUGES`, not judged) took in the same turns than predicted, as `pliant
bench --adjust` asks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pliant
from pliant import Compute, Denoiser
from pliant.adapters.flexify import flexify
from pliant.guidance import Guidance
from pliant.paths import NetworkTime, get_path
from pliant.planning.measuring import seconds_in_turns
from pliant.plans import Plan
from pliant.plans.guiding import guided_between
from pliant.plans.timing import Prices, Throughput
from pliant.plans.timing.adjust import adjusted
from pliant.plans.timing.measure import ROWS, default_computes, measure

SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)
"""Of the way from all steps weak to none, in predicted seconds: the budgets asked for."""
SEARCHED = (0.7, 0.3)
"""The same for `auto`."""
PASSES = 3
GAUGES = ("plain", "weak calls", "guided", "fora")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def model_named(name: str) -> Denoiser:
    """A bundled or trained model, or an untrained network with random weights and a weak patch size."""
    if name == "digits" or Path(name).is_dir():
        model = pliant.load(name)
        model.network.requires_grad_(False)
        return model
    sizes = {"width": 256, "depth": 8, "heads": 4, "in_channels": 3, "num_classes": 10, "learn_sigma": False}
    config = pliant.DiTConfig(**sizes) if name == "CIFAR" else pliant.DiTConfig.named(name)  # type: ignore[arg-type]
    network = pliant.DiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.02))
    path, kind = ("linear", "velocity") if name == "CIFAR" else ("vp-discrete", "epsilon")
    times = NetworkTime(scale=1000.0) if name == "CIFAR" else NetworkTime.timesteps()
    model = flexify(Denoiser(network, get_path(path), kind, times, {"name": name}), [4], rank=16)  # type: ignore[arg-type]
    model.network.requires_grad_(False).eval()
    return model


def plans(model: Denoiser, steps: int, precision: str) -> Iterator[tuple[str, Plan]]:
    """Named plans in one precision: step counts, patches, guidance, solvers, caches, tokens."""
    full = Compute(precision=precision)
    weak = Compute(patch=max(model.patch_sizes), precision=precision)

    def uniform(count: int, solver: str = "dpmpp-2m", **options: Any) -> Plan:
        return Plan.uniform(model, count, solver, full, **options)

    yield "plain", uniform(steps)
    yield "half the steps, Heun", uniform(max(steps // 2, 2), "heun")
    yield "ancestral", uniform(steps, "ddpm" if model.prediction == "epsilon" else "sde-dpmpp-2m")
    yield "UniPC", uniform(steps, "unipc")
    yield "guided", uniform(steps, guidance=2.0)
    yield "weak calls", Plan.uniform(model, steps, "dpmpp-2m", weak)
    split = {"weak": weak, "powerful": full, "guidance": 2.0, "weak_steps": steps // 2}
    yield "weak first, guided", Plan.weak_to_powerful(model, steps, **split)
    yield "weak guidance", Plan.weak_to_powerful(model, steps, **split, weak_guidance_steps=steps // 4)
    yield "guidance interval", guided_between(uniform(steps), Guidance.cfg(2.0))
    base, guided = uniform(steps), uniform(steps, guidance=2.0)
    for name, options in (
        ("fora", {"interval": 3}),
        ("deepcache", {}),
        ("delta-dit", {}),
        ("pab", {}),
        ("taylorseer", {}),
        ("icc", {"interval": 2, "rank": 4}),
        ("tome", {"ratio": 0.5}),
        ("ras", {"metric": "norm"}),
    ):
        try:
            yield f"{name}", base.cached(model, name, **options)
        except pliant.PliantError as error:
            print(f"  {name}: {error}")
    yield "fora, guided", guided.cached(model, "fora", interval=2)
    yield "fastercache, guided", guided.cached(model, "fastercache")
    for name, options in (("fbc", {"threshold": 0.3}), ("easycache", {"threshold": 0.3, "warmup": min(10, steps // 2)})):
        gated = base.cached(model, name, **options)
        yield f"{name}, frozen", gated.freeze(model, [0, 1])


def table_of(model: Denoiser, name: str, args: argparse.Namespace) -> Throughput:
    """Read, or measured with as many rows as guided batches have."""
    file = None if args.table is None else Path(args.table) / f"{name.replace('/', '-')}-{args.clock}.json"
    if file is not None and file.exists():
        table = Throughput.load(file)
        table.check(model)
        return table
    rows = [count for count in ROWS if count <= 2 * max(args.batch)]
    table = measure(model, default_computes(model, args.precision), rows, clock=CLOCKS[args.clock])
    print(f"{name}: table measured in {table.measured['seconds']} s, spread {table.measured['spread']:.1%}", flush=True)
    if file is not None:
        table.save(file)
    return table


def measured(model: Denoiser, made: list[Plan], args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Seconds per image by batch and plan: medians over passes, so that a slow stretch of the machine hits a third."""
    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in args.batch}
    for _ in range(PASSES):
        for batch, passes in found.items():
            passes.append(seconds_in_turns(model, made, batch, args.rounds, clock=CLOCKS[args.clock]))
    return {b: {key: statistics.median(p[key] for p in passes) for key in passes[0]} for b, passes in found.items()}


def summary(errors: list[float]) -> str:
    """The distribution of relative errors."""
    size = sorted(abs(e) for e in errors)
    return (
        f"{len(errors)} plans: median error {statistics.median(errors):+.1%}, median |error| {statistics.median(size):.1%}, "
        f"90th percentile {size[int(0.9 * (len(size) - 1))]:.1%}, worst {size[-1]:.1%}, "
        f"within 10 %: {sum(s <= 0.10 for s in size)}/{len(size)}"
    )


def budgets(model: Denoiser, table: Throughput, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans made for seconds, run, compared."""
    from pliant.planning import search
    from pliant.plans import Budget
    from pliant.plans.budget import seconds_text

    rows = []
    clock = CLOCKS[args.clock]
    kinds = {"split": None, "split, fora": lambda p: p.cached(model, "fora", interval=2)}
    for batch in args.batch:
        now = adjusted(table, model, batch, clock)
        prices = Prices(now, model, batch)

        def made(kind: str, batch: int = batch, now: Throughput = now, **given: Any) -> Plan:
            return Plan.weak_to_powerful(model, args.steps, guidance=2.0, then=kinds[kind], **given)

        asked: dict[tuple[str, float], Plan] = {}
        for kind in kinds:
            ends = [prices.plan(made(kind, weak_steps=k)).seconds for k in (0, args.steps)]
            for share in SHARES:
                wanted = float(f"{ends[1] + share * (ends[0] - ends[1]):.3g}")
                asked[kind, wanted] = made(kind, budget=Budget(seconds=wanted, batch=batch, throughput=now))
        for share in SEARCHED if args.auto else ():
            wanted = float(f"{share * prices.plan(made('split', weak_steps=0)).seconds:.3g}")
            given = {"steps": args.steps, "guidance": 2.0, "evaluations": args.auto}
            budget = Budget(seconds=wanted, batch=batch, throughput=now)
            asked["auto", wanted] = search(model, budget, "auto", **given).plan
        taken = seconds_in_turns(model, list(asked.values()), batch, args.rounds, clock=clock)
        for (kind, wanted), plan in asked.items():
            took, expected = batch * taken[plan.digest()], prices.plan(plan).seconds
            row = {"plan": kind, "batch": batch, "budget": wanted, "predicted": expected, "took": took}
            rows.append({**row, "pace": now.measured["adjusted"]})
            print(
                f"  {kind:12s} budget {seconds_text(wanted)} for {batch}: {plan.provenance.get('weak_steps', '?')} weak "
                f"of {len(plan.steps)} steps, predicted {seconds_text(expected)}, took {seconds_text(took)}: {took / wanted:.1%} of the budget",
                flush=True,
            )
    shares = [row["took"] / row["budget"] for row in rows]
    within, met = sum(0.9 <= s <= 1.1 for s in shares), sum(s <= 1.1 for s in shares)
    print(f"  {len(rows)} budgets: 0.9 to 1.1 of the time {within}, at most 1.1 {met}; {min(shares):.1%} to {max(shares):.1%}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["digits", "DiT-S/2", "CIFAR"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 3, 6])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--table", metavar="FOLDER")
    parser.add_argument("--budgets", action="store_true")
    parser.add_argument("--auto", type=int, default=0, metavar="EVALUATIONS")
    parser.add_argument("--json")
    args = parser.parse_args()
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "clock": args.clock, "rows": []}
    for name in args.model:
        model = model_named(name)
        table = table_of(model, name, args)
        report["machine"] = table.machine.to_dict()
        print(f"{name} on {table.machine.describe()}, {args.clock} clock, {args.steps} steps")
        if args.budgets:
            report["rows"] += [{"model": name, **row} for row in budgets(model, table, args)]
            continue
        raw: list[float] = []
        judged: list[float] = []
        for precision in args.precision:
            made = dict(plans(model, args.steps, precision))
            every = measured(model, list(made.values()), args)
            for batch, taken in every.items():
                prices = Prices(table, model, batch)
                expected = {label: prices.plan(plan).seconds for label, plan in made.items()}
                took = {label: batch * taken[plan.digest()] for label, plan in made.items()}
                pace = statistics.median(took[label] / expected[label] for label in GAUGES)
                errors = {label: pace * expected[label] / took[label] - 1 for label in made if label not in GAUGES}
                for label in made:
                    row = {"model": name, "plan": label, "precision": precision, "batch": batch, "pace": pace}
                    report["rows"].append({**row, "predicted": expected[label], "took": took[label]})
                    print(
                        f"  {label:22s} {precision} batch {batch}: predicted {1e3 * expected[label]:8.1f} ms, took "
                        f"{1e3 * took[label]:8.1f} ms, {expected[label] / took[label] - 1:+.1%}"
                        + (f", at this pace {errors[label]:+.1%}" if label in errors else " (gauge)"),
                        flush=True,
                    )
                raw += [expected[label] / took[label] - 1 for label in errors]
                judged += errors.values()
                print(f"{name}, {precision}, batch {batch}, pace {pace:.2f}: {summary(list(errors.values()))}", flush=True)
        print(f"{name}, as the table says: {summary(raw)}")
        print(f"{name}, at the present pace: {summary(judged)}\n", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
