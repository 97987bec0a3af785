"""A training-free weak mode on a real model: how far it is from the full network, and what sampling with it costs.

    python benchmarks/low_band.py digits --data digits --extractor digits-classifier --output low_band.json

Part 1: mean square gap between weak and full velocity on noised data, by time, and the loss of each against the data.
Part 2: Fréchet distance when the first `--shares` of the steps run in the low band, against full steps, against fewer
full steps at equal FLOPs and, where the model has one, against its trained weak patch; and how far, root mean square,
the images are from those of full steps with the same seeds. Finished rows are kept in the output file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pliant
from pliant import Compute, Denoiser
from pliant.adapters.low_band_denoiser import LowBandDenoiser, low_band, plain_network
from pliant.evaluation import digits, evaluate, from_uint8, get_extractor, images_from_parquet, load_reference
from pliant.evaluation.spectrum import coarse_steps, coefficient_power, fit_power_law, measure, radial, switch_times
from pliant.files import write_json
from pliant.models.sparse_span import pooled_span
from pliant.paths import uniform_times
from pliant.plans.noise import start_state
from pliant.solvers import Eval, Output, compile_program, run

TIMES = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
Velocity = Callable[[Tensor, float, Tensor], Tensor]


@torch.no_grad()
def gaps(model: Denoiser, weak: Velocity, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """By time: "gap" to the full velocity, and the mean square "error" of both against the data's own velocity."""
    eps, out = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), {}
    for t in TIMES:
        x, target = model.path.mix(images, eps, t), model.path.target("velocity", images, eps, t)
        full, found = model(x, t, labels).to("velocity"), weak(x, t, labels)
        pairs = {"gap": (full, found), "error": (found, target), "full error": (full, target)}
        out[f"{t:g}"] = {name: float((a - b).square().mean()) for name, (a, b) in pairs.items()}
    return out


def pooled_velocity(model: Denoiser, first: int, last: int, many: tuple[int, int]) -> Velocity:
    """Velocity with blocks first..last-1 on averaged tokens (`pooled_span`)."""
    dit, few = plain_network(model), (many[0] // 2, many[1] // 2)

    def velocity(x: Tensor, t: float, y: Tensor) -> Tensor:
        rows = dit.modulations(model.encode(torch.full((len(x),), t, dtype=torch.float64)).float(), y)

        def part(start: int, stop: int, tokens: Tensor) -> Tensor:
            for i in range(start, stop):
                tokens = dit.blocks[i](tokens, rows[:, 6 * i : 6 * i + 6])
            return tokens

        tokens = pooled_span(lambda v: part(first, last, v), part(0, first, dit.embed(x)), many, few)
        value, _ = model.split(dit.read(part(last, len(dit.blocks), tokens), rows))
        return model.path.convert(value, x, t, model.prediction, "velocity")

    return velocity


def sampler(model: Denoiser, weak: Velocity, steps: int, k: int, solver: str) -> Callable[[Tensor, list[int]], Tensor]:
    """Samples whose first k steps use the weak velocity. Multistep solvers forget their history at the switch."""
    times = uniform_times(steps)
    program = compile_program(model.path, times, solver, "velocity", reset_history=[k] if 0 < k < steps else [])

    @torch.no_grad()
    def images(labels: Tensor, seeds: list[int]) -> Tensor:
        x = start_state(program.start, seeds, model.sample_shape, model.device, model.path, None)

        def evaluate_at(x: Tensor, ev: Eval) -> Output:
            t = ev.node.t
            return Output(weak(x, t, labels) if ev.step < k else model(x, t, labels).to("velocity"))

        for result in run(program, x, evaluate_at):
            last = result.x
        return last.clamp(-1, 1)

    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--images", type=int, default=256, help="of part 1")
    parser.add_argument("--num", type=int, default=500, help="samples of part 2's distance; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--followed", type=int, default=50, help="seeds of the root mean square")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.2, 0.4])
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--sampled", nargs="*", help="part 2 only for these rows (default: all)")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    model = pliant.load(args.model)
    model.network.float()
    data = digits("all") if args.data == "digits" else images_from_parquet(args.data)
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images, labels = from_uint8(data.images[chosen[: args.images]]), data.labels[chosen[: args.images]].long()
    known = from_uint8(data.images[chosen[:5000]])
    size = (int(known.shape[-2]), int(known.shape[-1]))
    spectrum, rings = measure(known), radial(coefficient_power([known], "dft"), "dft")
    output = Path(args.output)
    out: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"gaps": {}, "rows": {}}
    law = fit_power_law(rings, first=1 if min(size) < 16 else 2, last=min(size) / 2)
    grid = uniform_times(args.steps)
    switches = {f"{d:g}": switch_times(rings, size, [0.5], d)[0] for d in (0.01, 0.05, 0.1, 0.2, 0.5)}
    counts = {
        d: {"as SPEED": coarse_steps(grid, [t])[0], "safe": coarse_steps(grid, [t], ratios=[2.0])[0]}
        for d, t in switches.items()
    }
    out["spectrum"] = {"law": law.to_config(), "radial": rings.to_config(), "t*": switches, "steps": counts}
    print(json.dumps({"law": law.to_config(), "t*": switches, "steps": counts}))

    weak: dict[str, tuple[Velocity, float]] = {}

    def add(name: str, mode: LowBandDenoiser) -> None:
        weak[name] = (lambda x, t, y: mode(x, t, y).to("velocity")), mode.flops() / model.flops()

    for band in ("haar", "dct"):
        for missing in ("hold", "wiener"):
            for positions in ("center", "own"):
                add(f"{band} {missing} {positions}", low_band(model, 2, band, missing, spectrum, positions))
    for patch in model.patch_sizes[1:]:
        compute = Compute(patch=patch)
        weak["trained patch " + "x".join(map(str, patch))] = (
            lambda x, t, y, c=compute: model(x, t, y, c).to("velocity"),
            model.flops(compute) / model.flops(),
        )
    rows_of, depth = model.config.grid(), model.config.depth
    for first, last in ((0, depth), (1, depth - 1), (1, depth // 2), (depth // 2, depth - 1)):
        spans = f"blocks {first + 1}-{last} on a quarter of the tokens"
        if spans not in out["gaps"]:
            out["gaps"][spans] = gaps(model, pooled_velocity(model, first, last, rows_of), images, labels)
    for name, (velocity, _) in weak.items():
        if name not in out["gaps"]:
            out["gaps"][name] = gaps(model, velocity, images, labels)
    write_json(output, out)
    for name, by_time in out["gaps"].items():
        print(f"{name:24s} gap   " + "  ".join(f"{t}: {v['gap']:.4f}" for t, v in by_time.items()))
        print(f"{'':24s} error " + "  ".join(f"{t}: {v['error']:.4f}" for t, v in by_time.items()))
    print(f"{'full':24s} error " + "  ".join(f"{t}: {v['full error']:.4f}" for t, v in by_time.items()))

    if not args.followed:
        return
    extractor = get_extractor(args.extractor) if args.num else None
    reference = load_reference(args.data, extractor) if extractor else None
    rows: list[tuple[str, Velocity, int, int, float]] = []
    nothing = next(iter(weak.values()))[0]
    rows.append((f"{args.steps} full steps", nothing, args.steps, 0, 1.0))
    for share in args.shares:
        k = round(share * args.steps)
        for name, (velocity, cost) in weak.items():
            if args.sampled is None or name in args.sampled:
                flops = (k * cost + args.steps - k) / args.steps
                rows.append((f"{name}, first {k} of {args.steps}", velocity, args.steps, k, flops))
        cheap = next(iter(weak.values()))[1]
        fewer = round(k * cheap + args.steps - k)
        rows.append((f"{fewer} full steps", nothing, fewer, 0, fewer / args.steps))
    followed = torch.arange(args.followed) % model.num_classes, list(range(args.followed))
    wanted: Tensor | None = None
    for name, velocity, steps, k, flops in rows:
        if name not in out["rows"]:
            run_plan = sampler(model, velocity, steps, k, args.solver)
            found = run_plan(*followed)
            if wanted is None:
                whole = k == 0 and steps == args.steps
                wanted = found if whole else sampler(model, nothing, args.steps, 0, args.solver)(*followed)
            off = float((found - wanted).square().mean().sqrt())
            out["rows"][name] = row = {"flops": flops, "off": off}
            if extractor and reference:
                row["report"] = evaluate(
                    run_plan, reference, extractor, args.num, num_classes=model.num_classes, repeats=args.repeats,
                    batch=125,
                ).to_dict()  # fmt: skip
            write_json(output, out)
        row = out["rows"][name]
        line = f"| {name} | {flops:.1%} | {row['off']:.3f} |"
        if "report" in row:
            distance, accuracy = row["report"]["distance"], row["report"]["class_accuracy"]
            spread = f" ± {distance['std']:.3f}" if distance["std"] is not None else ""
            line += f" {distance['mean']:.3f}{spread} | {accuracy['mean']:.1%} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
