"""What `compile: true` saves a training step: forward and backward of a DiT and of the flexible backbone, plain and compiled.

    OMP_NUM_THREADS=1 python benchmarks/compiled_training.py [--networks dit flexible] [--rounds 6] [--device cuda]

Blocks are compiled one by one, as in training; no optimizer. Medians; on a CPU with one thread in processor time, else in
wall time. The first compiled call is given apart, in wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pliant.models.dit import DiT, DiTConfig
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer


def network_and_images(name: str, depth: int) -> tuple[nn.Module, Tensor]:
    """An untrained network of width 384 with weights of normal size, and a batch of about its usual tokens."""
    torch.manual_seed(0)
    sizes = {"width": 384, "depth": depth, "heads": 6}
    network: nn.Module
    if name == "dit":
        network = DiT(DiTConfig(input_size=(32, 32), patch_size=(2, 2), learn_sigma=False, **sizes))  # type: ignore[arg-type]
        images = torch.randn(4, 4, 32, 32)
    else:
        network = FlexibleTransformer(
            FlexibleConfig(input_size=(24, 18), patch_sizes=((2, 2),), in_channels=32, **sizes)  # type: ignore[arg-type]
        )
        images = torch.randn(6, 32, 24, 18)
    for p in network.parameters():
        p.data.normal_(std=0.02)
    return network, images


def seconds(step: Callable[[], None], rounds: int, device: str) -> float:
    """Median of a step."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    found = []
    for _ in range(rounds):
        begun = clock()
        step()
        found.append(clock() - begun)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=("dit", "flexible"), default=["dit", "flexible"])
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for name in args.networks:
        for precision in ("bf16", "fp32"):
            network, images = network_and_images(name, args.depth)
            network, images = network.to(args.device), images.to(args.device)
            t, labels = (1000 * torch.rand(len(images))).to(images), torch.arange(len(images), device=images.device)

            def step(
                network: nn.Module = network, images: Tensor = images, t: Tensor = t, labels: Tensor = labels,
                bf16: bool = precision == "bf16",
            ) -> None:  # fmt: skip
                with torch.autocast(args.device, dtype=torch.bfloat16, enabled=bf16):
                    loss = network(images, t, labels).square().mean()
                loss.backward()
                network.zero_grad()
                loss.item()  # waits for the device

            step()
            plain = seconds(step, args.rounds, args.device)
            for block in network.blocks:  # type: ignore[union-attr]
                block.compile()
            begun = time.perf_counter()
            step()
            first = time.perf_counter() - begun
            compiled = seconds(step, args.rounds, args.device)
            print(
                f"{name:9s} {precision}: plain {plain:.4f} s, compiled {compiled:.4f} s ({plain / compiled:.2f}x), first call "
                f"{first:.1f} s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
