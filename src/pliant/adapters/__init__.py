"""Turn one network into a flexible one: more patch sizes, early exits, routed width."""

from pliant.adapters.exit_dit import ExitDiT, ExitSpec
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.spec import FlexSpec
from pliant.adapters.width import DynamicDiT, WidthSpec

__all__ = ["DynamicDiT", "ExitDiT", "ExitSpec", "FlexSpec", "FlexiDiT", "WidthSpec"]
