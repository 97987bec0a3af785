"""The other models that an objective looks at while one trains: frozen teachers and the running average."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from pliant.denoiser import Denoiser
from pliant.plans import Plan, Sampler
from pliant.training.ema import EMA

T = TypeVar("T")


def prepared(objective: T, denoiser: Denoiser, ema: EMA) -> T:
    """The objective with its teachers on the denoiser's device and its `average`, if it has that field, filled in."""
    if not is_dataclass(objective):
        return objective
    for teacher in teachers(objective):
        teacher.to(denoiser.device)
        teacher.network.requires_grad_(False).eval()
    return _with_average(objective, averaged(denoiser, ema)) if _wants_average(objective) else objective


def _wants_average(value: object) -> bool:
    """Whether the objective, or one inside it, has a field `average`."""
    if not is_dataclass(value) or isinstance(value, type | Denoiser):
        return False
    return any(f.name == "average" or _wants_average(getattr(value, f.name)) for f in fields(value))


def _with_average(value: T, average: Denoiser) -> T:
    changed = {}
    for f in fields(value):  # type: ignore[arg-type]
        if f.name == "average":
            changed["average"] = average
        elif _wants_average(getattr(value, f.name)):
            changed[f.name] = _with_average(getattr(value, f.name), average)
    return replace(value, **changed)  # type: ignore[type-var]


def teachers(value: object) -> list[Denoiser]:
    """All denoisers in the fields of a dataclass, and of the dataclasses and tuples in its fields."""
    if isinstance(value, Denoiser):
        return [value]
    if isinstance(value, tuple | list):
        return [found for part in value for found in teachers(part)]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    return [found for field in fields(value) for found in teachers(getattr(value, field.name))]


def companions(value: object) -> list[nn.Module]:
    """All modules in the fields of a dataclass and of dataclasses in them: what trains beside the network."""
    if isinstance(value, nn.Module):
        return [value]
    if not is_dataclass(value) or isinstance(value, type | Denoiser):
        return []
    return [found for field in fields(value) for found in companions(getattr(value, field.name))]


def averaged(denoiser: Denoiser, ema: EMA) -> Denoiser:
    """A second denoiser whose trainable parameters *are* the averages: it follows them without copying. Eval mode."""
    network = copy.deepcopy(denoiser.network).requires_grad_(False).eval()
    parameters = dict(network.named_parameters())
    for name, average in ema.averages.items():
        parameters[name].data = average
    return replace(denoiser, network=network, forward=None)


@dataclass(eq=False)
class Runner:
    """A frozen teacher's plan, made ready at its first use and run on any number of batches."""

    teacher: Denoiser
    plan: Plan
    _sampler: Sampler | None = field(default=None, repr=False)

    def __call__(self, labels: Tensor, x: Tensor) -> Tensor:
        """Where states x (B, C, H, W) at the plan's start end, float32, without gradient."""
        if self._sampler is None:
            self._sampler = Sampler(self.teacher, self.plan)
        with torch.autocast(x.device.type, enabled=False):
            return self._sampler(labels, [0] * len(labels), x=x).float()

    @property
    def start_scale(self) -> float:
        """What unit noise is multiplied with to be a start state, as in seeded sampling."""
        start = self.teacher.path.alpha_sigma(self.plan.times[0])
        return float(torch.hypot(start.alpha, start.sigma))
