"""Planners: from a budget to a plan, against one measured objective, all returning the same `PlanResult`."""

from pliant.planning.closed_form import known
from pliant.planning.defaults import default_objective
from pliant.planning.distribution import FrechetObjective
from pliant.planning.objective import LEVEL, Objective, Remembered, Score
from pliant.planning.planner import plan, search
from pliant.planning.proxies import SampleError, TrajectoryError
from pliant.planning.registry import PLANNERS, get_planner
from pliant.planning.relative import PooledFeatures, RelativeObjective
from pliant.planning.request import Planner
from pliant.planning.result import Candidate, PlanResult, Progress, confirm, frontier, planned
from pliant.planning.routing import PlanPolicy, Router
from pliant.planning.teacher import TeacherSettings, Trajectories, teacher_trajectories

__all__ = [
    "LEVEL",
    "PLANNERS",
    "Candidate",
    "FrechetObjective",
    "Objective",
    "PlanPolicy",
    "PlanResult",
    "Planner",
    "PooledFeatures",
    "Progress",
    "RelativeObjective",
    "Remembered",
    "Router",
    "SampleError",
    "Score",
    "TeacherSettings",
    "Trajectories",
    "TrajectoryError",
    "confirm",
    "default_objective",
    "frontier",
    "get_planner",
    "known",
    "plan",
    "planned",
    "search",
    "teacher_trajectories",
]
