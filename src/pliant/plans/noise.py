"""Per-sample randomness: image k depends on its own seed only, never on its batch, its device or its process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.paths import Path
from pliant.solvers import Node


def seeded_noise(seed: int, slot: int, shape: Sequence[int], path: Path | None = None) -> Tensor:
    """Standard normal float32 (CPU) for one sample. slot -1 is the start state, slot k >= 0 a program's noise k.

    path: whose law of noise to use instead (PFGM++'s start states); on Gaussian paths the numbers are the same.
    """
    if slot < 0:
        mixed = seed
    else:
        mixed = int.from_bytes(hashlib.blake2b(f"{seed}/{slot}".encode(), digest_size=8).digest(), "little") >> 1
    generator = torch.Generator().manual_seed(mixed)
    if path is not None:
        return path.sample_noise((1, *shape), generator)[0]
    return torch.randn(tuple(shape), generator=generator)


def batch_noise(
    seeds: Sequence[int], slot: int, shape: Sequence[int], device: torch.device, path: Path | None = None
) -> Tensor:
    """(B, *shape): one independent draw per seed."""
    return torch.stack([seeded_noise(s, slot, shape, path) for s in seeds]).to(device)


def start_state(
    start: Node, seeds: Sequence[int], shape: Sequence[int], device: torch.device, path: Path, mu: Tensor | None = None
) -> Tensor:
    """(B, *shape): seeded states at the node `start`. mu: (B, *shape), what a path with an offset drifts to.

    For data of unit variance the spread is the path's own: 1 on variance-preserving paths. With an offset, data is
    taken to be mu, the best guess of it (as IR-SDE starts, arXiv 2301.11699).
    """
    noise = batch_noise(seeds, -1, shape, device, path)
    if mu is None:
        return noise * (start.alpha**2 + start.sigma**2) ** 0.5
    return (start.alpha + start.beta) * mu.to(noise.dtype) + start.sigma * noise


def check_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """One non-negative integer per sample. Raises PlanError otherwise."""
    values = [int(s) for s in seeds]
    if len(values) != count:
        raise PlanError(f"{count} labels need {count} seeds, got {len(values)}")
    if any(not 0 <= s < 2**63 for s in values):
        raise PlanError(f"seeds are integers from 0 to 2**63-1, got {min(values)}")
    return values
