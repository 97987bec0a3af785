"""Runs a lowered compute on a network seen as sites. No hooks, nothing kept in modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.compute.cache import Cache, Decision, GateState, Moment, Streams
from pliant.compute.gate import Gate
from pliant.compute.lowering import AddBranch, AddSpan, Mark, Operation, Run, RunStore, SiteProgram
from pliant.compute.sites import Branch, SiteModel, State


class Call:
    """One call: which network, which streams its rows are, when it happens, and the request's cache."""

    def __init__(
        self, program: SiteProgram, model: SiteModel, cache: Cache, network: Any, streams: Streams, moment: Moment
    ) -> None:
        """network: hashable name of the token grid and weights (patch size, ...): caches of others are not read."""
        self.program, self.model, self.cache = program, model, cache
        self.network, self.streams, self.moment = network, streams, moment

    @property
    def from_memory(self) -> bool:
        """Whether the answer is a kept output, so that the inputs are not looked at."""
        return self.program.miss_is_output and self.program.compute.gate is None

    def __call__(self, *inputs: Any) -> Tensor:
        """The network's output for its inputs, as the site model's `begin` takes them."""
        program = self.program
        if self.from_memory:
            return self._kept_output(None)
        state, context = self.model.begin(*inputs)
        if program.compute.gate is not None:
            return self._gated(state, context, program.compute.gate)
        state = self._play(program.miss, state, context, {}, None, len(state[0]))
        return self._finish(state, context, None, len(state[0]))

    def _gated(self, state: State, context: Any, gate: Gate) -> Tensor:
        """Probe, decide per row, and run both groups as batches of their own."""
        program, total = self.program, len(state[0])
        marks: dict[int, State] = {}
        before = state
        state = self._play(program.probe, state, context, marks, None, total)
        signal = state[0] - before[0] if gate.signal == "residual" else self._seen(state, context)
        hit = self._decide(gate, signal)
        self.cache.decisions.append(Decision(self.moment.step, self.streams, tuple(hit.tolist())))
        if bool(hit.all()):
            return self._hit(state, context, None)
        if not bool(hit.any()):
            state = self._play(program.miss, state, context, marks, None, total)
            return self._finish(state, context, None, total)
        out: Tensor | None = None
        for missed in (True, False):
            rows = torch.nonzero(hit != missed).flatten().to(state[0].device)
            part = tuple(s[rows] for s in state)
            inner = self.model_rows(context, rows, total)
            if missed:
                cut = {site: tuple(s[rows] for s in marked) for site, marked in marks.items()}
                value = self._finish(self._play(program.miss, part, inner, cut, rows, total), inner, rows, total)
            else:
                value = self._hit(part, inner, rows)
            out = value.new_empty(total, *value.shape[1:]) if out is None else out
            out[rows] = value
        assert out is not None
        return out

    def model_rows(self, context: Any, rows: Tensor, total: int) -> Any:
        """The context of some rows of the batch."""
        select = getattr(self.model, "rows", None)
        return take_rows(context, rows, total) if select is None else select(context, rows, total)

    def _seen(self, state: State, context: Any) -> Tensor:
        assert self.program.compute.gate is not None
        return self.model.norm(self.program.compute.gate.probe, state, context)[0]

    def _hit(self, state: State, context: Any, rows: Tensor | None) -> Tensor:
        if self.program.hit_is_output:
            return self._kept_output(rows)
        return self.model.head(self._play(self.program.hit, state, context, {}, rows, 0), context)

    def _kept_output(self, rows: Tensor | None) -> Tensor:
        reuse = self.program.compute.reuse
        assert reuse is not None
        key = (self.network, ("out", 0, self.program.sites))
        out = self.cache.read(key, self.streams, reuse, self.moment, None, rows)[0]
        assert out is not None
        return out

    def _finish(self, state: State, context: Any, rows: Tensor | None, total: int) -> Tensor:
        out = self.model.head(state, context)
        if self.program.write_output:
            self._write(("out", 0, self.program.sites), (out,), rows, total)
        return out

    def _play(
        self,
        operations: Sequence[Operation],
        state: State,
        context: Any,
        marks: dict[int, State],
        rows: Tensor | None,
        total: int,
    ) -> State:
        """The operations one after the other; marks: states at the beginnings of spans that are being written."""
        model, reuse = self.model, self.program.compute.reuse
        for op in operations:
            if isinstance(op, Run):
                state = model.run(op.first, op.last, state, context)
            elif isinstance(op, RunStore):
                branch = model.inner(op.site, model.norm(op.site, state, context), context)
                self._write(("branch", op.site, op.site + 1), branch, rows, total)
                state = model.add(op.site, state, branch, context)
            elif isinstance(op, AddBranch):
                assert reuse is not None
                key = (self.network, ("branch", op.site, op.site + 1))
                branch = self.cache.read(key, self.streams, reuse, self.moment, state[0].dtype, rows)
                state = model.add(op.site, state, branch, context)
            elif isinstance(op, AddSpan):
                assert reuse is not None
                key = (self.network, ("span", op.first, op.last))
                change = self.cache.read(key, self.streams, reuse, self.moment, state[0].dtype, rows)
                state = tuple(s if c is None else s + c for s, c in zip(state, change, strict=True))
            elif isinstance(op, Mark):
                marks[op.site] = state
            else:
                change = tuple(now - then for now, then in zip(state, marks[op.first], strict=True))
                self._write(("span", op.first, op.last), change, rows, total)
        return state

    def _write(self, slot: tuple[str, int, int], value: Branch, rows: Tensor | None, total: int) -> None:
        if rows is None:
            self.cache.write((self.network, slot), self.streams, value, self.moment)
        else:
            self.cache.write_rows((self.network, slot), self.streams, value, rows, total, self.moment)

    def _decide(self, gate: Gate, signal: Tensor) -> Tensor:
        """(rows,) bool on the CPU: the one synchronisation of a gated call. Updates what the gate remembers."""
        program, rows = self.program, len(signal)
        reuse = program.compute.reuse
        key = (self.network, program.compute, self.streams)
        state = self.cache.gates.get(key)
        if state is None:
            nothing = torch.zeros(rows)
            state = GateState(signal, nothing.bool(), nothing, nothing.to(torch.int64))
            self.cache.gates[key] = state
        change = gate.change(signal, state.reference).cpu()
        total = state.total + change if gate.accumulate else change
        hit = state.known & (total < gate.threshold)
        if gate.max_run is not None:
            hit &= state.run < gate.max_run
        need = 1 if reuse is None else reuse.order + 1
        for slot in program.hit_slots:
            hit &= self.cache.counts((self.network, slot), self.streams, rows) >= need
        state.run = torch.where(hit, state.run + 1, 0)
        state.total = torch.where(hit, total, 0.0)
        if gate.reference == "last_step" or not bool(hit.any()):
            state.reference = signal
        else:
            keep = hit.to(signal.device).view(-1, *[1] * (signal.ndim - 1))
            state.reference = torch.where(keep, state.reference, signal)
        state.known = state.known | ~hit
        return hit


def take_rows(context: Any, rows: Tensor, total: int) -> Any:
    """Those rows of every tensor in a (nested) context whose first axis is the batch; others are left as they are."""
    if isinstance(context, Tensor):
        return context[rows] if context.ndim and len(context) == total and total > 1 else context
    if isinstance(context, tuple):
        return tuple(take_rows(c, rows, total) for c in context)
    if isinstance(context, list):
        return [take_rows(c, rows, total) for c in context]
    if isinstance(context, dict):
        return {k: take_rows(c, rows, total) for k, c in context.items()}
    return context
