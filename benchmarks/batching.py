"""Several requests at the same time on one model: together (`plans.batching`) against one after the other.

    python benchmarks/batching.py [--model digits|DiT-S/2|...] [--steps 10] [--rounds 5] [--json batching.json]

Each request is one image; "same": all with one plan, "mixed": steps, solvers and guidance differ from request to
request (and patch sizes, where the model has several). Medians of interleaved rounds: in each, both ways run in turn.
Requests per second, and network passes counted. Run with OMP_NUM_THREADS=1 for one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import pliant
from pliant.models import DiT
from pliant.paths import NetworkTime, get_path
from pliant.plans import Batcher, Plan, Request, Sampler


def the_model(name: str) -> pliant.Denoiser:
    if name == "digits":
        return pliant.load("digits")
    torch.manual_seed(0)
    network = DiT(pliant.DiTConfig.named(name)).eval()
    for p in network.parameters():
        p.data.normal_(std=0.02)
    return pliant.Denoiser(network, get_path("vp-discrete"), "epsilon", NetworkTime.timesteps())


def requests_of(model: pliant.Denoiser, count: int, steps: int, mixed: bool, precision: str) -> list[Request]:
    compute = pliant.Compute(precision=precision)
    plain = Plan.uniform(model, steps, "dpmpp-2m", compute, 2.0)
    kinds = [
        plain,
        Plan.uniform(model, steps + 2, "dpmpp-2m", compute),
        Plan.uniform(model, steps, {"name": "ddim", "eta": 1.0}, compute, 1.5),
        Plan.uniform(model, steps - 2, "dpmpp-2m", compute, 3.0),
    ]
    if len(model.patch_sizes) > 1:
        weak = pliant.Compute(patch=model.patch_sizes[-1], precision=precision)
        longer = kinds[1].steps
        kinds[1] = kinds[1].with_steps(replace(s, compute=weak) if i < 5 else s for i, s in enumerate(longer))
    return [Request(kinds[k % 4] if mixed else plain, [k % model.num_classes], [k]) for k in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = the_model(args.model)
    passes = [0]
    forward = DiT.forward_modulated

    def counted(self: DiT, x: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
        passes[0] += 1
        return forward(self, x, modulations)

    DiT.forward_modulated = counted  # type: ignore[method-assign]
    table = []
    for precision in args.precision:
        for mixed in (False, True):
            for count in args.counts:
                row = compare(model, requests_of(model, count, args.steps, mixed, precision), args.rounds, passes)
                row = {"precision": precision, "plans": "mixed" if mixed else "same", "requests": count, **row}
                print(
                    "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
                table.append(row)
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "steps": args.steps, "table": table}, indent=1))


def compare(model: pliant.Denoiser, requests: list[Request], rounds: int, passes: list[int]) -> dict[str, float]:
    """Both ways on prepared samplers: what a server does that keeps its plans lowered."""
    samplers = {id(r.plan): Sampler(model, r.plan) for r in requests}
    batcher = Batcher(model)

    def separate() -> list[torch.Tensor]:
        return [samplers[id(r.plan)](r.cond, r.seeds) for r in requests]  # type: ignore[arg-type]

    def together() -> list[torch.Tensor]:
        numbers = [batcher.add(r) for r in requests]
        final = {}
        while batcher.waiting:
            for progress in batcher.advance():
                if progress.last:
                    final[progress.request] = progress.result.x
        return [final[number] for number in numbers]

    ways: dict[str, Callable[[], list[torch.Tensor]]] = {"separate": separate, "together": together}
    results, counts = {}, {}
    for name, way in ways.items():  # warm
        passes[0] = 0
        results[name], counts[name] = way(), 0
        counts[name] = passes[0]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["separate"], seconds["together"], strict=True)]
    scale = max(float(x.abs().max()) for x in results["separate"])
    apart = max(float((a - b).abs().max()) for a, b in zip(results["separate"], results["together"], strict=True))
    return {
        "separate/s": len(requests) / statistics.median(seconds["separate"]),
        "together/s": len(requests) / statistics.median(seconds["together"]),
        "ratio": statistics.median(ratios),
        "passes separate": counts["separate"],
        "passes together": counts["together"],
        "difference": apart / scale,
    }


if __name__ == "__main__":
    main()
