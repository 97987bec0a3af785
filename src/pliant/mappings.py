"""Dataclasses of settings as mappings that JSON and YAML can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

from pliant.errors import ConfigError, suggest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)


def to_mapping(settings: DataclassInstance, silent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All fields of a dataclass by name, with lists in place of tuples, also inside tuples.

    silent: values by field that are left out, and with it None of any field; None: everything is said.
    """
    values = {name: _listed(value) for name, value in asdict(settings).items()}
    if silent is None:
        return values
    return {k: v for k, v in values.items() if v is not None and (k not in silent or v != silent[k])}


def from_mapping(kind: type[Settings], values: Mapping[str, Any], what: str) -> Settings:
    """Inverse of `to_mapping`; the dataclass itself makes tuples of lists again.

    what: how a message calls a field, e.g. "DiT field". Raises ConfigError naming an unknown field and the nearest.
    """
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}: {suggest(str(name), known)}")
    return kind(**values)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(`name.of.the.setting`, what it was, what it is) of the first one that differs; missing ones are None."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            deeper = first_difference(old, new)
            return None if deeper is None else (f"{key}.{deeper[0]}", *deeper[1:])
        return key, old, new
    return None
