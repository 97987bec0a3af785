"""How a process that works in a group ends.

Gloo's threads outlive `destroy_process_group` wherever anything still refers to the group (device meshes and their
caches do), and let go of the last tensors when they come to it. If Python is being taken down by then, asking it for
its lock aborts the process: "terminate called without an active exception", exit code -6, after all work is done. See
PyTorch's pull request 179291. So such a process ends without taking Python down.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def in_group() -> bool:
    """Whether this process has joined others (`torch.distributed`). Does not import PyTorch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end_process(code: int = 0) -> NoReturn:
    """End this process with an exit code: the last line of a script that several processes run.

    In a group: waits for threads, runs the functions registered with `atexit`, writes out what is buffered, and ends at
    once. Alone: `sys.exit`. Only a success (0) takes leave of the group first: others may be waiting for a process that
    failed, and it would wait for them.
    """
    if not in_group():
        sys.exit(code)
    if code == 0:
        sys.modules["torch.distributed"].destroy_process_group()
    # What the standard library does at the end of a forked process (multiprocessing/popen_fork.py).
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or somebody closed it
            stream.flush()
    os._exit(code)
