"""What goes to which stream: reports to stdout, everything else (errors, warnings, progress) to stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings as python_warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

Advance: TypeAlias = Callable[[int, int], None]
"""(done, total)."""

PATIENCE = 1.0
"""Seconds before a progress bar appears: quick commands stay quiet."""


def complain(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


def note(message: str) -> None:
    """A line for people on stderr, so that stdout stays a report."""
    sys.stderr.write(f"{message}\n")


def emit_json(data: Any) -> None:
    """The one JSON document of a `--json` command. NaN and infinities become null: JSON has no word for them."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: drawn on a terminal, plain aligned text elsewhere. All but the first column right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for k, column in enumerate(columns):
        drawn.add_column(column, justify="left" if k == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(drawn)


@contextmanager
def progress(text: str) -> Iterator[Advance]:
    """A bar on stderr for work that calls `advance(done, total)`; silent when stderr is not a terminal."""
    with progress_saying(text) as advance:
        yield lambda done, total: advance(done, total, "")


@contextmanager
def progress_saying(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """The same for work that calls `advance(done, total, words)`; the best so far follows the text."""
    if not sys.stderr.isatty():
        yield lambda done, total, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(text, total=None)
    begun, shown = time.monotonic(), False

    def advance(done: int, total: int, words: str) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total, description=f"{text}, best {words}" if words else text)
        if not shown and time.monotonic() - begun > PATIENCE:
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        if shown:
            bar.stop()


class _Warnings(logging.Handler):
    """Warnings of the library as lines on stderr, remembered for JSON reports."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def say(self, message: str) -> None:
        self.messages.append(message)
        # Looked up now: progress bars and tests replace the stream.
        sys.stderr.write(f"warning: {message}\n")


_warnings = _Warnings()


def listen_to_logs() -> None:
    """Show the library's warnings from now on, and forget those of an earlier run in this process."""
    _warnings.messages.clear()
    python_warnings.showwarning = _show_warning
    logger = logging.getLogger("pliant")
    if _warnings not in logger.handlers:
        logger.addHandler(_warnings)
        logger.propagate = False


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    # Only the text: where in the code a warning was raised tells a user of the command line nothing.
    _warnings.say(str(message))


def warnings() -> list[str]:
    """The library's warnings since the program started."""
    return list(_warnings.messages)
