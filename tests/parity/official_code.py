"""Runs the official repositories' models.py from a checkout, with stand-ins for the three classes they take from timm.

    PLIANT_OFFICIAL_DIT=/somewhere/DiT PLIANT_OFFICIAL_SIT=/somewhere/SiT pytest tests/parity/test_official.py

Their code is CC BY-NC: it stays outside this project. It runs in this process, so point these only at checkouts of
facebookresearch/DiT and willisma/SiT.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """timm's: a convolution whose stride is its kernel, then tokens."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """timm's: rows of qkv are q, k, v, each with heads outermost."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.num_heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """timm's: linear, activation, linear."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@contextmanager
def _stand_ins() -> Iterator[None]:
    names = ("timm", "timm.models", "timm.models.vision_transformer")
    before = {name: sys.modules.get(name) for name in names}
    modules = {name: ModuleType(name) for name in names}
    vars(modules[names[-1]]).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def official_models(kind: str) -> ModuleType:
    """models.py of the checkout that $PLIANT_OFFICIAL_DIT or _SIT points at; skips the test without one."""
    variable = f"PLIANT_OFFICIAL_{kind.upper()}"
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a checkout of the official repository to compare with its code")
    file = Path(os.environ[variable]) / "models.py"
    spec = importlib.util.spec_from_file_location(f"official_{kind}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


@torch.no_grad()
def official_network(kind: str, **sizes: Any) -> nn.Module:
    """A DiT or SiT of the official code in eval mode, every parameter but the positions random."""
    network = getattr(official_models(kind), {"dit": "DiT", "sit": "SiT"}[kind])(**sizes).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network
