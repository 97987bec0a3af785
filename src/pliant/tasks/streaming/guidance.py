"""Which negative a stream is guided away from, and how many network rows that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from pliant.compute.numbers import is_number
from pliant.errors import ConfigError, suggest

Negative: TypeAlias = Literal["none", "self", "onetime", "full"]


@dataclass(frozen=True)
class StreamGuidance:
    """Away from which prediction, and how far. Every scale works as written; 1 guides nowhere.

    none: the conditional prediction as it is. self: the virtual negative of the input frame, no extra call.
    onetime: one unconditional row at the first level, its clean image serves all later levels.
    full: classifier-free guidance, every row twice.
    """

    negative: Negative = "none"
    scale: float = 1.2
    delta: float = 1.0
    """Moderates the virtual negative ("self" and "onetime")."""

    def __post_init__(self) -> None:
        known = get_args(Negative)
        if self.negative not in known:
            raise ConfigError(f"unknown stream guidance {self.negative!r}: {suggest(str(self.negative), known)}")
        for name, value in (("scale", self.scale), ("delta", self.delta)):
            if not is_number(value) or value < 0.0:
                raise ConfigError(f"the {name} of stream guidance is a number from 0, got {value!r}")
        if self.negative in ("none", "full") and self.delta != 1.0:
            raise ConfigError(f"delta moderates virtual negatives; guidance {self.negative!r} has none, leave it out")

    def rows(self, levels: int) -> int:
        """Network rows per tick and frame of a stream with so many levels, all of them busy."""
        return {"none": levels, "self": levels, "onetime": levels + 1, "full": 2 * levels}[self.negative]
