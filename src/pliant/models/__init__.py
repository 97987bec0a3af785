"""Networks: plain modules that know nothing of paths, solvers or files."""

from pliant.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
