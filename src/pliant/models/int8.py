"""Linears with int8 weights and inputs quantised as they come, on oneDNN's 8-bit products (CPUs).

Weights: symmetric, one scale per output feature. Inputs: symmetric, one scale per call, from the largest magnitude in
it; a call's rows therefore share a scale, and a sample's rounding depends on what else is in its batch. Codes of inputs
are unsigned, around 128: for signed ones oneDNN has no kernel on processors with 8-bit products but no AMX, only
a reference loop that is 2000 times slower.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from pliant.errors import ConfigError, PlanError
from pliant.models.layers import OwnLinear

ZERO = 128
"""Code of the input 0."""

ROUNDER = 1.5 * 2.0**23 + ZERO
"""Added to a float32 below 2^22 in magnitude, it leaves the rounded number plus ZERO in the lowest bits."""

CHUNK = 2**17
"""Numbers quantised at a time, so that what is in between stays in the cache: 512 KB of it."""


@lru_cache(maxsize=1)
def weight_levels() -> int:
    """Largest weight code whose products this processor adds up exactly: 127, or 63 where pairs are summed in 16 bits.

    Processors without 8-bit dot products (AVX2 before VNNI) saturate there, silently. Raises ConfigError where
    PyTorch offers no 8-bit linear at all.
    """
    for levels in (127, 63):
        with torch.device("cpu"), torch.no_grad():
            x = torch.full((4, 64), ZERO + 127, dtype=torch.uint8)
            x[2:] = ZERO - 127
            weight = torch.full((8, 64), levels, dtype=torch.int8)
            try:
                got = _product(x, 1.0, _packed(weight), torch.ones(8), _zeros(8), None, torch.float32, gelu=False)
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                raise ConfigError(
                    f"precision 'int8d' needs oneDNN's 8-bit linear, which PyTorch {torch.__version__} does not offer "
                    "on this machine; use 'bf16' or 'fp32'."
                ) from error
            if torch.equal(got, (x[:, :1].float() - ZERO).expand(4, 8) * (64 * levels)):
                return levels
    raise ConfigError("precision 'int8d': this machine's 8-bit products are wrong; use 'bf16' or 'fp32'.")


def _packed(weight: Tensor) -> Tensor:
    """(out, in) int8 codes -> oneDNN's own layout, still int8."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def _product(
    codes: Tensor,
    scale: float,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out: torch.dtype,
    gelu: bool,
) -> Tensor:
    name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, scale, ZERO, packed, scales, zeros, bias, 1.0, 0, out, name, [], algorithm
    )
    return y


def quantized_rows(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 codes in [-levels, levels] and (out,) scales; codes * scale is within scale/2 of the weight."""
    weight = weight.detach().float()
    scales = (weight.abs().amax(1) / levels).clamp_min(1e-30)
    return (weight / scales[:, None]).round().to(torch.int8), scales


def quantized_input(x: Tensor) -> tuple[Tensor, float] | None:
    """Any shape -> uint8 codes in ZERO +- 127 and their scale; None if a value is not finite."""
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    if not x.numel():  # routed networks may leave no token to a branch
        return torch.empty(x.shape, dtype=torch.uint8), 1.0
    if x.dtype == torch.bfloat16:
        low, high = torch.aminmax(x)
    else:  # the two are vectorised better than the one, for float32 only
        low, high = torch.amin(x), torch.amax(x)
    peak = max(high.item(), -low.item())
    if not math.isfinite(peak):
        return None
    scale = max(peak / 127, 1e-30)
    flat = x.reshape(-1)
    if len(flat) <= CHUNK:
        return _codes(flat, 1 / scale).to(torch.uint8).view(x.shape), scale
    codes = torch.empty(len(flat), dtype=torch.uint8)
    for part, into in zip(flat.split(CHUNK), codes.split(CHUNK), strict=True):
        into.copy_(_codes(part, 1 / scale))
    return codes.view(x.shape), scale


def _codes(x: Tensor, factor: float) -> Tensor:
    """int32 numbers whose lowest byte is round(x * factor) + ZERO: half the time of multiply, round, convert."""
    return torch.add(torch.full((1,), ROUNDER, dtype=torch.float32), x, alpha=factor).view(torch.int32)


class Int8Linear(OwnLinear):
    """An `nn.Linear` in 8 bits; (..., in) -> (..., out) in the dtype `out`. Forward only."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, out: torch.dtype) -> None:
        super().__init__()
        codes, scales = quantized_rows(layer.weight, weight_levels())
        self.out = out
        self.out_features, self.in_features = codes.shape
        self.register_buffer("weight", _packed(codes), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("zeros", _zeros(len(scales)), persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().float()  # fp32 already: shared, not copied
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, gelu=False)

    def gelu(self, x: Tensor) -> Tensor:
        return self._run(x, gelu=True)

    def _run(self, x: Tensor, gelu: bool) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise PlanError("precision 'int8d' has no gradients: rounding has none; use 'fp32' or 'bf16' here.")
        quantized = quantized_input(x)
        if quantized is None:  # as any other linear: what is not finite stays visible
            return x.new_full((*x.shape[:-1], self.out_features), math.nan, dtype=self.out)
        codes, scale = quantized
        return _product(codes, scale, self.weight, self.scales, self.zeros, self.bias, self.out, gelu)
