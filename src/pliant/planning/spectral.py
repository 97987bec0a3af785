"""The weak-to-powerful switch predicted from the data's power spectrum: a closed form, no search (sheet H, 1).

A weak patch of r pixels sees the image up to 1/r of the full Nyquist frequency. While the noise is so strong that a
coefficient at that frequency cannot be told from noise, `t > t*`, the powerful network would only repeat the noise
there: SPEED's formula gives t* from the power at the weak mode's Nyquist frequency and a tolerance delta.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.compute.spectra import Spectrum
from pliant.denoiser import Denoiser
from pliant.evaluation.spectrum import coarse_steps, coefficient_power, radial, switch_times
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import planner_seeds
from pliant.planning.task import Task
from pliant.planning.teacher import labels_of
from pliant.plans import Plan, sample, weak_to_powerful, weakest
from pliant.solvers import SolverLike

DELTAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
DELTA = 0.05
"""Taken where no objective chooses among `DELTAS`."""


@planner
def spectral(
    request: Request,
    *,
    solver: SolverLike = "dpmpp-2m",
    spectrum: Spectrum | None = None,
    images: Tensor | None = None,
    deltas: Sequence[float] | None = None,
) -> PlanResult:
    """For every delta the switch time t*, and as many steps as the budget then pays for, weak above t*.

    spectrum: of the data on the model's grid; None: measured on `images` (N, C, H, W), as the network sees them, and
    without images on 64 samples of the model itself. deltas: default: `DELTAS` if an objective chooses among them,
    else `DELTA` alone. Raises PlanError for a model without weak patches, or a budget below the cheapest plan.
    """
    task = request.task("spectral", solver=str(solver))
    model, weak = task.model, weakest(task.model)
    if spectrum is None:
        spectrum = spectrum_of(task, request.seed) if images is None else radial(coefficient_power([images]))
    chosen = deltas or (DELTAS if task.objective is not None else (DELTA,))
    plans, switches = [], {}
    for delta in chosen:
        switch = weak_until(model, spectrum, delta)
        switches[f"{delta:g}"] = switch
        plan = longest(task, switch, solver)
        if plan is not None:
            plans.append(plan)
    if not plans:
        raise task.too_small(Plan.uniform(model, 1, solver, weak, task.cfg))
    task.consider_all(plans)
    return task.finish(spectrum=spectrum.to_config(), switch_times=switches)


def weak_until(model: Denoiser, spectrum: Spectrum, delta: float) -> float:
    """t*: the house time above which the weakest patch is enough, at the coarse grid's own aligned time."""
    ratio = _ratio(model)
    size = (model.sample_shape[1], model.sample_shape[2])
    return switch_times(spectrum, size, [1.0 / ratio], delta, model.path)[0]


def longest(task: Task, switch: float, solver: SolverLike) -> Plan | None:
    """The plan of the most steps, weak while the aligned time is above `switch`, that the budget pays for, or None."""
    best = None
    for count in range(2, task.steps + 1):
        plan = switched(task, count, switch, solver)
        if not task.fits(plan):
            break
        best = plan
    return best


def switched(task: Task, count: int, switch: float, solver: SolverLike) -> Plan:
    """`count` steps of the default grid, weak first, as long as the criterion says."""
    model = task.model
    times = Plan.uniform(model, count, solver).times
    weak_steps = coarse_steps(times, [switch], [_ratio(model)], model.path)[0]
    return weak_to_powerful(model, count, weak_steps=weak_steps, solver=solver, guidance=task.guidance)


def spectrum_of(task: Task, seed: int, count: int = 64) -> Spectrum:
    """The radial power spectrum of what the model itself makes at full compute."""
    seeds = planner_seeds(seed, count, purpose=2)
    images = sample(task.model, task.full(), labels_of(task.model, seeds), seeds, 64)
    return radial(coefficient_power([images.to(torch.float64)]))


def _ratio(model: Denoiser) -> float:
    """Pixels of the weakest patch per pixel of the model's own, along one axis (geometric mean of both)."""
    height, width = model.coarse_ratio(weakest(model))
    return float(height * width) ** 0.5
