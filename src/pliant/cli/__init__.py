"""The command line: `pliant` and `python -m pliant.cli`. One file per verb; torch is imported when a verb runs."""

from pliant.cli.main import main, program

__all__ = ["main", "program"]
