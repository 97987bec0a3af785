"""Seconds of plans before they run: a throughput table measured once per machine, and sums over it."""

from pliant.plans.timing.curve import Curve
from pliant.plans.timing.machine import Machine, this_machine
from pliant.plans.timing.pricing import PlanSeconds, Prices
from pliant.plans.timing.table import Throughput, cache_file, cached_table, model_key

__all__ = [
    "Curve",
    "Machine",
    "PlanSeconds",
    "Prices",
    "Throughput",
    "cache_file",
    "cached_table",
    "model_key",
    "this_machine",
]
