"""One network, trained once: patch sizes x sizes and aspect ratios x compute, on a model for any size of images.

    python benchmarks/any_size_quality.py MODEL --latents FOLDER --autoencoder WEIGHTS [--num 128] [--output OUT]

For every size the reference is training samples of that size (latents decoded, nothing cropped). Feature space:
the shipped CIFAR-10 classifier on the decoded images, because it works offline; it knows ten classes of 32x32 photos,
so its distances rank these settings and say little about absolute quality. Kernel distances (KID) are unbiased, which
matters with so few images; Fréchet distances are biased upwards, for all settings alike. "real" compares two halves
of the reference: what a perfect model would get. Writes OUT/any-size.json, .md and any-size.png (a sheet).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pliant
from pliant import imaging
from pliant.evaluation import FeatureStatistics, extract, frechet_distance, get_extractor, kernel_distance, to_uint8
from pliant.models.autoencoders import decoded, load_autoencoder
from pliant.models.network import Size, named
from pliant.plans import Plan
from pliant.training.data import LatentSet
from pliant.training.draws import Draws

Settings = dict[str, Plan]


def settings(model: pliant.Denoiser, steps: int, guidance: float) -> Settings:
    """Plans by name: every patch size at all and at half of the steps, and half the compute spent weak first."""
    fine, coarse = model.patch_sizes[:2]
    plans: Settings = {}
    for patch in (fine, coarse):
        for share, count in (("100 %", steps), ("50 %", steps // 2)):
            compute = pliant.Compute(patch=patch)
            name = f"patch {named(patch)}, {share} of its steps ({count})"
            plans[name] = Plan.uniform(model, count, "dpmpp-2m", compute, guidance, "resolution")
    plans["budget 50 %: coarse steps first"] = Plan.weak_to_powerful(
        model, steps, "50%", solver="dpmpp-2m", guidance=guidance, times="resolution"
    )
    return plans


def features(images: Tensor, network: Any) -> Tensor:
    return extract(network, to_uint8(images).split(64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--latents", required=True)
    parser.add_argument("--autoencoder", required=True)
    parser.add_argument("--sizes", nargs="+", default=["12x10", "10x12", "16x8"], help="of states")
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--reference", type=int, default=256, help="real images of a size, at most")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/any-size"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        torch.set_num_threads(1)
    model = pliant.load(args.model).to(args.device)
    autoencoder = load_autoencoder(args.autoencoder).to(args.device, torch.bfloat16)
    autoencoder = autoencoder.to(memory_format=torch.channels_last)
    data, network = LatentSet(args.latents), get_extractor("cifar10-classifier")
    rows: list[dict[str, Any]] = []
    for text in args.sizes:
        size: Size = tuple(int(n) for n in text.split("x"))
        here = (data.sizes == torch.tensor(size)).all(1).nonzero()[:, 0]
        if len(here) < 2:
            raise SystemExit(f"the data has {len(here)} samples of size {text}; choose sizes that it has")
        order = here[torch.randperm(len(here), generator=torch.Generator().manual_seed(args.seed))][: args.reference]
        real = [decode(model, autoencoder, read(data, part)) for part in order.split(64)]
        reference = features(torch.cat(real), network)
        half = min(args.num, len(reference) // 2)
        rows.append(row(text, "real", None, reference[:half], reference[half:], half, 0.0))
        # Classes as often as in the data of this size.
        labels = data.labels[order[torch.arange(args.num) % len(order)]]
        sized = model.at_size(size)
        for name, plan in settings(sized, args.steps, args.guidance).items():
            begun = time.process_time()
            latents = pliant.sample(sized, plan, labels, list(range(args.seed, args.seed + args.num)))
            seconds = (time.process_time() - begun) / args.num
            found = features(decode(model, autoencoder, latents), network)
            share = plan.cost(sized).flops
            rows.append(row(text, name, share, found, reference, args.num, seconds))
            print(rows[-1], flush=True)
    for part in rows:
        full = next(r["gflop"] for r in rows if r["size"] == part["size"] and r["gflop"] is not None)
        part["share"] = None if part["gflop"] is None else part["gflop"] / full
    facts = {**{k: str(v) for k, v in vars(args).items()}, "torch": str(torch.__version__), "rows": rows}
    (args.output / "any-size.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.output / "any-size.md").write_text(table(rows))
    sheet(model, autoencoder, args)
    print(table(rows))


def read(data: LatentSet, indices: Tensor) -> Tensor:
    return data.samples(indices, torch.zeros(len(indices), dtype=torch.bool), Draws.single(len(indices)))


def decode(model: pliant.Denoiser, autoencoder: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [decoded(autoencoder, part, model.metadata["latents"]).cpu() for part in latents.split(32)]
    return torch.cat(parts)


def row(
    size: str, name: str, flops: int | None, found: Tensor, reference: Tensor, num: int, seconds: float
) -> dict[str, Any]:
    distance = frechet_distance(FeatureStatistics.of(found), FeatureStatistics.of(reference))
    return {
        "size": size, "setting": name, "gflop": None if flops is None else flops / 1e9, "images": num,
        "reference": len(reference), "frechet": distance, "kid": kernel_distance(found, reference),
        "seconds_per_image": seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| size | setting | GFLOP per image | share | Fréchet | KID |", "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        cost = ("-", "-") if r["gflop"] is None else (f"{r['gflop']:.2f}", f"{r['share']:.1%}")
        lines.append(f"| {r['size']} | {r['setting']} | {' | '.join(cost)} | {r['frechet']:.2f} | {r['kid']:.4f} |")
    return "\n".join(lines) + "\n"


def sheet(model: pliant.Denoiser, autoencoder: Any, args: argparse.Namespace) -> None:
    """Sizes down, one class per column; each twice: full compute above, 50 % below, the same seeds."""
    columns, wide = min(8, model.num_classes), []
    for text in args.sizes:
        size = tuple(int(n) for n in text.split("x"))
        sized = model.at_size(size)
        plans = settings(sized, 2 * args.steps, args.guidance)
        first = next(iter(plans))
        for name in (first, "budget 50 %: coarse steps first"):
            latents = pliant.sample(sized, plans[name], list(range(columns)), list(range(columns)))
            pixels = imaging.to_pixels(decode(model, autoencoder, latents).clamp(-1, 1))
            wide.append(imaging.grid(pixels, columns))
    width = max(part.shape[2] for part in wide)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[2], 0, 8), value=255) for part in wide]
    (args.output / "any-size.png").write_bytes(imaging.encode_png(torch.cat(padded, dim=1)))


if __name__ == "__main__":
    main()
