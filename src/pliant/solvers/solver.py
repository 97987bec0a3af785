"""What a solver is: a value that writes one step of a program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

from pliant.solvers.builder import ProgramBuilder


class Solver(ABC):
    """Base of all solvers, which are frozen dataclasses: hashable, serialisable. Options are their fields.

    Beside `emit` a solver states what it is; the order tests hold it to that.
    """

    @property
    def name(self) -> str:
        """What users type: the registry's name for these options."""
        from pliant.solvers.registry import name_of

        return name_of(self)

    @property
    def form(self) -> str:
        """The form (`coefficients.FORMS`) it interpolates in."""
        raise NotImplementedError  # pragma: no cover - every solver says so

    @property
    def convergence(self) -> int:
        """Global order on a smooth problem, well started; for stochastic solvers that of the marginal variance."""
        raise NotImplementedError  # pragma: no cover

    @property
    def evaluations_per_step(self) -> int:
        """Network calls of a regular step."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise (such a solver cannot run from data to noise)."""
        return False

    @abstractmethod
    def emit(self, builder: ProgramBuilder, i: int) -> None:
        """Write the step from `builder.nodes[i]` to `builder.nodes[i+1]` and advance the current state."""

    def to_config(self) -> dict[str, Any]:
        """`{"name": ..., options}`; `get_solver` is the inverse."""
        options: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {"name": self.name, **options}
