"""The JSON Schema of plan files, for editors and other languages. Written out by `pliant plan --schema`."""

from __future__ import annotations

from typing import Any, get_args

from pliant.compute.gate import Comparison, Deciders, Reference, Signal
from pliant.compute.reuse import MAX_WINDOW, Basis, Clock, ReuseKind
from pliant.compute.tokens import Rule
from pliant.guidance import AGAINST, RULES
from pliant.paths import known_paths
from pliant.plans.plan import FORMAT, VERSION
from pliant.solvers import SOLVERS


def _object(properties: dict[str, Any], required: list[str], extra: bool = False) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


SITES = {"type": "string", "pattern": r"^([RCK][1-9]\d*)+$"}


def _reuse() -> dict[str, Any]:
    fit = {
        "over": {"type": "number", "exclusiveMinimum": 0},
        "degree": {"type": "integer", "minimum": 0, "maximum": 16},
        "ridge": {"type": "number", "exclusiveMinimum": 0},
        "blend": {"type": "number", "minimum": 0, "maximum": 1},
        "about": {"enum": ["zero", "newest"]},
    }
    return _object(
        {
            "kind": {"enum": list(get_args(ReuseKind))},
            "order": {"type": "integer", "minimum": 0, "maximum": MAX_WINDOW - 1},
            "basis": {"enum": list(get_args(Basis))},
            "on": {"enum": list(get_args(Clock))},
            "fit": _or_null(_object(fit, ["over"])),
            "rank": _or_null({"type": "integer", "minimum": 0}),
        },
        [],
    )


def _tokens() -> dict[str, Any]:
    share = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    subset = {
        "kind": {"const": "subset"},
        "ratio": share,
        "rule": {"enum": list(get_args(Rule))},
        "sign": {"enum": [-1, 1]},
        "starvation": {"type": "number", "minimum": 0},
    }
    merge = {"kind": {"const": "merge"}, "ratio": share, "window": {"type": "integer", "minimum": 2}}
    side = {"type": "integer", "minimum": 1}
    span = {
        "first": {"type": "integer", "minimum": 0},
        "last": {"type": "integer", "minimum": 0},
        "ratio": {"type": "array", "items": side, "minItems": 2, "maxItems": 2},
    }
    spans = {"type": "array", "items": _object(span, ["first", "last"])}
    pool = {"kind": {"const": "pool"}, "spans": spans}
    kinds = [(subset, "ratio"), (merge, "ratio"), (pool, "spans")]
    return {"oneOf": [_object(fields, ["kind", needed]) for fields, needed in kinds]}


def _gate() -> dict[str, Any]:
    return _object(
        {
            "threshold": {"type": "number", "minimum": 0},
            "on_hit": SITES,
            "probe": {"type": "integer", "minimum": 0},
            "signal": {"enum": list(get_args(Signal))},
            "reference": {"enum": list(get_args(Reference))},
            "polynomial": {"type": "array", "items": {"type": "number"}},
            "accumulate": {"type": "boolean"},
            "max_run": _or_null({"type": "integer", "minimum": 1}),
            "max_hits": _or_null({"type": "integer", "minimum": 1}),
            "max_seen": _or_null({"type": "number", "exclusiveMinimum": 0}),
            "comparison": {"enum": list(get_args(Comparison))},
            "deciders": {"enum": list(get_args(Deciders))},
        },
        ["threshold", "on_hit"],
    )


def plan_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `Plan.to_dict()`."""
    patch = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 3}
    compute = _object(
        {
            "patch": _or_null(patch),
            "merged": {"type": "boolean"},
            "precision": _or_null({"type": "string"}),
            "scale": _or_null({"type": "object"}),
            "exit": _or_null({"type": "integer", "minimum": 1}),
            "sites": _or_null(SITES),
            "reuse": _or_null(_reuse()),
            "tokens": _or_null(_tokens()),
            "write": {
                "type": "array",
                "items": {
                    "type": "string",
                    "pattern": r"^(branch|increment\(\d+\)|out|drift|state|kv|span\(\d+,\d+\))$",
                },
            },
            "gate": _or_null(_gate()),
        },
        [],
    )
    guidance = _object(
        {
            "scale": {"type": "number"},
            "against": {"enum": list(AGAINST)},
            "compute": _or_null(compute),
            "channels": _or_null({"type": "integer", "minimum": 1}),
            "rule": _object({"name": {"enum": list(RULES)}}, ["name"], extra=True),
            "rescale": {"type": "number", "minimum": 0, "maximum": 1},
            "moderation": {"type": "number"},
            "gain": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        },
        ["scale"],
    )
    step = _object(
        {
            "t": {"type": "number", "minimum": 0, "maximum": 1},
            "solver": _object({"name": {"enum": sorted(SOLVERS)}}, ["name"], extra=True),
            "compute": compute,
            "guidance": _or_null(guidance),
        },
        ["t", "solver"],
    )
    fields = {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "model": {"type": "object"},
        "path": _object({"name": {"enum": list(known_paths())}}, ["name"], extra=True),
        "end": {"type": "number", "minimum": 0, "maximum": 1},
        "reset_history_on_switch": {"type": "boolean"},
        "provenance": {"type": "object"},
        "steps": {"type": "array", "items": step, "minItems": 1},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pliant plan",
        **_object(fields, ["format", "version", "path", "steps"]),
    }
