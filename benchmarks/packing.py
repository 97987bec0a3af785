"""Seconds of a weak-guided pair of calls, packed in the ways of FlexiDiT's appendix (sheet A, 1.9), interleaved.

    python benchmarks/packing.py [--device cuda] [--models DiT-S/2 DiT-XL/2] [--images 1 4 8 32] [--rounds 7]

One powerful call (patch 2) and one weak call (patch 4) on the same images, unmerged LoRA rank 32. Medians, and ratios
to two separate calls.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import pliant
from pliant.adapters.packing import Call, choose_packing, packed_forward
from pliant.paths import NetworkTime, get_path

APPROACHES = ("separate", "joined", "rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["DiT-S/2"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in args.models:
        network = pliant.DiT(pliant.DiTConfig.named(name))
        model = pliant.Denoiser(network, get_path("vp-discrete"), "epsilon", NetworkTime.timesteps())
        flexible = pliant.flexify(model, [4]).network.to(device, dtype).eval()
        for n in args.images:
            x = torch.randn(n, 4, 32, 32, device=device, dtype=dtype)
            t, y = torch.full((n,), 500.0, device=device), torch.arange(n, device=device)
            calls = [Call(x, t, y, (2, 2)), Call(x, t, y, (4, 4))]
            seconds: dict[str, list[float]] = {a: [] for a in APPROACHES}
            with torch.inference_mode():
                for round_ in range(args.rounds + 1):  # the first round warms up
                    for approach in APPROACHES:
                        start = time.perf_counter()
                        packed_forward(flexible, calls, approach)  # type: ignore[arg-type]
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        if round_:
                            seconds[approach].append(time.perf_counter() - start)
            median = {a: statistics.median(v) for a, v in seconds.items()}
            text = "  ".join(f"{a} {1e3 * v:.1f} ms ({v / median['separate']:.2f})" for a, v in median.items())
            print(f"{name} n={n}: {text}; rule: {choose_packing(n, 256, 64, device)}", flush=True)


if __name__ == "__main__":
    main()
