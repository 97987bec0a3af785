"""What one network call may spend, and what it costs."""

from pliant.compute.compute import Compute, Precision
from pliant.compute.cost import (
    BLOCKS,
    MATMUL,
    PUBLISHED,
    WITHOUT_CONDITIONING,
    Convention,
    CostParts,
    TransformerShape,
    activation_bytes,
    cost_parts,
    flops,
    macs,
    parameter_count,
    weight_bytes,
)
from pliant.compute.counted import counted_flops

__all__ = [
    "BLOCKS",
    "MATMUL",
    "PUBLISHED",
    "WITHOUT_CONDITIONING",
    "Compute",
    "Convention",
    "CostParts",
    "Precision",
    "TransformerShape",
    "activation_bytes",
    "cost_parts",
    "counted_flops",
    "flops",
    "macs",
    "parameter_count",
    "weight_bytes",
]
