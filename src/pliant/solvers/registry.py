"""Solvers by name. A new solver is one file and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from pliant.errors import PlanError, suggest
from pliant.solvers.ancestral import DDPM
from pliant.solvers.exponential import DDIM, DPMSolverPP2M
from pliant.solvers.runge_kutta import Euler, Heun, Midpoint
from pliant.solvers.sde import SiTSDE
from pliant.solvers.solver import Solver

SOLVERS: dict[str, type[Solver]] = {cls.name: cls for cls in (DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Midpoint, SiTSDE)}

SolverLike: TypeAlias = str | Mapping[str, Any] | Solver


def get_solver(spec: SolverLike) -> Solver:
    """A solver from its name, its config (`{"name": "ddim", "eta": 0.5}`) or itself.

    Raises PlanError for an unknown name or option, naming the nearest known one.
    """
    if isinstance(spec, Solver):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in SOLVERS:
        raise PlanError(f"unknown solver {name!r}: {suggest(str(name), SOLVERS)}")
    known = [f.name for f in fields(SOLVERS[name])]
    for option in options:
        if option not in known:
            takes = suggest(option, known) if known else "it takes none."
            raise PlanError(f"solver {name!r} has no option {option!r}: {takes}")
    return SOLVERS[name](**options)
