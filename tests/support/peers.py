"""Peers whose packages import torchvision, which Pliant does without: only their formulas are imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class _Anything(types.ModuleType):
    """A module of helpers that the formulas import and never call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def fidelity(*modules: str) -> Iterator[list[Any]]:
    """torch_fidelity's files by name, without its package's imports; skips the test where it is not installed."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torch-fidelity is not installed (its package requires torchvision)")
    before = set(sys.modules)
    parent = types.ModuleType("torch_fidelity")
    parent.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = parent
    sys.modules["torch_fidelity.utils"] = _Anything("torch_fidelity.utils")
    try:
        yield [importlib.import_module(f"torch_fidelity.{name}") for name in modules]
    finally:
        for name in {m for m in sys.modules if m.split(".")[0] == "torch_fidelity"} - before:
            del sys.modules[name]


def torchmetrics(module: str) -> Any:
    """A module of torchmetrics; skips the test where it is not installed or does not import."""
    try:
        return importlib.import_module(f"torchmetrics.{module}")
    except ImportError as e:
        pytest.skip(f"torchmetrics.{module} does not import here: {e}")
