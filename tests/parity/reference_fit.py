"""FiT and FiTv2, re-implemented from sheet B (section 1) as slowly and plainly as possible.

A dictionary of tensors under the official names goes in, arithmetic step by step comes out: one image at a time, one
attention head at a time, one pair of rotated features at a time, adaLN factors multiplied one block after the other.
Nothing is shared with `pliant.models`. Padding is built here too, with masks of ids as the official code has them.

Compared once with the official repository (whlzy/FiT, run outside this project) on random non-zero weights: see
`test_fit.py`, which repeats that comparison where a checkout is available.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parity.reference_dit import affine, condition, norm


@dataclass(frozen=True)
class FiTSizes:
    """The constructor arguments of the official class that matter."""

    version: Literal[1, 2] = 2
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 48
    depth: int = 2
    num_heads: int = 2
    num_classes: int = 5
    adaln_lora_dim: int = 12

    @property
    def mlp_hidden(self) -> int:
        """4D for v1, two thirds of it for v2."""
        return 4 * self.hidden_size if self.version == 1 else 4 * self.hidden_size * 2 // 3

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.version == 1 else 1)

    def official_arguments(self) -> dict[str, Any]:
        """As in the released configs of FiT-XL and FiTv2-XL."""
        sizes = {"patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"}
        shared = {name: getattr(self, name) for name in sizes} | {"use_swiglu": True, "rel_pos_embed": "rope"}
        if self.version == 1:
            return {**shared, "learn_sigma": True, "use_swiglu_large": True}
        return {
            **shared,
            "learn_sigma": False,
            "use_sit": True,
            "q_norm": "layernorm",
            "k_norm": "layernorm",
            "adaln_type": "lora",
            "adaln_lora_dim": self.adaln_lora_dim,
        }


def random_fit_state(sizes: FiTSizes, seed: int = 0, std: float = 0.1) -> dict[str, Tensor]:
    """An official state dict in which every tensor is random."""
    d, h, r = sizes.hidden_size, sizes.mlp_hidden, sizes.adaln_lora_dim
    inputs = sizes.patch_size**2 * sizes.in_channels
    linears: dict[str, tuple[int, int]] = {
        "x_embedder.proj": (d, inputs),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
    }
    if sizes.version == 2:
        linears["global_adaLN_modulation.1"] = (6 * d, d)
    for i in range(sizes.depth):
        block = f"blocks.{i}"
        linears |= {f"{block}.attn.qkv": (3 * d, d), f"{block}.attn.proj": (d, d)}
        linears |= {f"{block}.mlp.fc1_g": (h, d), f"{block}.mlp.fc1_x": (h, d), f"{block}.mlp.fc2": (d, h)}
        if sizes.version == 2:
            linears |= {f"{block}.adaLN_modulation.1": (r, d), f"{block}.adaLN_modulation.2": (6 * d, r)}
        else:
            linears[f"{block}.adaLN_modulation.1"] = (6 * d, d)
    linears["final_layer.linear"] = (sizes.patch_size**2 * sizes.out_channels, d)
    linears["final_layer.adaLN_modulation.1"] = (2 * d, d)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in linears.items():
        state[f"{name}.weight"] = std * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = std * torch.randn(shape[0], generator=generator)
    table = std * torch.randn(sizes.num_classes + 1, d, generator=generator)
    return {**state, "y_embedder.embedding_table.weight": table}


# Positions ---------------------------------------------------------------------------------------------------------


def axis_frequencies(dim: int, rule: str, n: int, trained: int, theta: float = 10000.0) -> list[float]:
    """Of an axis n tokens long, trained on `trained`; `rule` in the official code's words."""
    s = max(n / trained, 1.0)

    def base(k: int) -> float:
        return theta ** (-2 * k / dim)

    def stretched(k: int) -> float:
        return (theta * s ** (dim / (dim - 2))) ** (-2 * k / dim)

    def bound(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def kept(k: int, fast: float, slow: float) -> float:
        low, high = max(math.floor(bound(fast)), 0), min(math.ceil(bound(slow)), dim - 1)
        ramp = (k - low) / (high - low if high != low else 0.001)
        return 1 - min(max(ramp, 0.0), 1.0)

    out = []
    for k in range(dim // 2):
        if rule == "normal":
            value = base(k)
        elif rule == "linear":
            value = base(k) / s
        elif rule.startswith("ntk-aware"):
            value = stretched(k)
        elif rule == "yarn":
            m = kept(k, 32, 1)
            value = base(k) / s * (1 - m) + base(k) * m
        else:
            assert rule == "ntk-by-parts"
            m, own = kept(k, 1.25, 0.75), kept(k, 16, 2)
            value = (base(k) / s * (1 - m) + stretched(k) * m) * (1 - own) + base(k) * own
        out.append(value)
    return out


def rope_factor(rule: str, rows: int, columns: int, trained: int) -> float:
    """What the code multiplies every cos and sin by."""
    if rule == "yarn":
        s = max(max(rows, columns) / trained, 1.0)
        return 1.0 if s <= 1 else 0.1 * math.log(s) + 1
    if rule == "ntk-aware-pro1":
        seen = 2 * max(rows, columns)
        return math.sqrt(math.log(seen) / math.log(trained)) if seen > trained else 1.0
    if rule == "ntk-aware-pro2":
        seen = 2 * rows * columns
        return math.sqrt(math.log(seen) / math.log(trained**2)) if seen > trained**2 else 1.0
    return 1.0


def turned(v: Tensor, rows: int, columns: int, rule: str, decoupled: bool, trained: int) -> Tensor:
    """Every token's query or key (N, d) turned by its place in a grid of rows x columns, row-major."""
    half = v.shape[1] // 2
    longest = max(rows, columns)
    by_row = axis_frequencies(half, rule, rows if decoupled else longest, trained)
    by_column = axis_frequencies(half, rule, columns if decoupled else longest, trained)
    factor = rope_factor(rule, rows, columns, trained)
    out = torch.empty_like(v)
    for token in range(rows * columns):
        y, x = divmod(token, columns)
        angles = [y * f for f in by_row] + [x * f for f in by_column]
        for k, angle in enumerate(angles):
            a, b = v[token, 2 * k], v[token, 2 * k + 1]
            out[token, 2 * k] = factor * (a * math.cos(angle) - b * math.sin(angle))
            out[token, 2 * k + 1] = factor * (b * math.cos(angle) + a * math.sin(angle))
    return out


# The network -------------------------------------------------------------------------------------------------------


def tokens_of_image(image: Tensor, p: int) -> Tensor:
    """(C, H, W) -> (N, C*p*p), channel slowest."""
    _, height, width = image.shape
    patches = [image[:, i : i + p, j : j + p].flatten() for i in range(0, height, p) for j in range(0, width, p)]
    return torch.stack(patches)


def image_of_tokens(tokens: Tensor, channels: int, rows: int, columns: int, p: int) -> Tensor:
    """(N, C*p*p) -> (C, H, W)."""
    image = torch.empty(channels, rows * p, columns * p)
    for index, token in enumerate(tokens):
        top, left = p * (index // columns), p * (index % columns)
        image[:, top : top + p, left : left + p] = token.view(channels, p, p)
    return image


def modulation(state: dict[str, Tensor], sizes: FiTSizes, block: str, c: Tensor) -> list[Tensor]:
    first = affine(state, f"{block}.adaLN_modulation.1", c)
    if sizes.version == 2:
        first = affine(state, f"{block}.adaLN_modulation.2", first) + affine(state, "global_adaLN_modulation.1", c)
    return list(first.chunk(6))


def fit(
    state: dict[str, Tensor],
    sizes: FiTSizes,
    image: Tensor,
    t: float,
    y: int,
    rule: str = "normal",
    decoupled: bool = True,
    trained: int = 16,
) -> Tensor:
    """One image (C, H, W), network time, label -> (out_channels, H, W)."""
    p, d, heads = sizes.patch_size, sizes.hidden_size, sizes.num_heads
    rows, columns, width = image.shape[1] // p, image.shape[2] // p, d // heads
    c = F.silu(condition(state, torch.tensor([t]), torch.tensor([y]))[0])
    x = affine(state, "x_embedder.proj", tokens_of_image(image, p))
    for i in range(sizes.depth):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(state, sizes, block, c)
        qkv = affine(state, f"{block}.attn.qkv", norm(x) * (1 + scale1) + shift1)
        out = []
        for h in range(heads):
            q, k, v = (qkv[:, part * d + h * width : part * d + (h + 1) * width] for part in range(3))
            if sizes.version == 2:
                q, k = norm(q), norm(k)
            q, k = (turned(u, rows, columns, rule, decoupled, trained) for u in (q, k))
            out.append(torch.softmax(q @ k.T / math.sqrt(width), dim=-1) @ v)
        x = x + gate1 * affine(state, f"{block}.attn.proj", torch.cat(out, dim=1))
        seen = norm(x) * (1 + scale2) + shift2
        hidden = F.silu(affine(state, f"{block}.mlp.fc1_g", seen)) * affine(state, f"{block}.mlp.fc1_x", seen)
        x = x + gate2 * affine(state, f"{block}.mlp.fc2", hidden)
    shift, scale = affine(state, "final_layer.adaLN_modulation.1", c).chunk(2)
    out_tokens = affine(state, "final_layer.linear", norm(x) * (1 + scale) + shift)
    return image_of_tokens(out_tokens, sizes.out_channels, rows, columns, p)
