"""Planners: from a budget to a plan, against one measured objective, all returning the same `PlanResult`."""

from pliant.planning.distribution import FrechetObjective
from pliant.planning.objective import LEVEL, Objective, Remembered, Score
from pliant.planning.proxies import SampleError, TrajectoryError
from pliant.planning.registry import PLANNERS, Planner, get_planner
from pliant.planning.result import Candidate, PlanResult, Progress, confirm, frontier, planned
from pliant.planning.teacher import TeacherSettings, Trajectories, teacher_trajectories

__all__ = [
    "LEVEL",
    "PLANNERS",
    "Candidate",
    "FrechetObjective",
    "Objective",
    "PlanResult",
    "Planner",
    "Progress",
    "Remembered",
    "SampleError",
    "Score",
    "TeacherSettings",
    "Trajectories",
    "TrajectoryError",
    "confirm",
    "frontier",
    "get_planner",
    "planned",
    "teacher_trajectories",
]
