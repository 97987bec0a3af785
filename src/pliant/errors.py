"""Errors a user can act on: each message says what was wrong, what was expected, and what to do.

The command line turns every `PliantError` into one line on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PliantError(ValueError):
    """Base of all errors caused by input rather than by a defect of Pliant."""


class ShapeError(PliantError):
    """A tensor or image has a shape that does not fit."""


class PlanError(PliantError):
    """A plan, solver or budget asks for something that cannot be executed."""


class FormatError(PliantError):
    """A model file is missing, damaged, unsafe or of an unknown format."""


class ConfigError(PliantError):
    """A configuration value is unknown or out of range."""


class DataError(PliantError):
    """Training or evaluation data cannot be used."""


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that points to the nearest known name, e.g. `did you mean 'heun'? Known: ddim, heun.`

    A long list is cut to the names that look alike.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if near and len(names) > 20:
        return f"{hint}Similar: {', '.join(near)} ({len(names)} are known)."
    return f"{hint}Known: {', '.join(names)}."
