"""The stochastic similarity filter: frames like the last processed one are skipped (StreamDiffusion)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pliant.compute.numbers import is_number, is_whole
from pliant.errors import ConfigError


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between two frames of one shape, at most 1; exactly 1 for equal ones, all-zero frames included."""
    a, b = a.detach().flatten().double(), b.detach().flatten().double()
    square = float(torch.dot(a, a) * torch.dot(b, b))
    if square == 0.0:
        return 1.0 if torch.equal(a, b) else 0.0
    return min(1.0, float(torch.dot(a, b)) / math.sqrt(square))


@dataclass(frozen=True)
class FilterState:
    """What the filter remembers: the last processed frame, skips since then, and how many frames it saw."""

    previous: Tensor | None = None
    skips: int = 0
    frames: int = 0


@dataclass(frozen=True)
class SimilarityFilter:
    """Skip with probability `max(0, (c - threshold) / (1 - threshold))`, c the cosine to the last processed frame.

    threshold: 0 to 1; 1 never skips. max_skip: once more than so many frames in a row were skipped, the next one is
    processed. The count of skips starts anew with every processed frame (the published code forgets to when chance,
    not the limit, lets a frame through). The same seed makes the same decisions.
    """

    threshold: float = 0.98
    max_skip: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"the similarity threshold lies between 0 and 1 (usual: 0.98), got {self.threshold!r}")
        if not is_whole(self.max_skip) or self.max_skip < 0:
            raise ConfigError(f"max_skip is a number of frames from 0, got {self.max_skip!r}")

    def skip_probability(self, similarity: float) -> float:
        """The chance that a frame of this cosine is skipped, 0 to 1."""
        if self.threshold >= 1.0:
            return 0.0
        return min(1.0, max(0.0, (similarity - self.threshold) / (1.0 - self.threshold)))

    def decide(self, state: FilterState, frame: Tensor) -> tuple[bool, FilterState]:
        """(whether to process this frame (any shape), what to remember)."""
        seen = state.frames + 1
        if state.previous is not None and state.previous.shape == frame.shape:
            chance = self.skip_probability(cosine(frame, state.previous))
            # The draw lies in (0, 1]: a chance of 0 never skips, a chance of 1 always does.
            if _draw(self.seed, state.frames) <= chance and state.skips <= self.max_skip:
                return False, replace(state, skips=state.skips + 1, frames=seen)
        return True, FilterState(frame, 0, seen)


def _draw(seed: int, place: int) -> float:
    """U(0, 1], for one frame of one stream."""
    digest = hashlib.blake2b(f"similarity/{seed}/{place}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest, "little") % 2**53 + 1) / 2**53
