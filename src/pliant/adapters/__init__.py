"""Turn one network into a flexible one."""

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.spec import FlexSpec

__all__ = ["FlexSpec", "FlexiDiT"]
