"""Fixtures for all tests."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a change is judged by what it changed, not by the luck of the draw. To look for new
# counterexamples: `pytest --hypothesis-profile explore`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")

# No test may wait for a network; set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nor see what was measured on this machine before, or leave something behind.
_cache = tempfile.TemporaryDirectory(prefix="pliant-tests-")  # removed when the interpreter ends
os.environ["PLIANT_CACHE"] = _cache.name

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PLIANT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of development data and weights ($PLIANT_SHARED, or ../shared); tests skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no development data at {SHARED}; set PLIANT_SHARED")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    no_shared = pytest.mark.skip(reason=f"no development data at {SHARED}; set PLIANT_SHARED")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("needs_shared") and not (SHARED / "data").is_dir():
            item.add_marker(no_shared)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
