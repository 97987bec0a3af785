"""How good is a weak mode before and after training, for each initialisation?

    python benchmarks/weak_modes.py BASE [TRAINED ...] --data digits --extractor digits-classifier

BASE is a model; it is flexified afresh with every initialisation and position rule and measured untrained. TRAINED are
flexible models fine-tuned from it. Printed per model: mean square gap between weak and powerful velocity at several
times, and the Fréchet distance when 40 % of 50 steps run weak first (see the recipe in the output file).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import pliant
from pliant.evaluation import digits, evaluate, from_uint8, get_extractor, images_from_parquet, load_reference
from pliant.files import write_json
from pliant.plans import Plan, Sampler, weakest

TIMES = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)


@torch.no_grad()
def gaps(model: pliant.Denoiser, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean square difference of the two modes' velocities on noised data, by time."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(images.shape, generator=generator)
    weak, out = weakest(model), {}
    for t in TIMES:
        x = model.path.mix(images, eps, t)
        difference = model(x, t, labels).to("velocity") - model(x, t, labels, weak).to("velocity")
        out[f"{t:g}"] = float(difference.square().mean())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("trained", nargs="*")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.4, help="share of the steps that is weak")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    base = pliant.load(args.base)
    models = {"powerful only": None}
    for init in ("average", "noise-aligned"):
        for position in ("center", "own"):
            name = f"untrained {init}, {position} positions"
            models[name] = pliant.flexify(base, [args.patch], initialisation=init, position=position)
    models |= {f"trained {Path(p).parent.name}": pliant.load(p) for p in args.trained}
    extractor = get_extractor(args.extractor)
    reference = load_reference(args.data, extractor)
    output = Path(args.output)
    rows = json.loads(output.read_text()) if output.exists() else {}
    data = digits("all") if args.data == "digits" else images_from_parquet(args.data)
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:256]
    images, labels = from_uint8(data.images[chosen]), data.labels[chosen].long()
    for name, model in models.items():
        if name not in rows:
            steps = 50
            if model is None:
                plan, gap = Plan.uniform(base, steps), {}
            else:
                plan = Plan.weak_to_powerful(model, steps, weak_steps=round(args.share * steps))
                gap = gaps(model, images, labels)
            sampler = Sampler(model or base, plan)
            report = evaluate(
                lambda y, s, run=sampler: run(y, s).clamp(-1, 1), reference, extractor, args.num,
                num_classes=base.num_classes, repeats=args.repeats, batch=100,
            )  # fmt: skip
            rows[name] = {"gap": gap, "report": report.to_dict()}
            write_json(output, rows)
        distance = rows[name]["report"]["distance"]
        text = "  ".join(f"{t}: {v:.4f}" for t, v in rows[name]["gap"].items())
        print(f"{name:45s} {distance['mean']:8.3f} ± {distance['std'] or 0:.3f}   {text}", flush=True)


if __name__ == "__main__":
    main()
