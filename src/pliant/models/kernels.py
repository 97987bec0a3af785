"""Fused products for inference on CPUs and attention for training on them; everywhere else plain PyTorch.

PyTorch's tanh-GELU costs as much on a CPU as both of an MLP's products together, and a bf16 product copies its bias
first. oneDNN does bias and GELU while it writes the product (the operator torch.compile's CPU backend uses). PyTorch's
own fp32 products go through Intel's MKL, which on AMD's processors reaches less than half of what oneDNN does.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
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


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether this is an AMD processor, where oneDNN's fp32 products take half of MKL's time.

    Measured on Zen 5, one core: 215 against 100 GFLOP/s.
    """
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")[:4096]
    except OSError:
        return False


WORTH_IT = 2**21
"""Multiply-adds from which calling oneDNN directly pays in fp32: below, its overhead is what takes time."""


def _prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a plain fp32 product is better done by oneDNN. A function of shapes and the machine alone."""
    if torch.compiler.is_compiling():  # what asks the machine would cut the compiled graph in two
        return False
    return math.prod(x.shape) * weight.shape[0] >= WORTH_IT and mkl_is_slow()


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # The operator has no forward-mode derivative and would drop tangents without a word.
    needs_gradient = needs_gradient or forward_ad._current_level >= 0
    # A weight of another class (a quantised tensor, say) is known to PyTorch's own linear, not to this operator.
    same = x.device.type == "cpu" and x.dtype == weight.dtype and type(weight) in (Tensor, nn.Parameter)
    return same and not needs_gradient and not torch.compiler.is_compiling() and has_fused_linear()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`, (..., in) -> (..., out)."""
    wanted = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and _prefers_onednn(x, weight))
    if wanted and _can_fuse(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh(x @ weight.T + bias)`, (..., in) -> (..., out)."""
    if x.dtype in (torch.float32, torch.bfloat16) and _can_fuse(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return out
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_silu_gate(x: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
    """`silu(gate(x)) * up(x)`: the first half of SwiGLU, (..., in) -> (..., hidden)."""
    large = x.dtype == torch.float32 and _prefers_onednn(x, gate.weight)
    if large and _can_fuse(x, gate.weight) and _can_fuse(x, up.weight):
        opened = torch.ops.mkldnn._linear_pointwise(x, gate.weight, gate.bias, "swish", [], "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, opened, up.weight, up.bias, "mul")
        return out
    return F.silu(linear(x, gate.weight, gate.bias)) * linear(x, up.weight, up.bias)


MOST_SCORES = 2**27
"""Attention scores (bytes in bf16: twice that) that training on a CPU may keep for the backward pass of one call."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, (B, H, N, d) each -> (B, H, N, d). mask: broadcast to (B, H, N, N), True = attend.

    PyTorch's fused kernel; but in bf16 training on a CPU, where its backward pass is slow, product, softmax and product
    one after the other (forward and backward 4.5 times as fast at 108 tokens, 2.6 times at 1024: Zen 5, one core).
    """
    if not _trains_in_bf16(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q, k, v = (u.to(torch.bfloat16) for u in (q, k, v))
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    return torch.matmul(scores.softmax(-1), v)


def _trains_in_bf16(q: Tensor) -> bool:
    """Whether queries (B, H, N, d) on a CPU are to be attended with in bf16, for gradients, and the scores fit."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not q.requires_grad:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return dtype == torch.bfloat16 and math.prod(q.shape[:3]) * q.shape[2] <= MOST_SCORES
