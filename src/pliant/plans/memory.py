"""Bytes of a batch before it runs: what is held at most, and what is moved. Estimates from shapes; tests say how good.

Counted are tensors: weights as loaded, the engine's converted or merged copies, modulation tables, states, cache and
the activations of the widest moment of a call. Not counted: Python and PyTorch themselves, kernels' scratch, files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.compute import Compute, TransformerShape
from pliant.compute.cost import parameter_count
from pliant.compute.lowering import Slot, write_slots
from pliant.compute.sites import parse_sites
from pliant.compute.spent import in_two_factors
from pliant.compute.tokens import Merge, Pool, Subset
from pliant.denoiser import Denoiser
from pliant.models.kernels import attention_scratch
from pliant.models.precision import resolve_precision
from pliant.plans.calls import Call, cache_depth, calls_of
from pliant.plans.engine import TABLE_BYTES
from pliant.plans.timing.table import plain_core, runs_unmerged
from pliant.solvers import Program

if TYPE_CHECKING:
    from pliant.plans.plan import Plan

ITEM = {"bf16": 2, "bf16-compiled": 2, "fp32": 4}
"""Bytes of a number of the residual stream, where the precision decides it; elsewhere as the weights are stored."""
LINEAR = {"bf16-mixed": 2, "int8d": 1}
"""Bytes per weight of the blocks' linears, where only those are converted."""

IN_ATTENTION = 8.0
"""Tensors of the residual stream's size alive there: state, normalised state, qkv, the heads' outputs twice, branch."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one batch."""

    weights: int
    """As loaded, guide included."""
    copies: int
    """Converted and merged networks that the plan's calls run."""
    tables: int
    states: int
    cache: int
    """Kept for later steps, at most."""
    activations: int
    """Of the widest moment of a call."""
    moved: int
    """Through memory in the whole run: weights once per call, activations of every site, the cache."""

    @property
    def peak(self) -> int:
        """Held at once, at most."""
        return self.weights + self.copies + self.tables + self.states + self.cache + self.activations


def plan_memory(plan: Plan, model: Denoiser, batch: int) -> Memory:
    """The bytes of `batch` images under a plan that the model can run."""
    program = plan.program(model)
    weights = sum(_stored(m) for m in (model, model.guide) if m is not None)
    networks: dict[object, int] = {}
    tables: dict[object, int] = {}
    kept: dict[object, int] = {}
    depth = cache_depth(plan)
    activations = moved = 0
    splits = model.device.type == "cpu"
    for evaluation in program.evaluations:
        for call in calls_of(plan.steps[evaluation.step]):
            own, compute = call.model(model), call.compute
            shape, item, rows = own.shape(compute), item_bytes(own, compute), batch * len(call.streams)
            key = (id(own), own.patch_of(compute), own.exit_of(compute), compute.scale, compute.merged)
            networks.setdefault((*key, compute.precision), copied_bytes(own, compute))
            labels = min(batch, own.num_classes) * any(s != "null" for s in call.streams) + ("null" in call.streams)
            row = (6 * shape.depth + 2) * shape.width * item
            tables[call] = min(tables.get(call, 0) + labels * row, max(TABLE_BYTES, labels * row))
            for slot, size in slots(compute, shape, item):
                for stream in call.streams:
                    place = (key, slot, stream)
                    kept[place] = min(kept.get(place, 0) + batch * size, depth * batch * size)
            here = rows * shape.tokens * shape.width * item
            gate = compute.gate
            if gate is not None:  # the signal that the next one is compared with, or states and outputs in float32
                numbers = shape.tokens * shape.patch_volume * (2 * shape.in_channels + shape.out_channels)
                kept[key, gate.memory, call.streams] = 4 * rows * numbers if gate.signal == "output" else here
            scores = attention_scratch(rows, shape.heads, *_attended(shape, compute)) if splits and item == 2 else 0
            widest = max(here * _widest(shape, compute), here * IN_ATTENTION + scores)
            activations = max(activations, round(widest) + rows * row * (rows > 1))
            moved += _weights_read(shape, item) + round(here * _passes(shape, compute))
            moved += sum(2 * rows * size for _, size in slots(compute, shape, item))
    state = batch * math.prod(model.sample_shape) * 4
    states = state * (_registers(program) + 4 * max(len(c.streams) for s in plan.steps for c in calls_of(s) or [_NONE]))
    return Memory(
        weights,
        sum(networks.values()),
        sum(tables.values()),
        states,
        sum(kept.values()),
        activations,
        moved,
    )


_NONE = Call(Compute(), ("cond",))


def item_bytes(model: Denoiser, compute: Compute) -> int:
    """Bytes of one number of the residual stream of a call."""
    stored = next(model.network.parameters()).element_size()
    if runs_unmerged(model, compute):
        return stored
    return ITEM.get(resolve_precision(compute.precision, plain_core(model)), stored)


def copied_bytes(model: Denoiser, compute: Compute) -> int:
    """Bytes that the engine's plain network for a call adds to the loaded weights."""
    core, stored = model.core, next(model.network.parameters()).element_size()
    if runs_unmerged(model, compute):
        return 0
    shape = model.shape(compute)
    precision = resolve_precision(compute.precision, plain_core(model))
    parameters = parameter_count(shape) + shape.tokens * shape.width  # and the table of positions
    linears = shape.width * (4 * shape.total_inner + shape.mlp_linears * shape.total_hidden)
    item = item_bytes(model, compute)
    if item != stored:
        return parameters * item
    merged = isinstance(core, FlexiDiT) and core.spec.recipe == "lora" and shape.patch != model.config.patch_size
    ends = parameters - shape.modulation_macs - linears if merged else 0
    own = linears * stored if merged and precision not in LINEAR else 0
    return own + linears * LINEAR.get(precision, 0) + min(ends, 4 * shape.tokens * shape.width) * stored * merged


def slots(compute: Compute, shape: TransformerShape, item: int) -> Iterator[tuple[Slot, int]]:
    """The cache places that a call writes, with their bytes per row."""
    state = shape.tokens * shape.width * item
    side = shape.width // shape.heads
    for slot in write_slots(compute, 2 * shape.depth):
        kind, first, _ = slot
        if kind in ("out", "drift"):
            yield slot, shape.tokens * shape.patch_volume * shape.out_channels * item
        elif kind == "kv":
            yield slot, 2 * shape.tokens * shape.total_inner * item
        elif kind.startswith("increment"):
            inner = side * (shape.block_heads[first // 2] if shape.block_heads else shape.heads)
            hidden = shape.block_hidden[first // 2] if shape.block_hidden else shape.mlp_hidden
            width, parts = (hidden, 1) if first % 2 else (inner, 3)
            yield slot, state + _increments(compute.increment or 0, shape.width, width, parts) * shape.tokens * item
        else:
            yield slot, state


def _increments(rank: int, width: int, inner: int, parts: int) -> int:
    """Numbers per token that a correction of a site keeps beside its branch: of its two linear layers, width to `parts`
    matrices of `inner` features, and back."""
    if rank == 0:
        return 0
    first = parts * (inner + rank) if in_two_factors(rank, width, inner) else 0
    return first + (rank if in_two_factors(rank, inner, width) else 0)


def _widest(shape: TransformerShape, compute: Compute) -> float:
    """Residual-stream-sized tensors alive at the widest moment of a call.

    In attention `IN_ATTENTION`. In the MLP: the block's input, the new state, its normalised form and the hidden
    features (GELU is fused into the product that makes them, except where increments keep both sides of it). Written
    spans hold the state where they begin, and without a gate the first one, as do calls that average or choose tokens
    and gates on the output.
    """
    ratio = shape.mlp_hidden / shape.width
    widest = max(IN_ATTENTION, 3.0 + ratio * (shape.mlp_linears - 1))  # both first linears of a gated MLP
    if compute.increment is not None:
        widest = max(widest, 4.0 + 2.0 * ratio)
    held = {first for first, _ in compute.spans}
    if isinstance(compute.tokens, Pool | Subset) or (compute.gate.signal == "output" if compute.gate else held):
        held.add(0)
    return widest + len(held)


def _attended(shape: TransformerShape, compute: Compute) -> tuple[int, int]:
    """Queries and keys of one image where a call attends to most."""
    kept = compute.tokens.count(shape.tokens) if isinstance(compute.tokens, Subset | Merge) else shape.tokens
    return kept, kept if isinstance(compute.tokens, Merge) else shape.tokens


def _passes(shape: TransformerShape, compute: Compute) -> float:
    """Residual-stream-sized tensors read or written by the sites of a call (sheet E, 10.3: 14 + 4m per block)."""
    letters = "R" * (2 * shape.depth) if compute.sites is None else parse_sites(compute.sites)
    ratio = shape.mlp_hidden / shape.width
    order = 0 if compute.reuse is None else compute.reuse.order
    return sum({"R": 7.0 + 2.0 * ratio, "C": 3.0 + order, "K": 0.0}[letter] for letter in letters)


def _weights_read(shape: TransformerShape, item: int) -> int:
    """Of a call whose modulations come from a table."""
    return (parameter_count(shape) - shape.modulation_macs) * item


def _stored(model: Denoiser) -> int:
    tensors = [*model.network.parameters(), *model.network.buffers()]
    if tensors[0].is_meta:
        return sum(t.numel() * t.element_size() for t in tensors)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _registers(program: Program) -> int:
    """States, outputs and noises alive at once, at most."""
    alive: set[object] = {("x", 0)}
    most = 1
    for op, dead in zip(program.instructions(), program.last_uses(), strict=True):
        alive.add(("m" if hasattr(op, "state") else "x", op.out))
        most = max(most, len(alive))
        alive -= set(dead)
    return most


