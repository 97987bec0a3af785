"""What it costs that the C library gives freed memory back: fresh processes that keep it (`pliant.allocator`) and that do not.

    OMP_NUM_THREADS=1 python benchmarks/freed_memory.py --rounds 3

Every round starts, for each case, a process with PLIANT_KEEP_FREED_MB=0 and one with the default, in turn; each warms up
once and is then timed `--repeats` times. Processor seconds of a run, pages asked for in it, largest resident memory;
medians over the rounds, and the ratio's range.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from pliant.allocator import VARIABLE

PRESETS = {"taylorseer": {"interval": 5}, "icc": {"interval": 3, "rank": 43}}
CASES = {
    "digits": "digits model, 50 guided steps, batch 4",
    "plain": "DiT for 32x32, 10 guided steps, batch 4",
    "taylorseer": "the same, TaylorSeer every 5",
    "icc": "the same, increments every 3, rank 43",
    "training": "a training step of it, batch 16, autocast",
}


def work(case: str) -> Callable[[], object]:
    """What is timed. The larger network: patch 2, width 384, depth 12 (training: 3), untrained, bf16."""
    import pliant
    from pliant import Denoiser, DiT, DiTConfig, Plan
    from pliant.allocator import keep_freed_memory
    from pliant.paths import NetworkTime, get_path
    from pliant.plans import Sampler

    labels, seeds = list(range(4)), list(range(4))
    if case == "digits":
        digits = pliant.load("digits")
        sampler = Sampler(digits, Plan.uniform(digits, 50, guidance=1.5))
        return lambda: sampler(labels, seeds)
    torch.manual_seed(0)
    network = DiT(DiTConfig(
        input_size=(32, 32), patch_size=(2, 2), in_channels=3, width=384, depth=3 if case == "training" else 12, heads=6,
        num_classes=10, learn_sigma=False,
    ))  # fmt: skip
    if case == "training":
        keep_freed_memory()
        x, t, y = torch.randn(16, 3, 32, 32), 1000 * torch.rand(16), torch.arange(16) % 10

        def step() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = network(x, t, y).square().mean()
            loss.backward()
            network.zero_grad()

        return step
    model = Denoiser(network.requires_grad_(False), get_path("linear"), "velocity", NetworkTime(scale=1000.0))
    plan = Plan.uniform(model, 10, guidance=1.5)
    if case in PRESETS:
        plan = plan.cached(model, case, **PRESETS[case])
    sampler = Sampler(model, plan)
    return lambda: sampler(labels, seeds)


def timed(case: str, repeats: int) -> dict[str, float]:
    """Of this process."""
    run = work(case)
    run()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    begun = time.process_time()
    for _ in range(repeats):
        run()
    seconds = (time.process_time() - begun) / repeats
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "pages": (usage.ru_minflt - pages) / repeats, "megabytes": usage.ru_maxrss / 1024}


def in_a_process(case: str, repeats: int, keep: bool) -> dict[str, float]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != VARIABLE}
    done = subprocess.run(
        [sys.executable, __file__, "--case", case, "--repeats", str(repeats)], capture_output=True, text=True, check=True,
        env=settings if keep else {**settings, VARIABLE: "0"},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help="only this one, in this process, as JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(timed(args.case, args.repeats)))
        return
    print("| case | given back, s | kept, s | ratio [least, most] | pages | resident, MB |\n|---|---|---|---|---|---|")
    for case, name in CASES.items():
        pairs = [[in_a_process(case, args.repeats, keep) for keep in (False, True)] for _ in range(args.rounds)]
        ratios = [kept["seconds"] / given["seconds"] for given, kept in pairs]
        middle = [{k: statistics.median(p[i][k] for p in pairs) for k in pairs[0][i]} for i in (0, 1)]
        print(
            f"| {name} | {middle[0]['seconds']:.3f} | {middle[1]['seconds']:.3f} | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] | {middle[0]['pages']:,.0f} / {middle[1]['pages']:,.0f} | "
            f"{middle[0]['megabytes']:.0f} / {middle[1]['megabytes']:.0f} |", flush=True
        )  # fmt: skip


if __name__ == "__main__":
    main()
