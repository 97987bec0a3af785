"""The other models that an objective looks at while one trains: frozen teachers and the running average."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

from pliant.denoiser import Denoiser
from pliant.training.ema import EMA

T = TypeVar("T")


def prepared(objective: T, denoiser: Denoiser, ema: EMA) -> T:
    """The objective with its teachers on the denoiser's device and its `average`, if it has that field, filled in."""
    if not is_dataclass(objective):
        return objective
    for teacher in teachers(objective):
        teacher.to(denoiser.device)
        teacher.network.requires_grad_(False).eval()
    if any(field.name == "average" for field in fields(objective)):
        return replace(objective, average=averaged(denoiser, ema))  # type: ignore[type-var]
    return objective


def teachers(value: object) -> list[Denoiser]:
    """All denoisers in the fields of a dataclass, and of the dataclasses in its fields."""
    if isinstance(value, Denoiser):
        return [value]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    return [found for field in fields(value) for found in teachers(getattr(value, field.name))]


def averaged(denoiser: Denoiser, ema: EMA) -> Denoiser:
    """A second denoiser whose trainable parameters *are* the averages: it follows them without copying. Eval mode."""
    network = copy.deepcopy(denoiser.network).requires_grad_(False).eval()
    parameters = dict(network.named_parameters())
    for name, average in ema.averages.items():
        parameters[name].data = average
    return replace(denoiser, network=network, forward=None)
