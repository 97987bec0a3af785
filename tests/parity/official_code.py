"""Runs the official repositories' models from a checkout, with stand-ins for the classes they take from timm.

    PLIANT_OFFICIAL_DIT=/somewhere/DiT PLIANT_OFFICIAL_SIT=/somewhere/SiT pytest tests/parity/test_official.py
    PLIANT_OFFICIAL_FIT=/somewhere/FiT pytest tests/parity/test_fit.py        (needs einops)

Their code stays outside this project (DiT's and SiT's is CC BY-NC). It runs in this process, so point these only at
checkouts of facebookresearch/DiT, willisma/SiT and whlzy/FiT.
"""

from __future__ import annotations

import importlib
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


class SwiGLU(nn.Module):
    """timm's: the SiLU of one linear times another, then a third."""

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(in_features, hidden_features, bias=bias)
        self.fc1_x = nn.Linear(in_features, hidden_features, bias=bias)
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1_g(x)) * self.fc1_x(x))


# Module -> what is taken from it. The last three are FiT's: triton is imported for nothing, sincos was never released,
# and eval_utils, which wants diffusers and more, only loads checkpoints.
STAND_INS: dict[str, dict[str, Any]] = {
    "timm": {},
    "timm.models": {},
    "timm.models.vision_transformer": {"PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp},
    "timm.layers": {},
    "timm.layers.mlp": {"SwiGLU": SwiGLU, "Mlp": Mlp},
    "triton": {},
    "triton.language": {},
    "fit.model.sincos": {"get_2d_sincos_pos_embed_from_grid": None},
    "fit.utils.eval_utils": {"init_from_ckpt": None},
}


@contextmanager
def _stand_ins() -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in STAND_INS}
    modules = {name: ModuleType(name) for name in STAND_INS}
    for name, module in modules.items():
        vars(module).update(STAND_INS[name])
    vars(modules["triton"]).update(language=modules["triton.language"])
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
    """The models of the checkout that $PLIANT_OFFICIAL_DIT, _SIT or _FIT points at; skips the test without one."""
    variable = f"PLIANT_OFFICIAL_{kind.upper()}"
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a checkout of the official repository to compare with its code")
    if kind == "fit":
        pytest.importorskip("einops")
        sys.path.insert(0, os.environ[variable])
        try:
            with _stand_ins():
                return importlib.import_module("fit.model.fit_model")
        finally:
            sys.path.remove(os.environ[variable])
    file = Path(os.environ[variable]) / "models.py"
    spec = importlib.util.spec_from_file_location(f"official_{kind}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


@torch.no_grad()
def official_network(kind: str, **sizes: Any) -> nn.Module:
    """A DiT, SiT or FiT of the official code in eval mode, every parameter but the positions random."""
    network = getattr(official_models(kind), {"dit": "DiT", "sit": "SiT", "fit": "FiT"}[kind])(**sizes).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network
