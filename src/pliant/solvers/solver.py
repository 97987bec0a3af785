"""What a solver is: a value that writes one step of a program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pliant.solvers.builder import ProgramBuilder


@dataclass(frozen=True)
class Solver(ABC):
    """Base of all solvers: frozen, hashable, serialisable.

    name: what users type. order: global order of convergence on a smooth problem (strong order of the
    deterministic part for stochastic ones). evaluations_per_step: network calls of a regular step.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    evaluations_per_step: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise (such a solver cannot run from data to noise)."""
        return False

    @abstractmethod
    def emit(self, builder: ProgramBuilder, i: int) -> None:
        """Write the step from `builder.nodes[i]` to `builder.nodes[i+1]` and advance the current state."""

    def to_config(self) -> dict[str, Any]:
        """`{"name": ..., options}`; `get_solver` is the inverse."""
        return {"name": self.name, **asdict(self)}
