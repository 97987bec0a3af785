"""Losses that make models: flow matching, DDPM, the two FlexiDiT recipes, early exits, and routed width."""

from pliant.training.objectives.base import Batch, Loss, Objective, drop_labels
from pliant.training.objectives.ddpm import DDPM
from pliant.training.objectives.distill import PatchDistillation
from pliant.training.objectives.dydit import DynamicWidth, FlopsTarget
from pliant.training.objectives.exits import ExitDistillation
from pliant.training.objectives.flow_matching import FlowMatching
from pliant.training.objectives.mmd import mmd_squared
from pliant.training.objectives.shared import MMDBootstrap, SharedPatches
from pliant.training.objectives.token_routers import TokenDistillation

__all__ = [
    "DDPM",
    "Batch",
    "DynamicWidth",
    "ExitDistillation",
    "FlopsTarget",
    "FlowMatching",
    "Loss",
    "MMDBootstrap",
    "Objective",
    "PatchDistillation",
    "SharedPatches",
    "TokenDistillation",
    "drop_labels",
    "mmd_squared",
]
