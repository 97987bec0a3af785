"""Guidance: combining two predictions of one state."""

from pliant.guidance.combine import guide, guided
from pliant.guidance.guidance import AGAINST, Guidance, weak_scale
from pliant.guidance.rules import RULES, Banded, Damped, Linear, Memory, Projected, Rule, Tangential, Zero

__all__ = [
    "AGAINST",
    "RULES",
    "Banded",
    "Damped",
    "Guidance",
    "Linear",
    "Memory",
    "Projected",
    "Rule",
    "Tangential",
    "Zero",
    "guide",
    "guided",
    "weak_scale",
]
