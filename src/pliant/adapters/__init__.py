"""Turn one network into a flexible one: more patch sizes, early exits."""

from pliant.adapters.exit_dit import ExitDiT, ExitSpec
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.spec import FlexSpec

__all__ = ["ExitDiT", "ExitSpec", "FlexSpec", "FlexiDiT"]
