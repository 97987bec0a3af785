"""The official DiT and SiT networks, re-implemented from sheet A (section 3.1) as slowly and plainly as possible.

A dictionary of tensors under the official names goes in, arithmetic step by step comes out: one adaLN linear per block,
one attention head at a time, one patch at a time. Nothing is shared with `pliant.models`.

Compared once with the official repositories (facebookresearch/DiT, willisma/SiT, run outside this project) on random
non-zero weights: see `test_official.py`, which repeats that comparison where checkouts are available.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The constructor arguments of the official classes."""

    input_size: int = 8
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 64
    depth: int = 2
    num_heads: int = 4
    num_classes: int = 5
    learn_sigma: bool = True

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def official_arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def positions(side: int, width: int) -> Tensor:
    """(1, side*side, width): the column's code, then the row's; each sines, then cosines."""
    rows = []
    for row in range(side):
        for column in range(side):
            code = []
            for place in (column, row):
                angles = [place * 10000.0 ** (-k / (width / 4)) for k in range(width // 4)]
                code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(code)
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def random_state(sizes: Sizes, seed: int = 0, std: float = 0.1) -> dict[str, Tensor]:
    """An official state dict in which every tensor but the positions is random."""
    d, p, c = sizes.hidden_size, sizes.patch_size, sizes.in_channels
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, c, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (sizes.num_classes + 1, d),
    }
    for i in range(sizes.depth):
        for name, (rows, columns) in {
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
            "adaLN_modulation.1": (6 * d, d),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    out = p * p * sizes.out_channels
    shapes |= {
        "final_layer.linear.weight": (out, d),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    generator = torch.Generator().manual_seed(seed)
    state = {name: std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {"pos_embed": positions(sizes.input_size // p, d), **state}


def affine(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def condition(state: dict[str, Tensor], t: Tensor, y: Tensor) -> Tensor:
    # In fp32, as the sheet says: at t = 999 one rounding of a frequency is 6e-5 of an angle.
    frequencies = torch.exp(torch.tensor([-math.log(10000.0)]) * torch.arange(128.0) / 128)
    angles = t.float()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(affine(state, "t_embedder.mlp.0", features))
    return affine(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][y]


def tokens_of(state: dict[str, Tensor], sizes: Sizes, x: Tensor) -> Tensor:
    p, out = sizes.patch_size, []
    kernel = state["x_embedder.proj.weight"].flatten(1)
    for top in range(0, sizes.input_size, p):
        for left in range(0, sizes.input_size, p):
            patch = x[:, :, top : top + p, left : left + p].flatten(1)
            out.append(patch @ kernel.T + state["x_embedder.proj.bias"])
    return torch.stack(out, dim=1) + state["pos_embed"]


def attention(state: dict[str, Tensor], sizes: Sizes, block: str, x: Tensor) -> Tensor:
    d, heads = sizes.hidden_size, sizes.num_heads
    size = d // heads
    qkv = affine(state, f"{block}.attn.qkv", x)
    out = []
    for h in range(heads):
        q, k, v = (qkv[..., part * d + h * size : part * d + (h + 1) * size] for part in range(3))
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), dim=-1)
        out.append(weights @ v)
    return affine(state, f"{block}.attn.proj", torch.cat(out, dim=-1))


def image_of(sizes: Sizes, tokens: Tensor) -> Tensor:
    p, c, side = sizes.patch_size, sizes.out_channels, sizes.input_size // sizes.patch_size
    image = torch.zeros(len(tokens), c, sizes.input_size, sizes.input_size)
    for index in range(side * side):
        top, left = p * (index // side), p * (index % side)
        for place in range(p * p):
            pixel = tokens[:, index, place * c : (place + 1) * c]
            image[:, :, top + place // p, left + place % p] = pixel
    return image


def dit(state: dict[str, Tensor], sizes: Sizes, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT.forward: (B, C, H, W), (B,), (B,) -> (B, out_channels, H, W)."""
    c = F.silu(condition(state, t, y))
    tokens = tokens_of(state, sizes, x)
    for i in range(sizes.depth):
        block = f"blocks.{i}"
        parts = affine(state, f"{block}.adaLN_modulation.1", c)[:, None].chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        tokens = tokens + gate * attention(state, sizes, block, norm(tokens) * (1 + scale) + shift)
        shift, scale, gate = parts[3:]
        hidden = affine(state, f"{block}.mlp.fc1", norm(tokens) * (1 + scale) + shift)
        tokens = tokens + gate * affine(state, f"{block}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
    shift, scale = affine(state, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    return image_of(sizes, affine(state, "final_layer.linear", norm(tokens) * (1 + scale) + shift))


def sit(state: dict[str, Tensor], sizes: Sizes, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """SiT.forward: DiT's without the second half of a learned-sigma output."""
    return dit(state, sizes, x, t, y)[:, : sizes.in_channels]


def with_guidance(
    forward: Any, state: dict[str, Tensor], sizes: Sizes, x: Tensor, t: Tensor, y: Tensor, s: float
) -> Tensor:
    """forward_with_cfg: the first half of x for both halves; y = labels, then null; three channels guided."""
    half = len(x) // 2
    out = forward(state, sizes, torch.cat([x[:half], x[:half]]), t, y)
    conditional, unconditional = out[:half, :3], out[half:, :3]
    guided = unconditional + s * (conditional - unconditional)
    return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)
