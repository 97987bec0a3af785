"""Linears that multiply in bf16 between float32 neighbours: the residual stream and the norms keep their digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.models import kernels
from pliant.models.layers import OwnLinear


class MixedLinear(OwnLinear):
    """An `nn.Linear` that multiplies in bf16, from bf16-stored weights; (..., in) -> (..., out) in the dtype `out`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear, out: torch.dtype) -> None:
        super().__init__()
        self.out = out
        self.register_buffer("weight", layer.weight.detach().bfloat16(), persistent=False)
        self.register_buffer("bias", layer.bias.detach().bfloat16(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any float dtype in."""
        return kernels.linear(x.bfloat16(), self.weight, self.bias).to(self.out)

    def gelu(self, x: Tensor) -> Tensor:
        """tanh-GELU of `self(x)`."""
        return kernels.linear_gelu(x.bfloat16(), self.weight, self.bias).to(self.out)
