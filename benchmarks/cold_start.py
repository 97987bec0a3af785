"""What a user waits for in a fresh process, against diffusers: import, first image, peak memory. Interleaved.

    python benchmarks/cold_start.py [--rounds 3] [--json cold.json]

First image: DiT-S/2 (random weights, saved once to a temporary folder), class-conditional, guidance 1.5, 20 steps,
batch 1, from process start to the final latent. Pliant runs its default precision; diffusers its default (fp32) and
what it offers for speed (bf16 autocast).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

IMPORTS = {
    "torch": "import torch",
    "torch + pliant": "import torch, pliant",
    "torch + diffusers DiT": "import torch; from diffusers import DiTTransformer2DModel, DDIMScheduler",
}
PLIANT = """
import sys, pliant
model = pliant.load(sys.argv[1])
pliant.sample(model, pliant.Plan.uniform(model, 20, "ddim", guidance=1.5), [207])
"""
DIFFUSERS = """
import sys, torch
from diffusers import DiTTransformer2DModel, DDIMScheduler
model = DiTTransformer2DModel.from_pretrained(sys.argv[1])
scheduler = DDIMScheduler(clip_sample=False); scheduler.set_timesteps(20)
x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
labels = torch.tensor([207, 1000])
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
    for t in scheduler.timesteps:
        eps = model(torch.cat([x, x]), timestep=t.expand(2), class_labels=labels).sample[:, :4].float()
        cond, uncond = eps.chunk(2)
        x = scheduler.step(uncond + 1.5 * (cond - uncond), t, x).prev_sample
"""
TAIL = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def run(code: str, *arguments: str) -> tuple[float, float]:
    """(wall seconds, peak MB) of a fresh process."""
    import time

    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + TAIL, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return time.perf_counter() - start, int(done.stdout.strip().splitlines()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make = (
            "import sys, torch; from diffusers import DiTTransformer2DModel as M; torch.manual_seed(0);"
            "m = M(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,"
            "sample_size=32, patch_size=2, num_embeds_ada_norm=1000);"
            "[b.norm1.emb.load_state_dict(m.transformer_blocks[0].norm1.emb.state_dict())"
            " for b in m.transformer_blocks]; m.save_pretrained(sys.argv[1])"
        )
        run(make, folder)
        native = f"{folder}/native"
        run("import sys, pliant; pliant.save(pliant.load(sys.argv[1]), sys.argv[2])", folder, native)
        jobs = {f"import {name}": (code, ()) for name, code in IMPORTS.items()}
        jobs["first image, pliant"] = (PLIANT, (native,))
        jobs["first image, diffusers fp32"] = (DIFFUSERS.replace("AUTOCAST", "False"), (folder,))
        jobs["first image, diffusers bf16 autocast"] = (DIFFUSERS.replace("AUTOCAST", "True"), (folder,))
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, (code, arguments) in jobs.items():
                seen[name].append(run(code, *arguments))
    rows = {
        name: {"seconds": statistics.median(s for s, _ in v), "peak_mb": statistics.median(m for _, m in v)}
        for name, v in seen.items()
    }
    for name, row in rows.items():
        print(f"{name:40s} {row['seconds']:6.2f} s  {row['peak_mb']:6.0f} MB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
