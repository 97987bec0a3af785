"""Quality against compute: weak-first, weak-last and fewer full steps, with seed-to-seed intervals.

    python benchmarks/quality.py digits --reference digits --extractor digits-classifier --num 1000 --repeats 3 \
        --output src/pliant/assets/digits/quality.json

Every row is the Fréchet distance between `num` samples and the reference, mean and standard deviation over `repeats`
disjoint sets of seeds; all rows use the same seeds and the same solver. FLOPs are exact; seconds are measured at the
end, all rows in turn (medians). Finished rows are kept in the output file, so an interrupted run goes on where it stopped. Writes the
JSON, a Markdown table and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import pliant
from pliant.evaluation import evaluate, get_extractor, load_reference
from pliant.files import write_json
from pliant.plans import Plan, Sampler

BUDGETS = (0.75, 0.60, 0.45)


def schedules(model: pliant.Denoiser, steps: int, solver: str, guidance: float, counts: list[int]) -> Iterator[tuple[str, str, Plan]]:
    """(row name, family, plan)."""
    full = Plan.uniform(model, steps, solver, guidance=guidance)
    yield f"{steps} full steps", "full", full
    for budget in BUDGETS:
        for family, last in (("weak first", False), ("weak last", True)):
            plan = Plan.weak_to_powerful(model, steps, budget, solver=solver, guidance=guidance, weak_last=last)
            weak = sum(s.compute.patch is not None for s in plan.steps)
            yield f"{steps} steps, {weak} weak {'last' if last else 'first'}", family, plan
        fewer = max(k for k in range(1, steps) if Plan.uniform(model, k, solver, guidance=guidance).cost(model).flops <= budget * full.cost(model).flops)
        yield f"{fewer} full steps", "fewer steps", Plan.uniform(model, fewer, solver, guidance=guidance)
    for count in counts:
        yield f"{count} full steps", "few steps", Plan.uniform(model, count, solver, guidance=guidance)


def measure(model: pliant.Denoiser, plan: Plan, reference, extractor, args: argparse.Namespace) -> dict:  # type: ignore[no-untyped-def, type-arg]
    sampler = Sampler(model, plan)
    spent: list[float] = []

    def images(labels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        start = time.perf_counter()
        out = sampler(labels, seeds).cpu()  # waits for the device
        spent.append((time.perf_counter() - start) / len(seeds))
        return out.clamp(-1, 1)

    report = evaluate(
        images, reference, extractor, args.num, batch=args.batch, num_classes=model.num_classes, repeats=args.repeats,
        first_seed=args.first_seed,
        describe={"plan": plan.digest(), "solver": args.solver, "guidance": args.guidance},
    )  # fmt: skip
    return {"report": report.to_dict(), "seconds_per_image": min(spent)}


def retime(model: pliant.Denoiser, rows: dict, plans: dict[str, Plan], batch: int, rounds: int = 3) -> None:  # type: ignore[type-arg]
    """Measure all rows again, in turn, so that a slow moment of the machine hits all of them; medians."""
    samplers = {key: Sampler(model, plan) for key, plan in plans.items()}
    labels, seeds = [k % model.num_classes for k in range(batch)], list(range(batch))
    times: dict[str, list[float]] = {key: [] for key in samplers}
    for _ in range(rounds + 1):  # the first round warms up
        for key, sampler in samplers.items():
            start = time.perf_counter()
            sampler(labels, seeds).cpu()
            times[key].append((time.perf_counter() - start) / batch)
    for key, values in times.items():
        rows[key]["seconds_per_image"] = statistics.median(values[1:])


def table(rows: list[dict], metric: str, full_flops: int) -> str:  # type: ignore[type-arg]
    lines = [
        f"| schedule | FLOPs | GFLOP/image | ms/image | {metric} | class accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        distance, accuracy = row["report"]["distance"], row["report"]["class_accuracy"]
        spread = f" ± {distance['std']:.3f}" if distance["std"] is not None else ""
        lines.append(
            f"| {row['name']} | {row['flops'] / full_flops:.1%} | {row['flops'] / 1e9:.3g} "
            f"| {1e3 * row['seconds_per_image']:.3g} | {distance['mean']:.3f}{spread} | {accuracy['mean']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], metric: str, full_flops: int, file: Path, title: str) -> None:  # type: ignore[type-arg]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    full = [r for r in rows if r["family"] == "full"]
    for family, marker in (("weak first", "o"), ("weak last", "s"), ("fewer steps", "^"), ("few steps", "v")):
        members = sorted((r for r in [*(full if family != "few steps" else []), *rows] if r["family"] in (family, "full")), key=lambda r: r["flops"])
        if family == "few steps":
            members = [r for r in members if r["family"] == family]
        if members:
            axis.errorbar(
                [100 * r["flops"] / full_flops for r in members],
                [r["report"]["distance"]["mean"] for r in members],
                [r["report"]["distance"]["std"] or 0 for r in members],
                marker=marker, label=family, capsize=3,
            )  # fmt: skip
    axis.set_xlabel("FLOPs, % of full compute")
    axis.set_ylabel(metric)
    axis.set_title(title, fontsize=10)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--counts", type=int, nargs="*", default=[20, 10, 5], help="extra rows of few full steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    model = pliant.load(args.model).to(args.device)
    extractor = get_extractor(args.extractor)
    reference = load_reference(args.reference, extractor)
    output = Path(args.output)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "batch", "device")}
    done: dict = json.loads(output.read_text()) if output.exists() else {}  # type: ignore[type-arg]
    if done.get("settings") != settings:
        done = {"settings": settings, "rows": {}}
    rows, plans = [], {}
    for name, family, plan in schedules(model, args.steps, args.solver, args.guidance, args.counts):
        key = f"{family}: {name}"
        plans[key] = plan
        if key not in done["rows"]:
            cost = plan.cost(model)
            row = {"name": name, "family": family, "flops": cost.flops, "evaluations": cost.evaluations}
            done["rows"][key] = {**row, **measure(model, plan, reference, extractor, args)}
            write_json(output, done)
        rows.append(done["rows"][key])
        distance = rows[-1]["report"]["distance"]
        print(f"{name:32s} {rows[-1]['flops'] / rows[0]['flops']:6.1%}  {distance['mean']:.4f} ± {distance['std'] or 0:.4f}", flush=True)
    retime(model, done["rows"], plans, args.batch)
    write_json(output, done)
    metric, full_flops = rows[0]["report"]["metric"], rows[0]["flops"]
    output.with_suffix(".md").write_text(table(rows, metric, full_flops))
    title = f"{Path(args.model).name}: {args.num} x {args.repeats} samples, {args.solver}, guidance {args.guidance:g}"
    plot(rows, metric, full_flops, output.with_suffix(".png"), title)
    print(f"wrote {output}, {output.with_suffix('.md')}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
