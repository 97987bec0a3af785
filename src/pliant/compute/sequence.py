"""Whether a sequence of calls can run: every value that is reused must have been written before."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from pliant.compute.cache import Streams
from pliant.compute.compute import Compute
from pliant.compute.lowering import Slot, lower, read_slots, write_slots
from pliant.compute.sites import parse_sites
from pliant.compute.tokens import Subset
from pliant.errors import PlanError, PliantError


@dataclass(frozen=True)
class PlannedCall:
    """One network call of a plan. label: what to call its step in messages. network: token grid and weights."""

    label: str
    compute: Compute
    streams: Streams
    network: Any
    sites: int


def check_calls(calls: Sequence[PlannedCall]) -> None:
    """Raise PlanError, naming the step and the missing write, unless every call finds what it reads.

    A gated call is sure to write the first time (there is nothing to compare with), later ones only perhaps.
    """
    _check_thresholds(calls)
    sure: dict[tuple[Any, Slot, str], int] = {}
    maybe: set[tuple[Any, Slot, str]] = set()
    for call in calls:
        try:
            lower(call.compute, call.sites)
        except PliantError as error:
            raise PlanError(f"{call.label}: {error}") from None
        compute, reuse = call.compute, call.compute.reuse
        need = 1 if reuse is None else reuse.order + 1
        places = read_slots(reuse, parse_sites(compute.sites)) if compute.sites else ()
        keys: Slot = ("kv", 0, call.sites)
        if isinstance(compute.tokens, Subset) and compute.tokens.rule != "router":
            places = (keys,)
        elif "kv" not in compute.write:  # keys and values must be those of the last call that ran all tokens
            for stream in call.streams:
                sure.pop((call.network, keys, stream), None)
        for slot in places:
            for stream in call.streams:
                have = sure.get((call.network, slot, stream), 0)
                if have < need:
                    raise PlanError(_missing(call, slot, stream, need, have))
        written = write_slots(compute, call.sites)
        for slot in written:
            for stream in call.streams:
                key = (call.network, slot, stream)
                if compute.gate is None or key not in maybe:
                    sure[key] = sure.get(key, 0) + 1
                if compute.gate is not None:
                    maybe.add(key)
        if compute.gate is not None:
            for slot in read_slots(reuse, parse_sites(compute.gate.on_hit)):
                for stream in call.streams:
                    if (call.network, slot, stream) not in sure:
                        raise PlanError(_missing(call, slot, stream, need, 0) + " (on a hit of its gate)")


def _check_thresholds(calls: Sequence[PlannedCall]) -> None:
    """Raise PlanError, naming the first such step, for a gate of which no change makes a full call.

    That is where changes of 100 % at every call since its first would not add up to its threshold.
    """
    places: dict[Hashable, list[PlannedCall]] = {}
    for call in calls:
        gate = call.compute.gate
        if gate is not None and not gate.never_hits and gate.unlimited:
            places.setdefault((gate.memory, gate.threshold), []).append(call)
    for found in places.values():
        gate, changes = found[0].compute.gate, len(found) - 1
        assert gate is not None
        each = max(1.0, *(gate.rescaled(share / 16) for share in range(17)))  # fits may fall where nothing was measured
        most = each * changes if gate.accumulate else each
        if changes > 0 and gate.threshold > most:
            raise PlanError(
                f"{found[0].label}: a gate with threshold {gate.threshold:g} never recomputes: changes of 100 % at all "
                f"its calls come to {most:g}; lower it, or give max_run"
            )


def _missing(call: PlannedCall, slot: Slot, stream: str, need: int, have: int) -> str:
    kind, first, last = slot
    what = {
        "branch": f"the branch of site {first}",
        "increment": f"the branch of site {first} and what its correction needs",
        "span": f"span({first},{last})",
        "out": "the whole output",
        "drift": "output minus input",
        "state": "the state before the head",
        "kv": "keys and values",
    }[kind.partition("(")[0]]
    write = {"span": f"span({first},{last})"}.get(kind, kind)
    whose = {"cond": "", "null": " of the unconditional stream"}.get(stream, f" of stream {stream!r}")
    times = "" if need == 1 else f" {need} times (it did {have})"
    if kind == "kv":
        return (
            f"{call.label}: computes some tokens against keys and values{whose} that the last full step on the same "
            f'token grid did not keep; give that step write=["kv"]'
        )
    return (
        f"{call.label}: reuses {what}{whose}, but no earlier step on the same token grid kept it{times}; give earlier "
        f'steps write=["{write}"]'
    )
