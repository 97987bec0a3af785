"""Throughput tables made up: every piece takes a known time, so that predictions can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.plans.timing import Curve, Throughput, model_key, this_machine
from pliant.plans.timing.table import network_kind

PIECES = {
    "attention": 3e-3,
    "mlp": 5e-3,
    "ends": 1e-3,
    "branch": 1e-5,
    "span": 2e-5,
    "forecast": 4e-6,
    "forecast more": 1e-6,
    "keep branch": 7e-6,
    "keep span": 9e-6,
    "gate residual": 1.1e-4,
    "gate input": 1.2e-4,
    "gate output": 1.3e-4,
    "keep keys": 1.4e-5,
    "subset": 1.5e-4,
    "keep increment": 1.6e-5,
    "corrected": 1.7e-4,
    "merge": 1.8e-4,
    "pool": 1.9e-4,
    "table": 1e-6,
    "start": 3e-4,
    "switch": 4e-5,
    "prepare": 0.25,
}
"""Seconds per row (of "prepare": once; "start", "switch": of a run's first call of a network, and after another's)."""
OUTSIDE = {"step": 2e-5, "guided": 3e-5, "update": 1e-5, "term": 2e-6, "noise": 4e-5, "begin": 5e-4}
"""Seconds per image."""


def line(per_row: float, constant: float = 0.0) -> Curve:
    return Curve((1.0, 16.0), (constant + per_row, constant + 16 * per_row))


def synthetic_table(
    model: Denoiser,
    precisions: tuple[str | None, ...] = (None, "fp32"),
    pieces: Mapping[str, float] = PIECES,
    faster: float = 0.25,
) -> Throughput:
    """Everything in proportion to its rows; coarser patches take `faster` of the own patch's time per site."""
    networks = {}
    depth = model.config.depth
    for precision in precisions:
        for patch in model.patch_sizes:
            scale = 1.0 if patch == model.config.patch_size else faster
            own = {**pieces, "attention": scale * pieces["attention"], "mlp": scale * pieces["mlp"]}
            own["call"] = own["ends"] + depth * (own["attention"] + own["mlp"])
            kind = network_kind(model, Compute(patch=patch, precision=precision))
            networks[kind] = {name: line(seconds) for name, seconds in own.items()}
    outside = {name: line(seconds) for name, seconds in OUTSIDE.items()}
    name = str(model.metadata.get("name", ""))
    return Throughput(this_machine(), model_key(model), name, networks, outside, {"date": "today"})


def foreign(table: Throughput) -> Throughput:
    """The same table as if another processor had made it."""
    return replace(table, machine=replace(table.machine, processor="Difference Engine No. 2"))
