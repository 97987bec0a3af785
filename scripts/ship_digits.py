"""Pack the trained digits model for shipping and write its card from measurements.

    pliant train configs/digits.yaml
    pliant train configs/digits-weak.yaml
    python scripts/ship_digits.py pack runs/digits-weak/model
    python benchmarks/quality.py digits --num 1500 --repeats 3 --batch 125 --output src/pliant/assets/digits/quality.json
    python benchmarks/weak_modes.py runs/digits/model runs/digits-weak-2000/model runs/digits-weak-average/model \
        --output src/pliant/assets/digits/weak_modes.json
    python scripts/ship_digits.py card --hardware "..." --date ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

import pliant

ASSET = Path(__file__).resolve().parents[1] / "src" / "pliant" / "assets" / "digits"


def pack(source: str) -> None:
    model = pliant.load(source)
    metadata = {"name": "digits", **{k: v for k, v in model.metadata.items() if k != "name"}}
    keep = {f.name: f.read_bytes() for f in ASSET.iterdir() if f.suffix in (".md", ".json", ".png")} if ASSET.exists() else {}
    keep.pop("config.json", None)
    pliant.save(replace(model, metadata=metadata), ASSET, dtype=torch.bfloat16)
    for name, content in keep.items():
        (ASSET / name).write_bytes(content)
    print(f"wrote {ASSET}")


def runs(folder: str) -> dict:  # type: ignore[type-arg]
    """Steps, last loss and mean speed of a training run."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    images = sum(line["images_per_second"] for line in steps) / len(steps)
    return {"steps": steps[-1]["step"], "loss": steps[-1]["loss"], "images_per_second": images}


def card(hardware: str, date: str) -> None:
    model = pliant.load(str(ASSET))
    rows = json.loads((ASSET / "quality.json").read_text())
    table = (ASSET / "quality.md").read_text()
    settings = rows["settings"]
    metric = next(iter(rows["rows"].values()))["report"]["metric"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    base, weak = runs("runs/digits"), runs("runs/digits-weak")
    parameters = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.network.base.parameters())  # type: ignore[union-attr]
    modes = json.loads((ASSET / "weak_modes.json").read_text())
    mode_rows = []
    for name, row in modes.items():
        distance = row["report"]["distance"]
        gap = [f"{row['gap'][t]:.4f}" if row["gap"] else "" for t in ("0.95", "0.8", "0.5", "0.1")]
        mode_rows.append(f"| {name} | {' | '.join(gap)} | {distance['mean']:.3f} ± {distance['std']:.3f} |")
    text = f"""---
license: apache-2.0
tags: [pliant, flow-matching, diffusion-transformer, flexible-compute]
---
# digits

A class-conditional flexible diffusion transformer for 8x8 handwritten digits: patch 1 (64 tokens, powerful) and patch 2
(16 tokens, weak). It ships with Pliant so that demo and tests need no network. Rectified flow, velocity prediction.

- **Data**: scikit-learn's `load_digits` (1,797 images; the UCI "Optical recognition of handwritten digits" test set), all of it.
- **Size**: {own:,} parameters, and {parameters - own:,} of the weak mode (LoRA rank {model.network.spec.rank}), stored in bf16.
- **Training**: `pliant train configs/digits.yaml` ({base['steps']:,} steps of 64, final loss {base['loss']:.3f}), then
  `pliant train configs/digits-weak.yaml` ({weak['steps']:,} steps of 64, distilling the frozen powerful mode, final loss
  {weak['loss']:.3f}). Seed 0. {hardware}, {date}; about {base['images_per_second']:.0f} and
  {weak['images_per_second']:.0f} images/s on one core beside other work.
- **Use**: `pliant.load("digits")`. Not for anything but demonstration.

## Quality against compute

{metric}, {settings['num']:,} samples against all real digits, mean ± standard deviation over {settings['repeats']} disjoint sets
of seeds; solver {settings['solver']}, no guidance, all rows on the same seeds. "Class accuracy": how often the classifier sees the
digit that was asked for. Milliseconds: batches of 125, bf16, one core of the same machine, medians of interleaved runs. Made by `benchmarks/quality.py` (commit {commit}).

{table}
![distance against FLOPs](quality.png)

Distances of finite samples are biased upwards; they compare rows, not models. On 8x8 images fewer steps of a second-order
solver are hard to beat: see the rows of fewer full steps. Patch flexibility is expected to pay where images have more
spectral range.

## How the weak mode starts and what it learns

Mean square gap between weak and powerful velocity at four times (t = 1 is noise), and the distance when 20 of 50 steps are
weak first, {modes[next(iter(modes))]['report']['recipe'].get('images', 500)} samples per repeat, 2 repeats (`benchmarks/weak_modes.py`). "Trained" rows: 2,000 steps of the same distillation each (the shipped mode got 5,000).

| weak mode | t=0.95 | 0.8 | 0.5 | 0.1 | distance |
|---|---|---|---|---|---|
{chr(10).join(mode_rows)}
"""
    (ASSET / "README.md").write_text(text)
    print(f"wrote {ASSET / 'README.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("pack").add_argument("source")
    writer = verbs.add_parser("card")
    writer.add_argument("--hardware", default="2-core Intel Xeon (AMX), CPU only")
    writer.add_argument("--date", required=True)
    args = parser.parse_args()
    if args.verb == "pack":
        pack(args.source)
    else:
        card(args.hardware, args.date)


if __name__ == "__main__":
    main()
