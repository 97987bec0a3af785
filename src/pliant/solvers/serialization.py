"""Programs as JSON: exact floats, no unknown keys, no silent defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pliant.errors import FormatError, PlanError
from pliant.solvers.program import Eval, Instruction, LearnedNoise, Lin, Node, Program, Terms

VERSION = 1
T = TypeVar("T")


def program_to_dict(program: Program) -> dict[str, Any]:
    """The whole program as dicts, lists, strings and numbers. Python writes floats with `repr`: exact."""
    return {
        "version": VERSION,
        "path": dict(program.path),
        "stored": program.stored,
        "start": _node_to_dict(program.start),
        "end": _node_to_dict(program.end),
        "final": program.final,
        "labels": list(program.labels),
        "steps": [[_instruction_to_dict(op) for op in step] for step in program.steps],
    }


def program_from_dict(data: Mapping[str, Any]) -> Program:
    """Inverse of `program_to_dict`. Raises FormatError (wrong keys, types, version) or PlanError (cannot
    run).
    """
    fields = _fields(data, "program", "version", "path", "stored", "start", "end", "final", "labels", "steps")
    if fields["version"] != VERSION:
        raise FormatError(
            f"program version {fields['version']!r} is not supported; this Pliant reads version {VERSION}"
        )
    try:
        return Program(
            path=dict(fields["path"]),
            stored=fields["stored"],
            steps=tuple(tuple(_instruction_from_dict(op) for op in step) for step in fields["steps"]),
            start=_node_from_dict(fields["start"]),
            end=_node_from_dict(fields["end"]),
            final=int(fields["final"]),
            labels=tuple(str(label) for label in fields["labels"]),
        )
    except (FormatError, PlanError):
        raise
    except (TypeError, ValueError) as error:
        raise FormatError(f"program is damaged: {error}") from None


def _fields(data: Any, what: str, *names: str) -> dict[str, Any]:
    """`data` as a dict with exactly these keys."""
    if not isinstance(data, Mapping):
        raise FormatError(f"{what} should be an object with {', '.join(names)}, got {type(data).__name__}")
    unknown, missing = sorted(set(data) - set(names)), sorted(set(names) - set(data))
    if unknown or missing:
        parts = [f"unknown {unknown}" if unknown else "", f"missing {missing}" if missing else ""]
        raise FormatError(f"{what} has the wrong keys: {', '.join(filter(None, parts))}; expected {', '.join(names)}")
    return dict(data)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise FormatError(f"expected a number, got {value!r}")
    if isinstance(value, str) and value not in ("inf", "-inf"):
        raise FormatError(f"expected a number, got {value!r}")
    return float(value)


def _plain(value: float) -> float | str:
    """JSON has no infinity; derivatives at sigma = 0 can be infinite."""
    return value if math.isfinite(value) else str(value)


_NODE = ("t", "alpha", "sigma", "dalpha", "dsigma", "beta")


def _node_to_dict(node: Node) -> dict[str, Any]:
    return {name: _plain(getattr(node, name)) for name in _NODE}


def _node_from_dict(data: Any) -> Node:
    fields = _fields(data, "node", *_NODE)
    return Node(**{name: _number(fields[name]) for name in _NODE})


def _terms(value: Any) -> Terms:
    return tuple((int(index), _number(coefficient)) for index, coefficient in value)


def _optional(value: Any, read: Callable[[Any], T]) -> T | None:
    return None if value is None else read(value)


_LEARNED = ("slot", "output", "log_low", "log_high")


def _learned_from_dict(data: Any) -> LearnedNoise:
    f = _fields(data, "learned noise", *_LEARNED)
    return LearnedNoise(int(f["slot"]), int(f["output"]), _number(f["log_low"]), _number(f["log_high"]))


def _instruction_to_dict(op: Instruction) -> dict[str, Any]:
    if isinstance(op, Eval):
        call = {
            "op": "eval",
            "out": op.out,
            "state": op.state,
            "node": _node_to_dict(op.node),
            "step": op.step,
        }
        return call if op.lands is None else {**call, "lands": op.lands}
    return {
        "op": "lin",
        "out": op.out,
        "node": _node_to_dict(op.node),
        "x": [list(term) for term in op.x],
        "m": [list(term) for term in op.m],
        "z": [list(term) for term in op.z],
        "mu": op.mu,
        "learned": None if op.learned is None else {name: getattr(op.learned, name) for name in _LEARNED},
    }


def _instruction_from_dict(data: Any) -> Instruction:
    kind = data.get("op") if isinstance(data, Mapping) else None
    if kind == "eval":
        names = ("op", "out", "state", "node", "step")
        f = _fields(data, "eval", *names, *(("lands",) if "lands" in data else ()))
        lands = _optional(f.get("lands"), _number)
        return Eval(int(f["out"]), int(f["state"]), _node_from_dict(f["node"]), int(f["step"]), lands)
    if kind == "lin":
        f = _fields(data, "lin", "op", "out", "node", "x", "m", "z", "mu", "learned")
        return Lin(
            out=int(f["out"]),
            node=_node_from_dict(f["node"]),
            x=_terms(f["x"]),
            m=_terms(f["m"]),
            z=_terms(f["z"]),
            mu=_number(f["mu"]),
            learned=_optional(f["learned"], _learned_from_dict),
        )
    raise FormatError(f"an instruction should have op 'eval' or 'lin', got {kind!r}")
