"""A search's diary: one JSON line per measured candidate, written to disk before the next is begun.

A search that is killed in the middle reads it and goes on. Searches are deterministic by seed, so what is proposed
again is looked up instead of measured, and the end is that of an undisturbed search.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import IO, Any

from pliant.errors import PlanError
from pliant.planning.objective import Score

FORMAT = "pliant-search-journal-1"


def key_of(genome: Any) -> str:
    """The one spelling of a JSON-ready candidate."""
    return json.dumps(genome, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Entry:
    """score: None for a candidate that could not be run; seconds: what it took."""

    score: Score | None
    seconds: float


class Journal:
    """What was measured, by candidate. file: None keeps it in memory only.

    about: what identifies the search (space, seed, objective, model, ...), JSON-ready. Raises PlanError for a file that
    belongs to another search, is none or cannot be written; a last line that was cut off while it was written is
    dropped.
    """

    def __init__(self, file: str | FilePath | None = None, about: dict[str, Any] | None = None) -> None:
        self.entries: dict[str, Entry] = {}
        self.notes: dict[str, Any] = {}
        self._stream: IO[str] | None = None
        self.read = 0
        """Entries that were there already."""
        if file is None:
            return
        path, head = FilePath(file), {"format": FORMAT, "about": json.loads(json.dumps(about or {}))}
        whole = self._load(path, head) if path.exists() else 0
        self.read = len(self.entries)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("r+" if whole else "w", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write the journal {path}: {error.strerror or error}") from None
        if whole:
            self._stream.truncate(whole)
            self._stream.seek(0, os.SEEK_END)
        else:
            self._write(head)

    def _load(self, path: FilePath, head: dict[str, Any]) -> int:
        """Reads the entries; returns the length in bytes of what is whole."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PlanError(f"cannot read the journal {path}: {error.strerror or error}") from None
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].splitlines()
        if not lines:
            if data and not b'{"format": "pliant-search-journal'.startswith(data[:33]):
                raise PlanError(f"{path} is not a search journal; name another file")
            return 0
        try:
            found = json.loads(lines[0])
            for line in lines[1:]:
                row = json.loads(line)
                if "note" in row:
                    self.notes[row["note"]] = row["value"]
                    continue
                score = None if row["score"] is None else Score.from_dict(row["score"])
                self.entries[key_of(row["candidate"])] = Entry(score, float(row["seconds"]))
        except (ValueError, KeyError, TypeError):
            raise PlanError(f"{path} is not a search journal, or is damaged; name another file, or delete it") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise PlanError(f"{path} is not a search journal; name another file")
        if found != head:
            mine, its = head["about"], found.get("about") or {}
            differ = sorted(k for k in {*mine, *its} if mine.get(k) != its.get(k))
            raise PlanError(
                f"the journal {path} is of another search (it differs in {', '.join(differ)}); repeat that search's "
                f"options, or name another file"
            )
        return whole

    def _write(self, row: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def get(self, genome: Any) -> Entry | None:
        return self.entries.get(key_of(genome))

    def add(self, genome: Any, score: Score | None, seconds: float) -> Entry:
        entry = Entry(score, seconds)
        self.entries[key_of(genome)] = entry
        self._write({"candidate": genome, "score": None if score is None else score.to_dict(), "seconds": seconds})
        return entry

    def noted(self, name: str, make: Callable[[], Any]) -> Any:
        """Another JSON-ready fact that takes long to find: made once, then read."""
        if name not in self.notes:
            self.notes[name] = make()
            self._write({"note": name, "value": self.notes[name]})
        return self.notes[name]

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
