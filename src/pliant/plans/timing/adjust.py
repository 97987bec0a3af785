"""A throughput table brought to the machine's present speed, by a few runs instead of a new measurement.

A machine that cools, throttles or is shared runs everything faster or slower than on the day of the table, by nearly
the same factor: a few runs say by which.
"""

from __future__ import annotations

import statistics
import time
from datetime import date

import torch

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.plans.engine import Weights
from pliant.plans.sampling import Sampler
from pliant.plans.timing.measure import default_computes
from pliant.plans.timing.pricing import Prices
from pliant.plans.timing.stepping import FEW, PASSES, SLOW, STEPS, Clock, Stopwatch, Turns, cycled
from pliant.plans.timing.table import Throughput, network_kind


def gauges(table: Throughput, model: Denoiser) -> dict[str, Sampler]:
    """Samplers of every kind of network of the table's, plain and guided. Raises PlanError if it knows none of the
    model's."""
    found, weights = dict[str, Sampler](), Weights()
    precisions = sorted({kind.rsplit(" ", 1)[-1] for kind in table.networks} - {"unmerged"})
    for compute in default_computes(model, precisions):
        kind = network_kind(model, compute)
        if kind in table.networks and kind not in found:
            slow = table.networks[kind]["call"].at(1) > SLOW
            steps = FEW if slow else STEPS
            found[kind] = cycled(model, [compute], steps, weights)
            if model.config.class_dropout > 0:
                found[f"{kind}, guided"] = cycled(model, [compute], steps, weights, Guidance.cfg(2.0))
    if not found:
        raise PlanError("this throughput table knows no patch size of the model; measure with 'pliant bench MODEL'")
    return found


@torch.no_grad()
def pace(table: Throughput, model: Denoiser, batch: int = 1, clock: Clock = time.perf_counter) -> float:
    """How many times as long these runs take now as the table says: their median. Takes about a second."""
    samplers = gauges(table, model)
    prices = Prices(table, model, batch)
    predicted = {kind: prices.plan(sampler.plan).seconds for kind, sampler in samplers.items()}
    turns = Turns(samplers, batch, Stopwatch(model.device, clock))
    for _ in range(PASSES):
        turns.go()
    taken = turns.medians()
    return statistics.median(sum(taken[kind]) / predicted[kind] for kind in samplers)


def adjusted(
    table: Throughput, model: Denoiser, batch: int = 1, clock: Clock = time.perf_counter
) -> Throughput:
    """The table times the machine's present `pace`; `measured` says so."""
    factor = pace(table, model, batch, clock)
    before = float(table.measured.get("adjusted", 1.0))
    facts = {"adjusted": float(f"{before * factor:.6g}"), "adjusted_on": date.today().isoformat()}
    return table.scaled(factor, facts)
