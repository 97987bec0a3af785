"""The JSON Schema of plan files, for editors and other languages. Written out by `pliant plan --schema`."""

from __future__ import annotations

from typing import Any

from pliant.paths import known_paths
from pliant.plans.plan import FORMAT, VERSION
from pliant.solvers import SOLVERS


def _object(properties: dict[str, Any], required: list[str], extra: bool = False) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def plan_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `Plan.to_dict()`."""
    patch = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 3}
    compute = _object(
        {
            "patch": _or_null(patch),
            "merged": {"type": "boolean"},
            "precision": _or_null({"enum": ["fp32", "bf16"]}),
        },
        [],
    )
    guidance = _object(
        {
            "scale": {"type": "number"},
            "against": {"enum": ["null", "weak"]},
            "compute": _or_null(compute),
            "channels": _or_null({"type": "integer", "minimum": 1}),
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
