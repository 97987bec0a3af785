"""How one patch size enters and leaves the native backbone (`pliant.models.flexible`)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.models.flexible_config import FlexibleConfig
from pliant.models.network import Size
from pliant.models.patches import patchify, resize_head, resize_kernel, resize_matrix


class PatchMode(nn.Module):
    """Kernel, conditioning vector and head of one patch size."""

    def __init__(self, config: FlexibleConfig, patch: Size) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(config.width, config.in_channels, *patch))
        self.bias = nn.Parameter(torch.zeros(config.width))
        self.embedding = nn.Parameter(torch.zeros(config.width))
        """Added to the conditioning, which so knows the patch size."""
        self.head = nn.Linear(config.width, math.prod(patch) * config.out_channels)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, N, D)."""
        kernel = self.weight.reshape(self.weight.shape[0], -1)
        return F.linear(patchify(x.to(self.weight.dtype), self.patch), kernel, self.bias)

    @torch.no_grad()
    def start_from(self, other: PatchMode) -> None:
        """The tokens and predictions of another (finer) mode: kernels averaged, heads resized (sheet A, 1.2-1.3)."""
        down, up = resize_matrix(self.patch, other.patch, "bilinear"), resize_matrix(other.patch, self.patch, "area")
        self.weight.copy_(resize_kernel(other.weight, down.T, self.patch))
        self.bias.copy_(other.bias)
        self.embedding.copy_(other.embedding)
        self.head.weight.copy_(resize_head(other.head.weight, up))
        self.head.bias.copy_(resize_head(other.head.bias, up))
