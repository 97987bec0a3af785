"""What one network call may spend, and what it costs."""

from pliant.compute.cache import Cache, Moment
from pliant.compute.chebyshev import Chebyshev
from pliant.compute.compute import Compute
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
from pliant.compute.gate import Gate
from pliant.compute.reuse import Reuse
from pliant.compute.scale import LowBand
from pliant.compute.sites import Site, SiteModel
from pliant.compute.spent import spent_macs, spent_parts
from pliant.compute.tokens import Merge, Pool, Pooled, Subset

__all__ = [
    "BLOCKS",
    "MATMUL",
    "PUBLISHED",
    "WITHOUT_CONDITIONING",
    "Cache",
    "Chebyshev",
    "Compute",
    "Convention",
    "CostParts",
    "Gate",
    "LowBand",
    "Merge",
    "Moment",
    "Pool",
    "Pooled",
    "Reuse",
    "Site",
    "SiteModel",
    "Subset",
    "TransformerShape",
    "activation_bytes",
    "cost_parts",
    "counted_flops",
    "flops",
    "macs",
    "parameter_count",
    "spent_macs",
    "spent_parts",
    "weight_bytes",
]
