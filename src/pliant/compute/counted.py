"""Measure the FLOPs of any function by watching the operators it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch


def counted_flops(fn: Callable[[], Any]) -> int:
    """Run `fn` once and return its FLOPs: matrix products, convolutions and attention, one multiply-add = 2.

    Works on the meta device, where nothing is computed (`with torch.device("meta"):` build model and inputs).
    Element-wise work, norms and softmax count nothing: the `MATMUL` convention of `pliant.compute.cost`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=_cpu_operators()) as counter:
        fn()
    return int(counter.get_total_flops())


def _cpu_operators() -> dict[Any, Any]:
    """Formulas for fused CPU operators, which torch's counter (2.13) does not know and counts as zero."""
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {}
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        formulas[aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward"):
        formulas[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward_flops
    with contextlib.suppress(AttributeError, RuntimeError):  # builds without oneDNN
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear_flops
        formulas[torch.ops.onednn.qlinear_pointwise] = _int8_linear_flops
    return formulas


def _linear_flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A linear with its bias and activation fused: (..., in) by (out, in); the weight comes third where something is
    multiplied in as well."""
    weight = args[0] if args and args[0] is not None and len(args[0]) == 2 else weight
    return 2 * math.prod(x) * int(weight[0])


def _int8_linear_flops(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A linear of 8-bit codes (..., in): its packed weight does not show its shape, its output (..., out) does."""
    return 2 * math.prod(x) * int(out_shape[-1])


def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Q K^T and A V. Shapes (B, heads, N, d), (B, heads, M, d), (B, heads, M, d_v)."""
    batch, heads, n, d = query
    return int(2 * batch * heads * n * key[-2] * (d + value[-1]))


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Scores computed again, then the gradients of A, V, Q and K: five products in all."""
    batch, heads, n, d = query
    return int(2 * batch * heads * n * key[-2] * (3 * d + 2 * value[-1]))
