"""Several patch sizes in one network pass (FlexiDiT, arXiv 2502.20126; sheet A, 1.9).

A guided step often needs two calls on the same images: a long one (powerful, conditional) and a short one (weak, the
guidance). Both run through the same blocks, so their sequences can lie side by side in the rows of one batch: each
token attends to its own sequence only and keeps its own modulation, low-rank deltas, tokeniser and head.

- "padded": every sequence has a row of its own, short ones padded. A reference: the most FLOPs.
- "separate": one pass per call. The fewest FLOPs, the most kernel launches.
- "joined": row i holds sequence i of every call.
- "rows": long sequences have rows of their own, short ones share rows.

All four give the same predictions. They differ in speed, and only for networks that keep their weights shared between
patch sizes: a merged mode (`FlexiDiT.materialize`) is another network and runs separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pliant.adapters.flexible_dit import LORA_LAYERS, FlexiDiT
from pliant.compute import MATMUL, Convention, TransformerShape, cost_parts, macs
from pliant.errors import ConfigError, ShapeError, suggest
from pliant.models.layers import Delta, LowRank

Approach: TypeAlias = Literal["padded", "separate", "joined", "rows"]


@dataclass(frozen=True)
class Call:
    """The arguments of one `FlexiDiT` call on n images."""

    x: Tensor
    """(n, C, H, W)."""
    t: Tensor
    """(n,) network times."""
    y: Tensor
    """(n,) labels."""
    patch: tuple[int, int] | None = None
    """None: the original size."""


def packed_forward(network: FlexiDiT, calls: Sequence[Call], approach: Approach) -> list[Tensor]:
    """The outputs of all calls, each (n, out_channels, H, W), computed together. Differentiable.

    Equal to separate calls up to rounding. Raises ConfigError for an unknown approach, ShapeError when "joined" is
    asked to pair calls of different batch sizes.
    """
    if approach == "separate":
        return [network(call.x, call.t, call.y, call.patch) for call in calls]
    tokens = [network.embed(call.x, call.patch) for call in calls]
    modulations = [network.base.modulations(call.t, call.y) for call in calls]
    places = Places.of([len(x) for x in tokens], [x.shape[1] for x in tokens], approach, tokens[0].device)
    packed, all_modulations = places.pack(tokens), torch.cat(modulations)
    owner, mask = places.owner.clamp(min=0), places.mask()
    for i, block in enumerate(network.base.blocks):
        per_token = all_modulations[:, 6 * i : 6 * i + 6][owner].transpose(1, 2)  # (R, 6, L, D)
        packed = block(packed, per_token, _deltas(network, calls, places, i), mask)
    return [
        network.read(x, m, call.patch) for x, m, call in zip(places.unpack(packed), modulations, calls, strict=True)
    ]


def arrange(counts: Sequence[int], lengths: Sequence[int], approach: Approach) -> list[list[int]]:
    """Which sequences share a row, numbered call by call: call c has counts[c] sequences of lengths[c] tokens."""
    starts = [sum(counts[:c]) for c in range(len(counts))]
    if approach == "padded":
        return [[s] for s in range(sum(counts))]
    if approach == "joined":
        if len(set(counts)) != 1:
            raise ShapeError(f"packing 'joined' pairs calls of equal batch size, got {list(counts)}; use 'rows'")
        return [[start + i for start in starts] for i in range(counts[0])]
    if approach != "rows":
        raise ConfigError(f"unknown packing {approach!r}: {suggest(approach, get_args(Approach))}")
    rows: list[list[int]] = []
    room = 0
    for c in sorted(range(len(counts)), key=lambda c: -lengths[c]):  # longest first: only the last row has gaps
        for s in range(starts[c], starts[c] + counts[c]):
            if lengths[c] > room:
                rows.append([])
                room = max(lengths)
            rows[-1].append(s)
            room -= lengths[c]
    return rows


@dataclass(frozen=True)
class Places:
    """Where every token of every call lies in a batch of R rows of L tokens."""

    slots: tuple[Tensor, ...]
    """Per call: (n, N) positions in the flattened (R*L) batch."""
    owner: Tensor
    """(R, L) number of the sequence a token belongs to; -1: padding."""

    @staticmethod
    def of(counts: Sequence[int], lengths: Sequence[int], approach: Approach, device: torch.device) -> Places:
        rows = arrange(counts, lengths, approach)
        length_of = [n for count, n in zip(counts, lengths, strict=True) for _ in range(count)]
        width = max(sum(length_of[s] for s in row) for row in rows)
        owner = torch.full((len(rows), width), -1)
        first = torch.zeros(len(length_of), dtype=torch.long)
        for r, row in enumerate(rows):
            column = 0
            for s in row:
                owner[r, column : column + length_of[s]] = s
                first[s] = r * width + column
                column += length_of[s]
        slots = [f[:, None] + torch.arange(n) for f, n in zip(first.split(list(counts)), lengths, strict=True)]
        return Places(tuple(s.to(device) for s in slots), owner.to(device))

    def mask(self) -> Tensor:
        """(R, 1, L, L), True inside a sequence. Padding attends to padding, so that no row of the mask is empty."""
        return (self.owner[:, :, None] == self.owner[:, None, :])[:, None]

    def pack(self, tokens: Sequence[Tensor]) -> Tensor:
        """Per call (n, N, D) -> (R, L, D); padding is 0."""
        flat = torch.cat([x.flatten(0, 1) for x in tokens])
        packed = flat.new_zeros(self.owner.numel(), flat.shape[1])
        packed = packed.index_copy(0, torch.cat([s.flatten() for s in self.slots]), flat)
        return packed.view(*self.owner.shape, -1)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """(R, L, D) -> per call (n, N, D)."""
        return [packed.flatten(0, 1)[s] for s in self.slots]


def _deltas(network: FlexiDiT, calls: Sequence[Call], places: Places, block: int) -> dict[str, Delta] | None:
    """The low-rank deltas of one block by layer name, each on the tokens of its own calls."""
    parts: dict[str, list[tuple[Tensor, LowRank]]] = {name: [] for name in LORA_LAYERS}
    for call, slots in zip(calls, places.slots, strict=True):
        mode = network.mode(call.patch)
        if mode is not None and mode.loras:
            for name in LORA_LAYERS:
                parts[name].append((slots.flatten(), mode.loras[block][name]))  # type: ignore[index]
    return {name: _PartialDelta(part) for name, part in parts.items()} if parts["qkv"] else None


class _PartialDelta:
    """Low-rank deltas on given tokens, zero on all others."""

    def __init__(self, parts: list[tuple[Tensor, LowRank]]) -> None:
        self.slots = torch.cat([slots for slots, _ in parts])
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        values = torch.cat([lora(flat[slots]) for slots, lora in self.parts])
        delta = values.new_zeros(len(flat), values.shape[1]).index_copy(0, self.slots, values)
        return delta.view(*x.shape[:2], -1)


def packed_macs(
    shapes: Sequence[TransformerShape], counts: Sequence[int], approach: Approach, convention: Convention = MATMUL
) -> int:
    """Multiply-adds of `packed_forward` for calls of these shapes on counts[c] images.

    Masked attention is computed densely, so packing adds the pairs of tokens that do not see each other, and padding
    adds its tokens' linears.
    """
    separate = sum(n * macs(shape, convention) for shape, n in zip(shapes, counts, strict=True))
    if approach == "separate":
        return separate
    lengths = [shape.tokens for shape in shapes]
    owner = Places.of(counts, lengths, approach, torch.device("cpu")).owner
    rows, width = owner.shape
    one, parts = shapes[0], cost_parts(shapes[0])
    linears = (parts.self_projections + parts.mlp) // one.tokens
    padding = rows * width - sum(n * length for n, length in zip(counts, lengths, strict=True))
    pairs = rows * width**2 - sum(n * length**2 for n, length in zip(counts, lengths, strict=True))
    return separate + padding * linears + pairs * 2 * one.depth * one.width


def choose_packing(images: int, long: int, short: int, device: torch.device) -> Approach:
    """The approach that should be fastest for `images` pairs of sequences of `long` and `short` tokens.

    On a processor the cost is the FLOPs: "separate". On a GPU small batches leave the chip idle and a pass costs its
    kernel launches, so one pass beats two: "joined" while the short sequences do not even fill one long row, "rows"
    beyond (the paper finds it fastest for images > long/short). Joining long sequences wastes attention (10 % of the
    FLOPs at 4096 + 1024 tokens) that a GPU notices, so there the calls stay separate until rows can be filled.
    The processor's side is measured (DiT-S/2 with patches of 4, one core, time over "separate" for 1, 4, 8 images:
    "joined" 1.22, 1.40, 1.59; "rows" 1.9, 1.33, 1.54); the GPU's side follows the paper and awaits measurement.
    """
    if device.type == "cpu":
        return "separate"
    if images > long // short:
        return "rows"
    return "joined" if long <= 1024 else "separate"
