"""The exact cost of a call that runs some sites, or some tokens: `cost.py`'s parts, site by site.

Adding a kept branch or span costs no matrix product, so reuse is free in every convention here.
"""

from __future__ import annotations

from dataclasses import replace

from pliant.compute.compute import Compute
from pliant.compute.cost import MATMUL, Convention, CostParts, TransformerShape, cost_parts
from pliant.compute.lowering import write_slots
from pliant.compute.reuse import branch_slot
from pliant.compute.sites import parse_sites
from pliant.compute.tokens import Merge, Pool, Subset
from pliant.errors import ConfigError


def spent_parts(shape: TransformerShape, compute: Compute, hit: bool = False) -> CostParts:
    """MACs of one image's call that spends `compute` on a network of this shape (an exit's block included).

    hit: the cost of a hit of the compute's gate; else that of a miss. Raises ConfigError for another number of sites.
    """
    whole = cost_parts(shape)
    if compute.plain:
        return whole
    letters = _letters(shape, compute, hit)
    if set(letters) == {"C"} and compute.reuse is not None and compute.reuse.kind in ("out", "drift"):
        nothing = CostParts(**dict.fromkeys(vars(whole), 0))
        looks_inside = hit and compute.gate is not None and compute.gate.signal != "output"
        return replace(nothing, patch_embed=whole.patch_embed) if looks_inside else nothing
    L, D, N = shape.depth, shape.width, shape.tokens
    side = D // shape.heads
    inner = [side * heads for heads in shape.block_heads or (shape.heads,) * L]
    hidden = list(shape.block_hidden or (shape.mlp_hidden,) * L)
    # Rows that queries, keys and the MLP have.
    queries = keys = rows = N
    similarity = 0
    routers = 0
    routed = isinstance(compute.tokens, Subset) and compute.tokens.rule == "router"
    if isinstance(compute.tokens, Subset):
        queries = rows = compute.tokens.count(N)
        if routed:
            routers = 2 * L * shape.router_hidden * (N * (D + 2) + D)
    elif isinstance(compute.tokens, Merge):
        queries = keys = compute.tokens.count(N)
        similarity = _similarity(shape, compute.tokens)
    attention = sum(width for i, width in enumerate(inner) if letters[2 * i] == "R")
    mlp = sum(width for i, width in enumerate(hidden) if letters[2 * i + 1] == "R")
    ends = N if routed else rows  # rows of the head
    rank = None if compute.reuse is None else compute.reuse.rank
    linears = shape.mlp_linears
    projections, products, seen = queries * 4 * D * attention, rows * linears * D * mlp, letters.count("R")
    if routed:  # keys and values of all tokens
        projections = (queries + N) * 2 * D * attention
    if rank:  # reused sites still multiply, by matrices of that rank, and attend
        again = [i for i in range(L) if letters[2 * i] == "C"]
        projections += queries * sum(3 * _low(rank, D, inner[i]) + _low(rank, inner[i], D) for i in again)
        attention += sum(inner[i] for i in again)
        again = [i for i in range(L) if letters[2 * i + 1] == "C"]
        products += rows * sum(_low(rank, D, hidden[i]) + _low(rank, hidden[i], D) for i in again)
        seen = len(letters)
    for s in _kept_increments(compute, 2 * L, hit):  # the first factors' products with what the layers see
        i, low = s // 2, compute.increment or 0
        if s % 2:
            products += rows * (_first(low, D, hidden[i]) + _first(low, hidden[i], D))
        else:
            projections += queries * (3 * _first(low, D, inner[i]) + _first(low, inner[i], D))
    norms, looks = seen * (N if routed else queries), 2 * queries * keys * attention
    if isinstance(compute.tokens, Pool):
        for s in (s for s, letter in enumerate(letters) if letter == "R"):
            few = compute.tokens.count(N, s)
            norms -= N - few
            if s % 2:
                products -= (N - few) * linears * D * hidden[s // 2]
            else:
                projections -= (N - few) * 4 * D * inner[s // 2]
                looks -= 2 * (N * N - few * few) * inner[s // 2]
    return CostParts(
        patch_embed=whole.patch_embed,
        self_projections=projections,
        self_attention=looks + similarity * letters[::2].count("R"),
        mlp=products,
        cross_projections=whole.cross_projections,
        cross_context=whole.cross_context,
        cross_attention=whole.cross_attention,
        lora=whole.lora,
        final=whole.final * ends // N,
        modulation=whole.modulation,
        embedders=whole.embedders,
        layer_norm=(norms + ends) * D,
        routers=routers,
    )


def spent_macs(shape: TransformerShape, compute: Compute, convention: Convention = MATMUL, hit: bool = False) -> int:
    """Multiply-adds of one image's call."""
    return spent_parts(shape, compute, hit).total(convention)


def _similarity(shape: TransformerShape, merge: Merge) -> int:
    """MACs of comparing every source with every destination, once per attention site."""
    if merge.count(shape.tokens) == shape.tokens:
        return 0
    ends = shape.tokens // merge.window**2  # of a grid that windows divide; a few less where they do not
    return (shape.tokens - ends) * ends * shape.width


def in_two_factors(rank: int, inputs: int, outputs: int) -> bool:
    """Whether a matrix's part of this rank costs less than the matrix itself."""
    return rank * (inputs + outputs) < inputs * outputs


def _low(rank: int, inputs: int, outputs: int) -> int:
    """MACs per row of a product with a matrix of this rank, in two factors or, where that is cheaper, in one."""
    return rank * (inputs + outputs) if in_two_factors(rank, inputs, outputs) else inputs * outputs


def _first(rank: int, inputs: int, outputs: int) -> int:
    """MACs per row of the product with the first of the two factors alone, if there are two."""
    return rank * inputs if in_two_factors(rank, inputs, outputs) else 0


def _kept_increments(compute: Compute, sites: int, hit: bool) -> list[int]:
    """Sites that keep increments; on a hit only the probe's, which run before the gate decides."""
    if compute.increment is None:
        return []
    kept = [s for kind, s, _ in write_slots(compute, sites) if kind == branch_slot(compute.increment)]
    return [s for s in kept if s < compute.gate.probe] if hit and compute.gate is not None else kept


def _letters(shape: TransformerShape, compute: Compute, hit: bool) -> str:
    """One letter per site of the network that runs."""
    total = 2 * shape.depth
    text = compute.gate.on_hit if hit and compute.gate is not None else compute.sites
    letters = "R" * total if text is None else parse_sites(text)
    if len(letters) != total:
        raise ConfigError(f"sites {text!r} is for {len(letters)} sites, this model has {total}")
    return letters
