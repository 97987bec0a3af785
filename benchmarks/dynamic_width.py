"""Routed width measured: FLOPs, processor time and sample quality of DyDiT models against the network they come from.

    pliant train configs/digits-dydit.yaml objective.target=0.5 output=runs/digits-dydit-50
    python benchmarks/dynamic_width.py runs/digits-dydit-50/model --output docs/dydit.json

All rows: the same seeds, solver and number of steps, except "fewer full steps", which have about the FLOPs of a routed
row. Masks are cut out for every step and tokens really skip. FLOPs are counted while sampling the first batch;
processor time is this process's own over all of a row's images. Finished rows are kept in the output file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pliant
from pliant import Denoiser
from pliant.adapters import DynamicDiT, FlexiDiT
from pliant.adapters.width_slicing import width_variants
from pliant.compute import counted_flops
from pliant.evaluation import evaluate, get_extractor, load_reference
from pliant.files import write_json
from pliant.plans import uniform
from pliant.plans.noise import batch_noise
from pliant.solvers import Eval, Output, run


def plain(model: Denoiser) -> Denoiser:
    """The model's own patch size, or all of its width, as a plain network."""
    network = model.network.base if isinstance(model.network, FlexiDiT | DynamicDiT) else model.network
    return replace(model, network=network)


def sampler(model: Denoiser, steps: int, solver: str) -> tuple[Callable[[Tensor, list[int]], Tensor], int]:
    """A function (labels, seeds) -> images, and how many different networks it uses."""
    program = uniform(plain(model), steps, solver).program(plain(model))
    times = torch.tensor([e.node.t for e in program.evaluations], dtype=torch.float64)
    networks = [plain(model).network] * len(times)
    if isinstance(model.network, DynamicDiT):
        networks = list(width_variants(model.network, model.encode(times).float()))
    place = {e.out: k for k, e in enumerate(program.evaluations)}

    def draw(labels: Tensor, seeds: list[int]) -> Tensor:
        def call(x: Tensor, evaluation: Eval) -> Output:
            here = replace(model, network=networks[place[evaluation.out]])
            return Output(here(x, evaluation.node.t, labels).value.to(x.dtype), None)

        shape = model.sample_shape
        x = batch_noise(seeds, -1, shape, model.device, model.path)
        with torch.no_grad():
            for result in run(program, x, call, lambda slot: batch_noise(seeds, slot, shape, model.device)):
                x = result.x
        return x

    return draw, len({id(n) for n in networks})


def measured(name: str, model: Denoiser, args: argparse.Namespace, steps: int) -> dict[str, Any]:
    draw, networks = sampler(model, steps, args.solver)
    labels, seeds = torch.arange(50) % model.num_classes, list(range(50))
    flops = counted_flops(lambda: draw(labels, seeds)) / 50
    extractor = get_extractor("digits-classifier")
    begun = time.process_time()
    report = evaluate(
        draw,
        load_reference("digits", extractor, size=model.config.input_size),
        extractor,
        args.num,
        batch=125,
        num_classes=model.num_classes,
        repeats=args.repeats,
    )
    seconds = (time.process_time() - begun) / (args.num * args.repeats)
    return {"name": name, "steps": steps, "networks": networks, "flops": flops, "seconds": seconds, **report.to_dict()}


def share_by_time(model: Denoiser, count: int = 128) -> list[dict[str, float]]:
    """What is left at ten times, on noised digits: heads, groups, tokens, and all of the blocks' work."""
    from pliant.evaluation import digits

    assert isinstance(model.network, DynamicDiT)
    data = digits("all")
    assert data.labels is not None
    x0, y = data.images[:count] / 127.5 - 1, data.labels[:count]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for t in torch.linspace(0.05, 0.95, 10, dtype=torch.float64).tolist():
        at = model.encode(torch.full((count,), t, dtype=torch.float64)).float()
        with torch.no_grad():
            masks = model.network.routed(model.path.mix(x0, noise, t).float(), at, y)[1]
        parts = {n: float(getattr(masks, n).mean()) for n in ("heads", "groups", "tokens")}
        found.append({"t": t, **parts, "share": float(masks.share(model.config).mean())})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of models with routers")
    parser.add_argument("--full", default="digits", help="the model they come from")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fewer", type=int, nargs="*", default=[], help="numbers of full steps to compare with")
    parser.add_argument("--complete", action="store_true", help="also measure with nothing switched off")
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/dydit.json"))
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("full", "solver", "num", "repeats")}
    found: dict[str, Any] = {"settings": settings, "rows": []}
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        found = earlier if earlier["settings"] == settings else found
    wanted = [("full", args.full, args.steps), *((f"{n} full steps", args.full, n) for n in args.fewer)]
    wanted += [(m, m, args.steps) for m in args.models]
    done = {(row["name"], row["steps"]) for row in found["rows"]}
    for name, source, steps in wanted:
        if (name, steps) in done:
            continue
        model = pliant.load(source)
        row = measured(name, model, args, steps)
        if isinstance(model.network, DynamicDiT):
            row["by_time"] = share_by_time(model)
            row["training"] = model.metadata["training"]["config"]["objective"]
            if args.complete:
                row["complete"] = measured("complete", plain(model), args, steps)["distance"]
        found["rows"].append(row)
        write_json(args.output, found)
    full = found["rows"][0]
    print("| model | steps | networks | GFLOP/image | share | processor time | distance | class accuracy |")
    for row in found["rows"]:
        d, a = row["distance"], row["class_accuracy"]
        print(
            f"| {row['name']} | {row['steps']} | {row['networks']} | {row['flops'] / 1e9:.3f} "
            f"| {row['flops'] / full['flops']:.1%} | {row['seconds'] / full['seconds']:.0%} "
            f"| {d['mean']:.3f} ± {d['std'] or 0:.3f} | {a['mean']:.1%} |"
        )


if __name__ == "__main__":
    main()
