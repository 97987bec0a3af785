"""Sites: a transformer as a straight list of residual branches, and what one call does with each.

A *site* is one residual branch of one block (attention, cross-attention or MLP); it does `x <- x + gate(f(x))`.
A network with M sites is steered by M letters, written in runs: "R4C16R4" runs four sites, reuses sixteen from the
cache and runs four (sheet E, sections 9 and 10.1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from pliant.errors import ConfigError

State: TypeAlias = tuple[Tensor, ...]
"""Token streams between sites: (image,) or (image, context), each (B, N, D)."""
Branch: TypeAlias = tuple[Tensor | None, ...]
"""What a site adds to each stream before its gate; None where it leaves a stream alone."""
Letter = Literal["R", "C", "K"]
"""R: run. C: reuse from the cache. K: skip, the branch contributes nothing."""


@dataclass(frozen=True)
class Site:
    """One residual branch. kind: "attention", "cross", "mlp" or "block" (one that cannot be split)."""

    kind: str
    block: int


class SiteModel(Protocol):
    """A transformer seen as sites. Holds no state: everything a call needs comes in and goes out."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """In order of execution."""
        ...

    def begin(self, *inputs: Any) -> tuple[State, Any]:
        """The network's inputs -> (tokens before site 0, context of the call: modulations, positions, text ...)."""
        ...

    def norm(self, s: int, state: State, context: Any) -> State:
        """What site s looks at: its normalised, modulated input."""
        ...

    def inner(self, s: int, seen: State, context: Any) -> Branch:
        """Site s on `norm`'s answer: the branch before its gate."""
        ...

    def traced(self, s: int, seen: State, rank: int, context: Any) -> Branch:
        """`inner`'s branch of a single stream, then what a later `corrected` of this rank needs of this call."""
        ...

    def corrected(self, s: int, seen: State, kept: Branch, rank: int, context: Any) -> Branch:
        """The branch of now from an earlier call's `traced`: every linear layer adds a low-rank part of its weight
        times the change of its input."""
        ...

    def add(self, s: int, state: State, branch: Branch, context: Any) -> State:
        """The state after site s: `x + gate * branch` on every stream that has one."""
        ...

    def run(self, first: int, last: int, state: State, context: Any) -> State:
        """Sites first..last-1 one after the other; bit-equal to norm, inner and add."""
        ...

    def head(self, state: State, context: Any) -> Tensor:
        """The network's output from the state after the last site."""
        ...


_RUN = re.compile(r"([RCK])([1-9]\d*)")


def parse_sites(text: str) -> str:
    """ "R2C3" -> "RRCCC". Raises ConfigError for anything that is not letters R, C, K with counts."""
    runs = _RUN.findall(text) if isinstance(text, str) else []
    if not text or "".join(letter + count for letter, count in runs) != text:
        raise ConfigError(
            f"sites {text!r} is not a list of runs such as 'R4C16R4' (R run, C reuse from the cache, K skip)"
        )
    return "".join(letter * int(count) for letter, count in runs)


def format_sites(letters: Sequence[str]) -> str:
    """ "RRCCC" -> "R2C3"."""
    out: list[tuple[str, int]] = []
    for letter in letters:
        if out and out[-1][0] == letter:
            out[-1] = (letter, out[-1][1] + 1)
        else:
            out.append((letter, 1))
    return "".join(f"{letter}{count}" for letter, count in out)


def runs(letters: str) -> list[tuple[Letter, int, int]]:
    """ "RRCCC" -> [("R", 0, 2), ("C", 2, 5)]."""
    found: list[tuple[Letter, int, int]] = []
    place = 0
    for letter, count in _RUN.findall(format_sites(letters)):
        found.append((letter, place, place + int(count)))
        place += int(count)
    return found
