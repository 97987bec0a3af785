"""Caching presets for a diffusers transformer: a published rule and times in, one `Compute` per step out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pliant.compute import Compute
from pliant.compute.sequence import PlannedCall, check_calls
from pliant.compute.sites import format_sites, parse_sites
from pliant.errors import ConfigError, PlanError, suggest
from pliant.integrations.sites.base import BlockSites
from pliant.plans.caching import CACHING, Row, Target
from pliant.plans.caching.rows import Rule, trimmed


def cache_schedule(sites: BlockSites, times: Sequence[float], preset: str, **options: Any) -> list[Compute]:
    """What each step of a request runs: `cache_schedule(sites_of(transformer), times, "fbc", threshold=0.1)`.

    times: house time of every step, 1 is noise. Rules count blocks of two sites, attention and MLP; here blocks have
    the sites they have: cross-attention goes with the attention, a block that is one site is reused where both are.
    Raises ConfigError for unknown names and options, PlanError for a rule that these sites cannot follow.
    """
    rule = preset_rule(preset, options)
    rows = [fitted(row, sites) for row in rule(Target(tuple(times), 2 * len(sites.blocks)), **options)]
    computes = [
        Compute(sites=row.sites, reuse=row.reuse, write=row.write, gate=row.gate, tokens=row.tokens)
        for row in trimmed(mended(rows))
    ]
    check_schedule(sites, computes)
    return computes


def preset_rule(preset: str, options: Mapping[str, Any]) -> Rule:
    """A preset's rule, once its name and the names of its options are known. Raises ConfigError."""
    if preset not in CACHING:
        raise ConfigError(f"there is no caching preset {preset!r}; {suggest(str(preset), CACHING)}")
    rule = CACHING[preset].rule
    known = list(inspect.signature(rule).parameters.values())[1:]
    for name in options:
        if name not in [p.name for p in known]:
            raise ConfigError(
                f"caching preset {preset!r} has no option {name!r}; {suggest(name, [p.name for p in known])}"
            )
    for p in known:
        if p.default is inspect.Parameter.empty and p.name not in options:
            raise ConfigError(f"caching preset {preset!r} needs the option {p.name!r}")
    return rule


def check_schedule(sites: BlockSites, computes: Sequence[Compute]) -> None:
    """Raise PlanError, naming the step, unless these sites can run every compute and it finds what it reads."""
    for i, compute in enumerate(computes):
        asked = replace(compute, sites=None, reuse=None, write=(), gate=None)
        if asked != Compute():
            raise PlanError(
                f"step {i} asks for {asked.describe()}; diffusers transformers take sites, reuse, write and gate only"
            )
        if compute.has_increments:
            raise PlanError(f"step {i} asks for increments; those need Pliant's own DiT")
        if "kv" in compute.write:
            raise PlanError(f"step {i} keeps keys and values; those need Pliant's own DiT")
    check_calls([PlannedCall(f"step {i}", c, ("cond",), "net", len(sites.sites)) for i, c in enumerate(computes)])


def fitted(row: Row, sites: BlockSites) -> Row:
    """A row for blocks of two sites, as a row for these sites."""
    starts = sites.starts

    def at(site: int) -> int:
        if site % 2:
            raise PlanError(f"a rule cuts block {site // 2} in two, which these sites cannot follow")
        return starts[site // 2]

    def letters(text: str | None) -> str | None:
        if text is None:
            return None
        pairs = parse_sites(text)
        out = []
        for site in sites.sites:
            attention, mlp = pairs[2 * site.block], pairs[2 * site.block + 1]
            kinds = {"mlp": mlp, "block": attention if attention == mlp else "R"}
            out.append(kinds.get(site.kind, attention))
        return format_sites(out)

    spans = Compute(write=row.write).spans
    write = tuple(w for w in row.write if not w.startswith("span"))
    write += tuple(f"span({at(a)},{at(b)})" for a, b in spans)
    gate = row.gate
    if gate is not None:
        gate = replace(gate, on_hit=letters(gate.on_hit) or "", probe=at(gate.probe))
    text = letters(row.sites)
    reuse = row.reuse if gate is not None or (text is not None and "C" in text) else None
    return replace(row, sites=text, write=write, gate=gate, reuse=reuse)


def mended(rows: Sequence[Row]) -> list[Row]:
    """The rows, each of which finds what it reads: full where nothing was kept, a lower order where less was."""
    full = next((row for row in rows if row.write), Row())
    out: list[Row] = []
    kept = 0
    for row in rows:
        if row.gate is None and "C" in (row.sites or ""):
            if kept == 0:
                row = full if full.gate is None else replace(full, gate=replace(full.gate, threshold=0.0))
            elif row.reuse is not None and row.reuse.order >= kept:
                row = replace(row, reuse=replace(row.reuse, order=kept - 1))
        if row.write and (row.gate is None or row.gate.never_hits or kept == 0):
            kept += 1
        out.append(row)
    return out
