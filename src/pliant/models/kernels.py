"""Fused products for inference on CPUs; everywhere else, and wherever gradients are needed, plain PyTorch.

PyTorch's tanh-GELU costs as much on a CPU as both of an MLP's products together, and a bf16 product copies its bias
first. oneDNN does bias and GELU while it writes the product (the operator torch.compile's CPU backend uses).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


@lru_cache(maxsize=1)
def has_fused_linear() -> bool:
    """Whether this PyTorch offers the fused operator and it computes what we think (one tiny product is tried)."""
    try:
        # Outside any mode that counts or traces: the trial is not part of what runs.
        with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
            x, w, b = torch.eye(2), torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.ones(2)
            fused = torch.ops.mkldnn._linear_pointwise(x, w, b, "gelu", [], "tanh")
            return bool(torch.allclose(fused, F.gelu(F.linear(x, w, b), approximate="tanh"), atol=1e-5))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # A weight of another class (a quantised tensor, say) is known to PyTorch's own linear, not to this operator.
    same = x.device.type == "cpu" and x.dtype == weight.dtype and type(weight) in (Tensor, nn.Parameter)
    return same and not needs_gradient and not torch.compiler.is_compiling() and has_fused_linear()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`, (..., in) -> (..., out)."""
    if x.dtype == torch.bfloat16 and _can_fuse(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh(x @ weight.T + bias)`, (..., in) -> (..., out)."""
    if x.dtype in (torch.float32, torch.bfloat16) and _can_fuse(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return out
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
