"""A throughput table when one is needed: kept from before, or measured now and kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.plans.timing.measure import Advance, default_computes, measure
from pliant.plans.timing.table import Throughput, cache_file, cached_table, network_kind

logger = logging.getLogger("pliant")


def missing_kinds(table: Throughput | None, model: Denoiser, computes: Iterable[Compute]) -> list[Compute]:
    """Those computes whose kind of network the table does not know, one of each kind."""
    known = set() if table is None else set(table.networks)
    found: dict[str, Compute] = {}
    for compute in computes:
        kind = network_kind(model, compute)
        if kind not in known:
            found.setdefault(kind, compute)
    return list(found.values())


def ready_table(
    model: Denoiser, computes: Iterable[Compute] | None = None, advance: Advance | None = None
) -> Throughput:
    """The table of this model on this machine, with what these computes need (default: every patch size).

    What is missing is measured, which takes seconds to minutes, and kept for later runs of Pliant.
    """
    table = cached_table(model)
    wanted = list(default_computes(model) if computes is None else computes)
    # Pieces that all patch sizes share are measured at the own one; and who plans with one size soon asks for another.
    wanted += default_computes(model, sorted({c.precision for c in wanted}, key=str))
    missing = missing_kinds(table, model, wanted)
    if table is not None and not missing:
        return table
    logger.info("measuring how fast this machine runs %s", model.metadata.get("name") or "this model")
    fresh = measure(model, missing, advance=advance)
    table = fresh if table is None else table.with_more(fresh)
    try:
        table.save(cache_file(model))
    except OSError as error:
        logger.warning("the throughput table could not be kept (%s); it will be measured again", error)
    return table
