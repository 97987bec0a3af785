"""Memory that a network's tensors free stays with the process, where the C library would hand it back each time.

glibc gives freed memory back to the system as soon as 128 kB lie free at the end of its heap. The next tensor asks for
it anew, and the system clears every page of it: a fifth of the time of plans that keep features.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

from pliant.errors import ConfigError

VARIABLE = "PLIANT_KEEP_FREED_MB"
"""Environment variable: how many free megabytes may stay with the process; 0 leaves the C library as it is."""
DEFAULT_MB = 512
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_MOST_FROM_HEAP = 32 * 2**20
"""Larger blocks never come from the heap: glibc's own limit."""
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Whoever set one of these has decided already."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Once per process, before tensors are computed on a CPU: whether glibc now keeps what is freed.

    Does nothing, and says False, where the C library is another one, where the user has set the allocator up, and
    where the variable PLIANT_KEEP_FREED_MB is 0. Raises ConfigError if that is no whole number from 0 on.
    """
    megabytes = _asked()
    if not megabytes or sys.platform != "linux" or any(os.environ.get(name) for name in _OWN):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    # Setting either ends glibc's own adjustment of both, so that both must be set.
    kept = library.mallopt(_TRIM_THRESHOLD, megabytes * 2**20) and library.mallopt(_MMAP_THRESHOLD, _MOST_FROM_HEAP)
    return bool(kept)


def _asked() -> int:
    text = os.environ.get(VARIABLE, "")
    if not text:
        return DEFAULT_MB
    if not text.isdecimal() or int(text) >= 2048:  # mallopt takes an int of bytes
        raise ConfigError(f"{VARIABLE} is {text!r}; expected a whole number of megabytes from 0 (off) to 2047")
    return int(text)
