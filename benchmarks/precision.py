"""Precision variants of a DiT against fp32 of the same round: seconds, ratio, error.

    python benchmarks/precision.py [--model DiT-S/2] [--tokens 16 64 256] [--batch 1 4] [--rounds 9]
        [--variants bf16 bf16-mixed int8d] [--json precision.json]

One call of the network below its conditioning (`forward_modulated`; modulations are tabled by the engine), random
weights. Every round runs all variants in turn and a ratio is taken within its round: medians of the ratios, with the
smallest and largest. With one thread, seconds are the process's CPU seconds. "error" is ||y - y_fp32|| / ||y_fp32 - x|| of the block stack (x its input, y its output): a
smoke test on random weights, not image quality. "first" is the first call's seconds, which holds all compilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pliant.models.dit import DiT, DiTConfig
from pliant.models.precision import known_precisions, variant


def random_network(name: str, side: int) -> DiT:
    """The named DiT with gates, biases and head that are not zero, on (side, side) latents."""
    torch.manual_seed(0)
    network = DiT(DiTConfig.named(name, input_size=side)).eval().requires_grad_(False)
    nn.init.normal_(network.modulation.weight, std=0.05)
    nn.init.normal_(network.modulation.bias, std=0.3)
    nn.init.normal_(network.head.weight, std=0.05)
    for parameter in network.blocks.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.05)
    return network


def stack(network: DiT, x: Tensor, modulations: Tensor) -> Tensor:
    for i, block in enumerate(network.blocks):
        x = block(x, modulations[:, 6 * i : 6 * i + 6])
    return x


def stack_error(network: DiT, exact: DiT, x: Tensor, t: Tensor, y: Tensor) -> float:
    """||y - y_fp32|| / ||y_fp32 - x|| over the blocks, both from the same tokens."""
    tokens, rows = exact.embed(x), exact.modulations(t, y)
    ours = stack(network, tokens.to(network.head.weight.dtype), rows.to(network.head.weight.dtype)).float()
    reference = stack(exact, tokens, rows)
    return float((ours - reference).norm() / (reference - tokens).norm())


def seconds(run: Callable[[], Tensor], repeats: int) -> float:
    # With one thread the processor's seconds are the calculation's own, whatever else the machine does meanwhile.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


@torch.inference_mode()
def measure(name: str, tokens: int, batch: int, variants: list[str], rounds: int) -> list[dict[str, object]]:
    """One row per variant."""
    side = DiTConfig.named(name).patch_size[0] * round(tokens**0.5)
    exact = random_network(name, side)
    x, t, y = torch.randn(batch, 4, side, side), torch.tensor([500.0]), torch.zeros(1, dtype=torch.long)
    networks = {key: variant(exact, key) for key in ["fp32", *variants]}
    runs, first = {}, {}
    for key, network in networks.items():
        rows = network.modulations(t, y)
        runs[key] = lambda network=network, rows=rows: network.forward_modulated(x, rows)
        start = time.perf_counter()
        runs[key]()
        first[key] = time.perf_counter() - start
        seconds(runs[key], 2)
    repeats = max(1, int(0.1 / seconds(runs["fp32"], 3)))
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(seconds(run, repeats))
    table = []
    for key in runs:
        ratios = [a / b for a, b in zip(times["fp32"], times[key], strict=True)]
        table.append(
            {
                "tokens": tokens,
                "batch": batch,
                "variant": key,
                "milliseconds": 1e3 * statistics.median(times[key]),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "error": stack_error(networks[key], exact, x, t, y),
                "first": first[key],
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--variants", nargs="+", default=[k for k in known_precisions() if k not in ("fp32", "own")]
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    print(f"{args.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| tokens | batch | variant | ms | faster than fp32 | error | first call, s |\n|---|---|---|---|---|---|---|")
    results = []
    for tokens in args.tokens:
        for batch in args.batch:
            for row in measure(args.model, tokens, batch, args.variants, args.rounds):
                results.append(row)
                print(
                    "| {tokens} | {batch} | {variant} | {milliseconds:.2f} | {ratio:.2f} [{lowest:.2f}, {highest:.2f}] "
                    "| {error:.1e} | {first:.1f} |".format(**row),
                    flush=True,
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
