"""Freed memory stays with the process, unless somebody decided otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from pliant.allocator import VARIABLE, keep_freed_memory
from pliant.errors import ConfigError

ROUNDS = """
import resource
from pliant.allocator import keep_freed_memory
kept = keep_freed_memory()
for _ in range(3):  # the C library's own thresholds settle
    held = [bytearray(4_000_000) for _ in range(12)]
    del held
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    held = [bytearray(4_000_000) for _ in range(12)]
    del held
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def rounds(**variables: str) -> tuple[bool, int]:
    """Whether a fresh process keeps freed memory, and the pages it asks for in ten rounds of 48 MB."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_")) and k != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_not_asked_for_again() -> None:
    kept, few = rounds()
    left, many = rounds(**{VARIABLE: "0"})
    assert kept and not left
    assert few < many / 10  # ten times 48 MB: 120,000 pages, or 240 where the system makes huge ones


def test_who_has_decided_is_left_alone() -> None:
    assert rounds(MALLOC_TRIM_THRESHOLD_="131072")[0] is False


@pytest.mark.parametrize("value", ["much", "-1", "4096"])
def test_bad_amounts_are_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    keep_freed_memory.cache_clear()
    with pytest.raises(ConfigError, match=f"{VARIABLE} is '{value}'; expected a whole number"):
        keep_freed_memory()
    monkeypatch.delenv(VARIABLE)
    keep_freed_memory.cache_clear()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory.cache_clear()
    assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()
