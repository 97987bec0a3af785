"""Losses that make models: flow matching, DDPM, EDM, interpolants, the FlexiDiT recipes, exits, width, few steps."""

from pliant.training.objectives.any_size import AnySizeFlow
from pliant.training.objectives.base import Batch, Loss, Objective, SizedBatch, drop_labels
from pliant.training.objectives.consistency import Consistency
from pliant.training.objectives.ddpm import DDPM
from pliant.training.objectives.distill import PatchDistillation
from pliant.training.objectives.dydit import DynamicWidth, FlopsTarget
from pliant.training.objectives.edm import EDMLoss
from pliant.training.objectives.exits import ExitDistillation
from pliant.training.objectives.flow_guided import FlowGuided
from pliant.training.objectives.flow_matching import FlowMatching
from pliant.training.objectives.interpolant import InterpolantMatching
from pliant.training.objectives.mmd import mmd_squared
from pliant.training.objectives.phased import Phased
from pliant.training.objectives.rollout import RolloutDistillation
from pliant.training.objectives.segments import SegmentStraightening
from pliant.training.objectives.shared import MMDBootstrap, SharedPatches
from pliant.training.objectives.steps import StepDistillation
from pliant.training.objectives.token_routers import TokenDistillation

__all__ = [
    "DDPM",
    "AnySizeFlow",
    "Batch",
    "Consistency",
    "DynamicWidth",
    "EDMLoss",
    "ExitDistillation",
    "FlopsTarget",
    "FlowGuided",
    "FlowMatching",
    "InterpolantMatching",
    "Loss",
    "MMDBootstrap",
    "Objective",
    "PatchDistillation",
    "Phased",
    "RolloutDistillation",
    "SegmentStraightening",
    "SharedPatches",
    "SizedBatch",
    "StepDistillation",
    "TokenDistillation",
    "drop_labels",
    "mmd_squared",
]
