"""Plans, and the one loop that runs them."""

from pliant.plans.batching import Batcher, Progress, Request, sample_together, steps_together
from pliant.plans.budget import Budget, parse_budget
from pliant.plans.cost import PlanCost, RunCost
from pliant.plans.gradients import Gradients, differentiable_sample, sample_with_gradients
from pliant.plans.mcmc import DenoisingMCMC, geometric_levels
from pliant.plans.plan import Plan, Step
from pliant.plans.presets import turbo, uniform, weak_to_powerful, weakest
from pliant.plans.routed import AnyPlan, RoutedPlans, load_plan, read_plan
from pliant.plans.sampling import RoutedSampler, Sampler, sample, sample_steps

__all__ = [
    "AnyPlan",
    "Batcher",
    "Budget",
    "DenoisingMCMC",
    "Gradients",
    "Plan",
    "PlanCost",
    "Progress",
    "Request",
    "RoutedPlans",
    "RoutedSampler",
    "RunCost",
    "Sampler",
    "Step",
    "differentiable_sample",
    "geometric_levels",
    "load_plan",
    "parse_budget",
    "read_plan",
    "sample",
    "sample_steps",
    "sample_together",
    "sample_with_gradients",
    "steps_together",
    "turbo",
    "uniform",
    "weak_to_powerful",
    "weakest",
]
