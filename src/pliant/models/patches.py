"""Patches of any size: cutting, joining, and the exact resizing of the weights that read and write them.

`B` is the matrix that resizes a flattened patch. A kernel resized with the pseudo-inverse of B's transpose gives the
same token for the resized patch (FlexiViT's PI-resize, arXiv 2212.08013); a head is resized through its output.
All matrices are float64, cached, and act on the pixel axis only: never on channels, never on a kernel's bias.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pliant.errors import ConfigError, ShapeError

Resample: TypeAlias = Literal["bilinear", "area"]
PatchSize: TypeAlias = tuple[int, ...]


def patch_pair(patch: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """4 -> (4, 4); (2, 4) unchanged. Raises ConfigError for anything that is not one or two positive integers."""
    pair = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
    if len(pair) != 2 or not all(isinstance(p, int) and p > 0 for p in pair):
        raise ConfigError(f"a patch size is one positive integer or two (height, width), got {patch!r}")
    return pair


def patch_name(patch: tuple[int, ...]) -> str:
    """(2, 4) -> "2x4": the spelling in files, tables and parameter names."""
    return "x".join(map(str, patch))


def token_grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """(H, W) and (ph, pw) -> token grid. Raises ShapeError when the patch does not divide the image."""
    rows, columns = grid_of(size, patch)
    return rows, columns


def grid_of(size: PatchSize, patch: PatchSize) -> PatchSize:
    """`token_grid` of any number of axes."""
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ShapeError(
            f"patch size {patch_name(patch)} does not divide the input of {patch_name(size)}; "
            f"use a divisor of each side"
        )
    return tuple(n // p for n, p in zip(size, patch, strict=True))


def patchify(x: Tensor, patch: PatchSize) -> Tensor:
    """(B, C, H, W) -> (B, N, C*ph*pw), tokens row-major, channel slowest (the layout of a convolution kernel).

    Any number of axes: (B, C, L), (B, C, T, H, W).
    """
    b, c, *size = x.shape
    grid, axes = grid_of(tuple(size), patch), len(patch)
    x = x.reshape(b, c, *(n for pair in zip(grid, patch, strict=True) for n in pair))
    order = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    return x.permute(order).reshape(b, math.prod(grid), c * math.prod(patch))


def unpatchify(tokens: Tensor, grid: PatchSize, patch: PatchSize) -> Tensor:
    """(B, N, ph*pw*C) -> (B, C, H, W), channel fastest inside a token (the layout of DiT's final linear)."""
    b, _, features = tokens.shape
    axes = len(patch)
    x = tokens.reshape(b, *grid, *patch, features // math.prod(patch))
    order = (0, 1 + 2 * axes, *(place for a in range(axes) for place in (1 + a, 1 + axes + a)))
    return x.permute(order).reshape(b, -1, *(g * p for g, p in zip(grid, patch, strict=True)))


def _axis_resize(n_from: int, n_to: int, resample: Resample) -> Tensor:
    """(n_to, n_from) matrix that resizes one axis. Rows sum to 1."""
    ratio = n_from / n_to
    matrix = torch.zeros(n_to, n_from, dtype=torch.float64, device="cpu")
    for i in range(n_to):
        if resample == "bilinear":  # half-pixel centres, edge clamped, no antialiasing
            place = min(max((i + 0.5) * ratio - 0.5, 0.0), n_from - 1.0)
            left = min(int(place), n_from - 1)
            right = min(left + 1, n_from - 1)
            matrix[i, left] += 1.0 - (place - left)
            matrix[i, right] += place - left
        elif resample == "area":  # mean over the target pixel's footprint; for integer up-sizing this repeats
            for j in range(n_from):
                overlap = min((i + 1) * ratio, j + 1.0) - max(i * ratio, float(j))
                matrix[i, j] = max(overlap, 0.0) / ratio
        else:
            raise ConfigError(f"unknown resampling {resample!r}: use 'bilinear' or 'area'")
    return matrix


@lru_cache(maxsize=256)
def resize_matrix(p_from: PatchSize, p_to: PatchSize, resample: Resample = "bilinear") -> Tensor:
    """`B`: (prod(p_to), prod(p_from)), resizes a flattened row-major patch of any number of axes. Do not modify."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")  # cached: never on a caller's device
    for n_from, n_to in zip(p_from, p_to, strict=True):
        matrix = torch.kron(matrix, _axis_resize(n_from, n_to, resample))
    return matrix


@lru_cache(maxsize=256)
def kernel_projection(p_from: PatchSize, p_to: PatchSize, resample: Resample = "bilinear") -> Tensor:
    """`Q = (B_{from->to}^T)^+`: (prod(p_to), prod(p_from)), maps kernels; exact on tokens when p_to >= p_from."""
    return torch.linalg.pinv(resize_matrix(p_from, p_to, resample).T)


def resize_kernel(kernel: Tensor, matrix: Tensor, p_to: PatchSize) -> Tensor:
    """Apply a pixel-axis matrix to a kernel (D, C, *p_from) -> (D, C, *p_to). Float64 inside, differentiable."""
    flat = kernel.reshape(*kernel.shape[:2], -1).double()
    return (flat @ matrix.to(flat).T).reshape(*kernel.shape[:2], *p_to).to(kernel.dtype)


def pi_resize(kernel: Tensor, p_to: PatchSize, resample: Resample = "bilinear") -> Tensor:
    """FlexiViT's PI-resize of a patch-embedding kernel (D, C, *p) to another patch size."""
    p_from = tuple(kernel.shape[2:])
    return resize_kernel(kernel, kernel_projection(p_from, tuple(p_to), resample), tuple(p_to))


def resize_head(weight: Tensor, matrix: Tensor) -> Tensor:
    """Apply a pixel-axis matrix (P', P) to a head's weight (P*C, D) or bias (P*C,), channel fastest."""
    pixels = matrix.shape[1]
    flat = weight.reshape(pixels, -1).double()  # (P, C*D) or (P, C)
    return (matrix.to(flat) @ flat).reshape(-1, *weight.shape[1:]).to(weight.dtype)
