"""Planners by name. A new planner is a function, and one line here."""

from __future__ import annotations

from pliant.errors import PlanError, suggest
from pliant.planning.auto import auto
from pliant.planning.autodiffusion import autodiffusion
from pliant.planning.boss import boss
from pliant.planning.dc_solver import dc_solver
from pliant.planning.flexiffusion import flexiffusion
from pliant.planning.gits import gits
from pliant.planning.joint import joint
from pliant.planning.ld3 import ld3
from pliant.planning.olss import olss
from pliant.planning.oss import oss
from pliant.planning.request import Planner
from pliant.planning.router import router
from pliant.planning.s3 import s3
from pliant.planning.spectral import spectral
from pliant.planning.weak_split import weak_split

PLANNERS: dict[str, Planner] = {
    "weak-split": weak_split,
    "boss": boss,
    "gits": gits,
    "oss": oss,
    "joint": joint,
    "spectral": spectral,
    "olss": olss,
    "dc-solver": dc_solver,
    "ld3": ld3,
    "s3": s3,
    "autodiffusion": autodiffusion,
    "flexiffusion": flexiffusion,
    "router": router,
    "auto": auto,
}


def get_planner(name: str) -> Planner:
    """A planner by name. Raises PlanError with the nearest one."""
    if name not in PLANNERS:
        raise PlanError(f"unknown planner {name!r}: {suggest(name, PLANNERS)}")
    return PLANNERS[name]
