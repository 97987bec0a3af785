"""What the adapters of diffusers' transformers share: whole blocks where all of a block runs, sites elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from pliant.compute.executor import take_rows
from pliant.compute.sites import Branch, Site, State
from pliant.errors import PlanError


@dataclass(frozen=True)
class Inputs:
    """What the blocks of one call read beside the tokens."""

    rows: Mapping[str, Any]
    """By name: tensors whose first axis is the batch (or 1), or None."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """By name: what all rows have in common."""
    modulations: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """By block, filled when a site of it first asks: several sites of a block share one product."""


class BlockSites:
    """A diffusers transformer as sites. Subclasses say what a block's sites are and how its forward is called.

    `run` hands whole blocks to the block module itself, so everything that lives in modules (LoRA layers, compiled
    blocks, attention processors) works; a site alone runs the same operations in the same order.
    """

    unsupported: tuple[str, ...] = ()
    """Arguments of `forward` that change what happens between blocks; they must be None."""

    def __init__(self, transformer: Any, blocks: list[Any], kinds: list[tuple[str, ...]]) -> None:
        """kinds: of every block's sites, in order."""
        self.transformer = transformer
        self.blocks = blocks
        self.sites = tuple(Site(kind, i) for i, names in enumerate(kinds) for kind in names)
        self.starts = tuple(sum(len(names) for names in kinds[:i]) for i in range(len(kinds) + 1))
        """First site of every block, and the number of sites."""
        self._whole = {a: (i, b) for i, (a, b) in enumerate(pairwise(self.starts))}

    # What a subclass fills in -----------------------------------------------------------------------------------------

    def begin(self, x: Tensor, arguments: Mapping[str, Any]) -> tuple[State, Inputs]:
        """x: the latents; arguments: all others of the transformer's `forward`, by name."""
        raise NotImplementedError

    def modulate(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """Shifts, scales and gates of a block."""
        raise NotImplementedError

    def block(self, block: int, state: State, context: Inputs) -> State:
        """The whole block, as the transformer calls it."""
        raise NotImplementedError

    def norm(self, s: int, state: State, context: Inputs) -> State:
        raise NotImplementedError

    def inner(self, s: int, seen: State, context: Inputs) -> Branch:
        raise NotImplementedError

    def add(self, s: int, state: State, branch: Branch, context: Inputs) -> State:
        raise NotImplementedError

    def head(self, state: State, context: Inputs) -> Tensor:
        raise NotImplementedError

    # The same for all -------------------------------------------------------------------------------------------------

    def run(self, first: int, last: int, state: State, context: Inputs) -> State:
        s = first
        while s < last:
            i, end = self._whole.get(s, (-1, last + 1))
            if end <= last:
                state, s = self.block(i, state, context), end
            else:
                state = self.add(s, state, self.inner(s, self.norm(s, state, context), context), context)
                s += 1
        return state

    def modulations(self, block: int, state: State, context: Inputs) -> tuple[Tensor, ...]:
        """As `modulate`, once per call."""
        if block not in context.modulations:
            context.modulations[block] = self.modulate(block, state, context)
        return context.modulations[block]

    def rows(self, context: Inputs, rows: Tensor, total: int) -> Inputs:
        """The context of some rows of the batch."""
        kept = {i: take_rows(m, rows, total) for i, m in context.modulations.items()}
        return Inputs(take_rows(dict(context.rows), rows, total), context.shared, kept)

    def traced(self, s: int, seen: State, rank: int, context: Inputs) -> Branch:
        raise PlanError("increments need Pliant's own DiT: a diffusers block does not show its linear layers")

    def corrected(self, s: int, seen: State, kept: Branch, rank: int, context: Inputs) -> Branch:
        raise PlanError("increments need Pliant's own DiT: a diffusers block does not show its linear layers")

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raises PlanError for arguments that a site program cannot honour."""
        for name in self.unsupported:
            if arguments.get(name) is not None:
                raise PlanError(f"{name} changes what happens between blocks; run this request without a cache")


def attention_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments for attention processors. Raises PlanError for those that `forward` itself would act on."""
    kept = dict(options or {})
    if kept.pop("scale", 1.0) != 1.0:
        raise PlanError("a LoRA scale in the attention arguments is not applied here; use set_adapters(..., weights)")
    if "gligen" in kept or any(name.startswith("ip_") for name in kept):
        raise PlanError("GLIGEN and IP adapters add to the tokens between sites; run this request without a cache")
    return kept


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D); shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def unpatched(x: Tensor, grid: tuple[int, int], patch: int, channels: int) -> Tensor:
    """Tokens (B, height * width, patch^2 * channels) -> (B, channels, height * patch, width * patch)."""
    height, width = grid
    x = x.reshape(-1, height, width, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, channels, height * patch, width * patch)
