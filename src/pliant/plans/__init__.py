"""Plans, and the one loop that runs them."""

from pliant.plans.budget import Budget, parse_budget
from pliant.plans.cost import PlanCost
from pliant.plans.plan import Plan, Step
from pliant.plans.presets import uniform, weak_to_powerful, weakest
from pliant.plans.sampling import Sampler, sample, sample_steps

__all__ = [
    "Budget",
    "Plan",
    "PlanCost",
    "Sampler",
    "Step",
    "parse_budget",
    "sample",
    "sample_steps",
    "uniform",
    "weak_to_powerful",
    "weakest",
]
