"""A DiT that runs at several patch sizes (FlexiDiT, arXiv 2502.20126).

Recipe "lora": the base stays frozen and untouched; each new size owns a tokeniser, a head, a patch-size embedding and
low-rank deltas. Recipe "shared": the base is a DiT stored at the underlying patch size p'; every size, the original
included, reads and writes patches through projections of the stored weights, and all weights train together.

Either way a size can be *materialised* into a plain DiT: projections applied, deltas merged, embedding and affine
norm folded into the position table and the head. Inference runs plain networks only.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.adapters.spec import FlexSpec
from pliant.compute import Compute
from pliant.errors import ConfigError, PlanError
from pliant.models.dit import DiT, DiTConfig, embed_patches
from pliant.models.layers import LowRank, modulated_norm
from pliant.models.network import Backbone, Size
from pliant.models.patches import (
    Resample,
    kernel_projection,
    patch_name,
    resize_head,
    resize_kernel,
    resize_matrix,
    unpatchify,
)
from pliant.models.positions import patch_positions

LORA_LAYERS = ("qkv", "proj", "fc1", "fc2")


class Tokenizer(nn.Module):
    """Own weights of one new patch size (recipe "lora"), initialised from the base."""

    def __init__(self, base: DiT, patch: tuple[int, int], spec: FlexSpec) -> None:
        super().__init__()
        own = base.config.patch_size
        averaging = spec.averaging(own, patch)
        down = resize_matrix(patch, own, averaging)  # W_new = B_{new->own}^T W0
        # V_new = B_{own->new} V0. Alignment needs the right inverse of averaging, which repeats.
        up = resize_matrix(own, patch, "area" if spec.initialisation == "noise-aligned" else "bilinear")
        self.weight = nn.Parameter(resize_kernel(base.patch_embed.weight.data, down.T, patch))
        self.bias = nn.Parameter(base.patch_embed.bias.data.clone())
        self.head_weight = nn.Parameter(resize_head(base.head.weight.data, up))
        self.head_bias = nn.Parameter(resize_head(base.head.bias.data, up))

    def kernel(self, base: DiT) -> tuple[Tensor, Tensor]:
        """Weight (D, C, ph, pw) and bias (D,) that embed patches."""
        return self.weight, self.bias

    def head(self, base: DiT) -> tuple[Tensor, Tensor]:
        """Weight (ph*pw*C_out, D) and bias that predict patches."""
        return self.head_weight, self.head_bias


class Projection(nn.Module):
    """Reads the base's stored weights (patch size p') at another size (recipe "shared", sheet A 1.2-1.3)."""

    kernel_matrix: Tensor
    head_matrix: Tensor

    def __init__(self, patch: tuple[int, int], stored: tuple[int, int], spec: FlexSpec) -> None:
        super().__init__()
        self.patch = patch
        down = spec.averaging(patch, stored)
        up: Resample = "area" if spec.initialisation == "noise-aligned" else "bilinear"
        self.register_buffer("kernel_matrix", kernel_projection(stored, patch, down), persistent=False)
        self.register_buffer("head_matrix", torch.linalg.pinv(resize_matrix(patch, stored, up)), persistent=False)

    def kernel(self, base: DiT) -> tuple[Tensor, Tensor]:
        """Weight (D, C, ph, pw) and bias (D,) that embed patches."""
        return resize_kernel(base.patch_embed.weight, self.kernel_matrix, self.patch), base.patch_embed.bias

    def head(self, base: DiT) -> tuple[Tensor, Tensor]:
        """Weight (ph*pw*C_out, D) and bias that predict patches."""
        return resize_head(base.head.weight, self.head_matrix), resize_head(base.head.bias, self.head_matrix)


class PatchMode(nn.Module):
    """Everything one patch size adds to the shared blocks."""

    positions: Tensor

    def __init__(self, base: DiT, patch: tuple[int, int], own: tuple[int, int], spec: FlexSpec) -> None:
        super().__init__()
        config = base.config
        self.patch = patch
        self.grid = config.grid(patch)
        self.norm = spec.norm
        lora = spec.recipe == "lora"
        self.weights: Tokenizer | Projection
        self.weights = Tokenizer(base, patch, spec) if lora else Projection(patch, config.patch_size, spec)
        self.register_buffer(
            "positions", patch_positions(self.grid, patch, own, config.width, spec.position), persistent=False
        )
        self.embedding = nn.Parameter(torch.zeros(config.width))
        # layernorm would change the original size; there it degrades to the affine part, which starts as identity.
        self.normalise = self.norm == "layernorm" and patch != own
        if self.norm != "none":
            self.scale_in = nn.Parameter(torch.ones(config.width))
            self.shift_in = nn.Parameter(torch.zeros(config.width))
            self.scale_out = nn.Parameter(torch.ones(config.width))
            self.shift_out = nn.Parameter(torch.zeros(config.width))
        self.loras = nn.ModuleList()
        if lora:
            for block in base.blocks:
                layers = {name: getattr(block, name) for name in LORA_LAYERS}
                deltas = {
                    name: LowRank(layer.in_features, layer.out_features, spec.rank, spec.alpha or float(spec.rank))
                    for name, layer in layers.items()
                }
                self.loras.append(nn.ModuleDict(deltas))

    def affine(self, x: Tensor, place: str) -> Tensor:
        """The patch-size dependent norm at "in" (token stream) or "out" (input of the head)."""
        if self.norm == "none":
            return x
        if self.normalise:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(getattr(self, f"shift_{place}"), x, getattr(self, f"scale_{place}"))


class FlexiDiT(Backbone):
    """Several patch sizes over one set of blocks. Build with `pliant.flexify`, or from a stored spec."""

    family = "dit"
    config: DiTConfig

    def __init__(self, base: DiT, spec: FlexSpec) -> None:
        """`base` is modified in place in recipe "shared" (its tokeniser moves to the underlying size)."""
        super().__init__()
        spec.check(base.config)
        self.spec = spec
        self.config = base.config
        own = base.config.patch_size
        if spec.recipe == "shared":
            base = _stored_at_underlying(base, spec)
            sizes = (own, *spec.patch_sizes)
        else:
            sizes = spec.patch_sizes
        self.base = base
        self.modes = nn.ModuleDict({patch_name(p): PatchMode(base, p, own, spec) for p in sizes})
        # What is new lives where the base lives and is stored as it is; tables and projections keep their precision.
        self.modes.to(base.head.weight.device)
        for parameter in self.modes.parameters():
            parameter.data = parameter.data.to(base.head.weight.dtype)
        if spec.recipe == "lora":
            self.base.requires_grad_(False)

    @property
    def patch_sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes that can be run, the original first."""
        return (self.config.patch_size, *self.spec.patch_sizes)

    def plain(self, patch: Size, merged: bool = True, extrapolation: str = "none") -> DiT | None:
        """The materialised mode; None where adapters stay apart or a LayerNorm cannot be folded."""
        return None if not merged or self.spec.norm == "layernorm" else self.materialize((patch[0], patch[-1]))

    def check_compute(self, compute: Compute) -> None:
        if not compute.plain and (not compute.merged or self.spec.norm == "layernorm"):
            raise PlanError("sites, caches and token subsets need merged adapters and a network without LayerNorms")

    def mode(self, patch: tuple[int, int] | None) -> PatchMode | None:
        """The mode of a size; None stands for the untouched base. Raises ConfigError for a size never added."""
        patch = patch or self.config.patch_size
        name = patch_name(patch)
        if name in self.modes:
            return cast(PatchMode, self.modes[name])
        if patch == self.config.patch_size:
            return None
        known = ", ".join(patch_name(p) for p in self.patch_sizes)
        raise ConfigError(f"this model has patch sizes {known}, not {name}; add it with pliant.flexify")

    def aligned_pixels(self, patch: tuple[int, int] | None) -> int:
        """Fine pixels per coarse one if calls at this size are noise-aligned, else 1."""
        if patch is None or self.spec.initialisation != "noise-aligned" or patch == self.config.patch_size:
            return 1
        own = self.config.patch_size
        return (patch[0] // own[0]) * (patch[1] // own[1])

    def forward(self, x: Tensor, t: Tensor, y: Tensor, patch: tuple[int, int] | None = None) -> Tensor:
        """As `DiT.forward`, at a patch size (None: the original)."""
        mode = self.mode(patch)
        if mode is None:
            out: Tensor = self.base(x, t, y)
            return out
        tokens, m = self.embed(x, patch), self.base.modulations(t, y)
        for i, block in enumerate(self.base.blocks):
            tokens = block(tokens, m[:, 6 * i : 6 * i + 6], mode.loras[i] if mode.loras else None)
        return self.read(tokens, m, patch)

    def embed(self, x: Tensor, patch: tuple[int, int] | None = None) -> Tensor:
        """As `DiT.embed`, at a patch size."""
        mode = self.mode(patch)
        if mode is None:
            return self.base.embed(x)
        self.config.check_input(x)
        weight, bias = mode.weights.kernel(self.base)
        places = (mode.positions + mode.embedding).to(weight.dtype)
        return mode.affine(embed_patches(x, weight, bias) + places, "in")

    def read(self, tokens: Tensor, modulations: Tensor, patch: tuple[int, int] | None = None) -> Tensor:
        """As `DiT.read`, at a patch size."""
        mode = self.mode(patch)
        if mode is None:
            return self.base.read(tokens, modulations)
        tokens = mode.affine(modulated_norm(tokens, modulations[:, -2], modulations[:, -1], 1e-6), "out")
        return unpatchify(F.linear(tokens, *mode.weights.head(self.base)), mode.grid, mode.patch)

    @torch.no_grad()
    def materialize(self, patch: tuple[int, int] | None = None) -> DiT:
        """A plain DiT that computes this size: deltas merged, everything foldable folded. Shares unchanged weights.

        Raises ConfigError for `patch_norm="layernorm"`, which is not linear and cannot be folded.
        """
        mode = self.mode(patch)
        if mode is None:
            return self.base
        if mode.normalise:
            raise ConfigError("patch_norm='layernorm' cannot be folded into a plain network; run it unmerged")
        with torch.device("meta"):
            plain = DiT(self.base.with_patch_size(mode.patch))
        weight, bias = (w.detach() for w in mode.weights.kernel(self.base))
        head_weight, head_bias = (w.detach() for w in mode.weights.head(self.base))
        positions = mode.positions + mode.embedding
        if mode.norm == "affine":
            # scale_in*(Wx + b + pos) + shift_in and V(scale_out*h + shift_out) + c are again a kernel, table and head.
            weight = weight * mode.scale_in[:, None, None, None]
            bias = bias * mode.scale_in + mode.shift_in
            positions = positions * mode.scale_in
            head_bias = head_bias + head_weight @ mode.shift_out
            head_weight = head_weight * mode.scale_out
        state = {k: v for k, v in self.base.state_dict().items() if not k.startswith(("patch_embed", "head"))}
        state |= {"patch_embed.weight": weight, "patch_embed.bias": bias}
        state |= {"head.weight": head_weight, "head.bias": head_bias}
        for i, deltas in enumerate(mode.loras):
            for name in LORA_LAYERS:
                key = f"blocks.{i}.{name}.weight"
                state[key] = state[key] + deltas[name].delta()  # type: ignore[index]
        plain.load_state_dict(state, assign=True)
        plain.positions = positions
        return plain.requires_grad_(False)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Only the tensors that flexification added (recipe "lora"): small enough to share on their own."""
        if self.spec.recipe != "lora":
            raise ConfigError("recipe 'shared' trains every weight; there is no separate adapter to save")
        return {f"modes.{k}": v for k, v in self.modes.state_dict().items()}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `adapter_state_dict`. Raises ConfigError naming tensors that are missing or do not belong."""
        expected = self.adapter_state_dict()
        wrong = sorted(set(expected) ^ set(state)) or [k for k in expected if expected[k].shape != state[k].shape]
        if wrong:
            raise ConfigError(f"this adapter was made for another model: tensor {wrong[0]!r} does not match")
        self.modes.load_state_dict({k.removeprefix("modes."): v for k, v in state.items()})


def _stored_at_underlying(base: DiT, spec: FlexSpec) -> DiT:
    """The same network, its tokeniser and head stored at p' so that reading at the own size is exact (A 1.2-1.3)."""
    own, stored = base.config.patch_size, spec.stored_size(base.config.patch_size)
    down = resize_matrix(stored, own, spec.averaging(own, stored))
    up = resize_matrix(own, stored, "area" if spec.initialisation == "noise-aligned" else "bilinear")
    grown = DiT(base.with_patch_size(stored)).to(base.head.weight)
    state = base.state_dict()
    state["patch_embed.weight"] = resize_kernel(base.patch_embed.weight.data, down.T, stored)
    state["head.weight"] = resize_head(base.head.weight.data, up)
    state["head.bias"] = resize_head(base.head.bias.data, up)
    grown.load_state_dict(state)
    return grown
