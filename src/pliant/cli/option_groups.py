"""Options that come in groups: a command takes a dataclass, and its fields are options on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: parameters whose type is a dataclass are spread into one parameter per field.

    Fields are annotated as parameters of commands are, and have defaults. Raises TypeError for a name used twice.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    spread: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            own = get_type_hints(kind, include_extras=True)
            wanted = [(f.name, f.default, own[f.name]) for f in fields(kind)]
        else:
            wanted = [(parameter.name, parameter.default, kind)]
        spread += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, default, annotation in wanted
        ]
    names = [p.name for p in spread]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{command.__name__} has the option {sorted(twice)[0]!r} twice")

    @wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in spread}
    return run
