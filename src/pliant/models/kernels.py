"""Fused products for inference on CPUs and attention for training on them; everywhere else plain PyTorch.

PyTorch's tanh-GELU costs as much on a CPU as both of an MLP's products together, and a bf16 product copies its bias
first. oneDNN does bias and GELU while it writes the product (the operator torch.compile's CPU backend uses). PyTorch's
own fp32 products go through Intel's MKL, which on AMD's processors reaches less than half of what oneDNN does. Its bf16
attention takes twice as long as two products and a softmax where the processor has no matrix tiles (AMX).
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


@lru_cache(maxsize=1)
def has_matrix_tiles() -> bool:
    """Whether this processor has AMX, which PyTorch's own bf16 attention uses."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known()) if known is not None else True


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU of (..., channels), where it cannot be part of a product."""
    channels, one = x.shape[-1], [1, 1]
    large = x.numel() >= WORTH_A_CALL * x.shape[0]  # of one sample's shape: an image is the same in every batch
    if large and x.dtype == torch.bfloat16 and x.is_contiguous() and _can_fuse(x, _ones(channels)):
        # oneDNN's GELU cannot be called alone, but a convolution of every channel with 1 may end with it: .6 ms instead
        # of 2.0 for a million and a half values.
        pixels = x.view(-1, channels)[None, :, None].permute(0, 3, 1, 2)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            pixels, _ones(channels), None, [0, 0], one, one, channels, "gelu", [], "tanh"
        )
        return out.permute(0, 2, 3, 1).reshape(x.shape)
    return F.gelu(x, approximate="tanh")


@lru_cache(maxsize=16)
def _ones(channels: int) -> Tensor:
    return torch.ones(channels, 1, 1, 1, dtype=torch.bfloat16, device="cpu")


def linear_plus(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    """`addend + x @ weight.T`, (..., in), (..., out) -> (..., out): the sum in the pass that writes the product."""
    if x.dtype == torch.bfloat16 and _can_fuse(x, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, addend, weight, None, "add")
        return out
    return addend + F.linear(x, weight)


MOST_SCORES = 2**27
"""Attention scores (bytes in bf16: twice that) that training on a CPU may keep for the backward pass of one call."""


SCORES_AT_ONCE = 2**22
"""Attention scores that are in memory at once: 8 MB of bf16, which caches hold."""
WORTH_A_CALL = 2**15
"""Values of one sample from which a GELU by oneDNN is faster than PyTorch's."""
WORTH_SPLITTING = 2**14
"""Scores of one sample from which three kernels are faster than one."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, H, n, d) to (B, H, N, d) -> (B, H, n, d). mask: as (B, H, n, N), True = attend.

    PyTorch's fused kernel; but in bf16 on a CPU product, softmax and product one after the other: in training, where
    the fused backward pass is slow (forward and backward 4.5 times as fast at 108 tokens, 2.6 times at 1024: Zen 5, one
    core), and without gradients and a mask on processors without matrix tiles (2 times as fast from 64 tokens on).
    Scores are then rounded to bf16 (the fused kernel keeps them in fp32): images of 12 steps are as far from fp32's
    with either, also where scores reach 50.
    """
    if _trains_in_bf16(q):
        q, k, v = (u.to(torch.bfloat16) for u in (q, k, v))
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(torch.bfloat16).min)
        return torch.matmul(scores.softmax(-1), v)
    own = mask is None and q.dtype == torch.bfloat16 and _pays_to_split(q.shape[1] * q.shape[2] * k.shape[2])
    if own and _can_fuse(q, k) and _can_fuse(v, v):
        return _split_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _pays_to_split(scores: int) -> bool:
    """scores: of one sample alone, so that an image is the same in every batch."""
    return scores >= WORTH_SPLITTING and not has_matrix_tiles()


def attention_scratch(rows: int, heads: int, queries: int, keys: int) -> int:
    """Bytes of the scores, before and after softmax, that bf16 `attention` on a CPU without gradients holds at most."""
    if not _pays_to_split(heads * queries * keys):
        return 0
    return 2 * 2 * min(rows * heads, _heads_at_once(queries, keys)) * queries * keys


def _heads_at_once(queries: int, keys: int) -> int:
    return max(1, SCORES_AT_ONCE // (queries * keys))


def _split_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    flat = [part.reshape(-1, *part.shape[2:]) for part in (q, k, v)]
    size = _heads_at_once(q.shape[2], k.shape[2])
    parts = []
    for asked, keys, values in zip(*(part.split(size) for part in flat), strict=True):
        scores = torch.baddbmm(asked.new_empty(1, 1, 1), asked, keys.transpose(1, 2), beta=0, alpha=scale)
        parts.append(torch.bmm(torch.softmax(scores, -1), values))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*q.shape[:3], v.shape[-1])


def _trains_in_bf16(q: Tensor) -> bool:
    """Whether queries (B, H, N, d) on a CPU are to be attended with in bf16, for gradients, and the scores fit."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not q.requires_grad:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return dtype == torch.bfloat16 and math.prod(q.shape[:3]) * q.shape[2] <= MOST_SCORES
