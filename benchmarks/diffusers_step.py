"""ProgramScheduler.step against diffusers' own scheduler for the same solver, in one run.

    python benchmarks/diffusers_step.py [--rounds 5] [--json step.json]

Time per step without the network, the best of `rounds` runs of 50 steps, on the latents of one 256-pixel image and of
four 1024-pixel ones. Below 1 Pliant is faster.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import diffusers
import torch

from pliant.integrations import ProgramScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
PAIRS = [
    ("DDIMScheduler", {"clip_sample": False, **SD}, "ddim"),
    ("DPMSolverMultistepScheduler", SD, "dpmpp-2m"),
    ("UniPCMultistepScheduler", SD, "unipc-2"),
    ("EulerDiscreteScheduler", SD, "euler-edm"),
    ("FlowMatchEulerDiscreteScheduler", {}, "euler"),
]
SHAPES = [(1, 4, 32, 32), (4, 4, 128, 128)]


def microseconds(scheduler: Any, shape: tuple[int, ...], rounds: int) -> float:
    """The best time of one step."""
    start, output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(rounds):
        scheduler.set_timesteps(50)
        x, began = start, time.perf_counter()
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, return_dict=False)[0]
        best = min(best, (time.perf_counter() - began) / len(scheduler.timesteps))
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for name, config, solver in PAIRS:
            theirs = getattr(diffusers, name)(**config)
            ours = ProgramScheduler.from_config(theirs.config, solver=solver)
            peer, mine = (microseconds(s, shape, args.rounds) for s in (theirs, ours))
            rows.append({"shape": shape, "diffusers": name, "solver": solver, "peer_us": peer, "us": mine})
            print(f"{shape!s:18} {name:32} {peer:8.0f} us   {solver:10} {mine:8.0f} us   {mine / peer:5.2f}x")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
