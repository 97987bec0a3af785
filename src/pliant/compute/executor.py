"""Runs a lowered compute on a network seen as sites. No hooks, nothing kept in modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pliant.compute.cache import Cache, Decision, Moment, Streams
from pliant.compute.deciding import GateMemory, decide
from pliant.compute.gate import Gate
from pliant.compute.lowering import (
    AddBranch,
    AddSpan,
    Mark,
    Operation,
    PoolTokens,
    Run,
    RunStore,
    SiteProgram,
    SpreadTokens,
)
from pliant.compute.merging import match
from pliant.compute.pooling import averaged, copied_back
from pliant.compute.reuse import Reuse, branch_slot
from pliant.compute.routed import RoutedModel, routed_output
from pliant.compute.sites import Branch, SiteModel, State
from pliant.compute.subset import TokenModel, subset_output
from pliant.compute.tokens import Merge, Subset


class Call:
    """One call: which network, which streams its rows are, when it happens, and the request's cache."""

    def __init__(
        self,
        program: SiteProgram,
        model: SiteModel,
        cache: Cache,
        network: Any,
        streams: Streams,
        moment: Moment,
        sign: float = 1.0,
    ) -> None:
        """network: hashable name of the token grid and weights (patch size, ...): caches of others are not read.

        sign: -1 where the network predicts the negative of what its output means (so that "drift" means the same).
        """
        self.program, self.model, self.cache = program, model, cache
        self.network, self.streams, self.moment, self.sign = network, streams, moment, sign
        tokens = program.compute.tokens
        self.merge = tokens if isinstance(tokens, Merge) else None
        self.keeps_keys = "kv" in program.compute.write or isinstance(tokens, Subset)

    @property
    def from_memory(self) -> bool:
        """Whether the answer is a kept output, so that the inputs are not looked at."""
        return self.program.miss_whole == "out" and self.program.compute.gate is None

    def __call__(self, *inputs: Any) -> Tensor:
        """The network's output for its inputs, as the site model's `begin` takes them."""
        program = self.program
        if self.from_memory:
            return self._kept("out", None)
        x: Tensor = inputs[0]
        if program.miss_whole == "drift" and program.compute.gate is None:
            return self._drifted(x, None)
        if program.compute.gate is not None:
            return self._gated(inputs, program.compute.gate)
        state, context = self.model.begin(*inputs)
        if isinstance(program.compute.tokens, Subset) and program.compute.tokens.rule == "router":
            count = program.compute.tokens.count(state[0].shape[1])
            return routed_output(cast(RoutedModel, self.model), state, context, count)
        if isinstance(program.compute.tokens, Subset) and self.cache.regions.active is not None:
            active = self.cache.regions.active.repeat(len(self.streams), 1)
            return subset_output(self._tokens, state, context, active, self._keys, self._keep_keys)
        return self._miss(x, state, context, {}, None, len(state[0]))

    def _gated(self, inputs: tuple[Any, ...], gate: Gate) -> Tensor:
        """Probe, decide per row, and run both groups as batches of their own."""
        program, x = self.program, inputs[0]
        total = len(x)
        if gate.signal == "output":  # decided by the input alone
            hit, memory = self._decide(gate, x)
            if all(hit) and program.hit_whole in ("out", "drift"):
                return self._hit(x, (), None, None)
        state, context = self.model.begin(*inputs)
        before, marks = state, dict[int, State]()
        state = self._play(program.probe, state, context, marks, None, total)
        if gate.signal != "output":
            residual = gate.signal == "residual"
            signal = state[0] - before[0] if residual else self.model.norm(gate.probe, state, context)[0]
            hit, memory = self._decide(gate, signal)
        del before  # not held while the rest runs
        if all(hit):
            return self._hit(x, state, context, None)
        if not any(hit):
            out = self._miss(x, state, context, marks, None, total)
            if gate.signal == "output":
                memory.learn(x, out, range(total))
            return out
        merged: Tensor | None = None
        for missed in (True, False):
            chosen = [place for place, hits in enumerate(hit) if hits != missed]
            rows = torch.tensor(chosen, device=state[0].device)
            part = tuple(s[rows] for s in state)
            inner = self.model_rows(context, rows, total)
            if missed:
                cut = {site: tuple(s[rows] for s in marked) for site, marked in marks.items()}
                value = self._miss(x[rows], part, inner, cut, rows, total)
                if gate.signal == "output":
                    memory.learn(x[rows], value, chosen)
            else:
                value = self._hit(x[rows], part, inner, rows)
            if merged is None:
                merged = value.new_empty(total, *value.shape[1:])
            elif value.dtype != merged.dtype:  # kept by a call of another precision
                merged = merged.to(torch.promote_types(merged.dtype, value.dtype))
            merged[rows] = value.to(merged.dtype)
        assert merged is not None
        return merged

    @property
    def _tokens(self) -> TokenModel:
        """The network as one whose tokens can be told apart; the engine gives such a one where that is needed."""
        return cast(TokenModel, self.model)

    def _keys(self, s: int) -> Branch:
        """The newest keys and values of attention site s."""
        return self.cache.read((self.network, ("kv", s, s + 1)), self.streams, Reuse(), self.moment)

    def _keep_keys(self, s: int, kept: Branch) -> None:
        self.cache.write((self.network, ("kv", s, s + 1)), self.streams, kept, self.moment)

    def _branch(self, s: int, state: State, context: Any) -> Branch:
        """Site s before its gate, on merged tokens or keeping its keys and values where the compute says so."""
        model = self.model
        seen = model.norm(s, state, context)
        if model.sites[s].kind == "attention":
            if self.merge is not None:
                found = match(state[0], self._tokens.grid, self.merge, self.moment.step)
                if found is not None:
                    (few,) = model.inner(s, (found.merge(seen[0]),), context)
                    assert few is not None
                    return (found.unmerge(few),)
            if self.keeps_keys:
                branch, kept = self._tokens.keyed(s, seen, context)
                self._keep_keys(s, kept)
                return branch
        return model.inner(s, seen, context)

    def _run(self, first: int, last: int, state: State, context: Any) -> State:
        """Sites first..last-1, kept nothing of but keys and values."""
        if self.merge is None and not self.keeps_keys:
            return self.model.run(first, last, state, context)
        for s in range(first, last):
            state = self.model.add(s, state, self._branch(s, state, context), context)
        return state

    def model_rows(self, context: Any, rows: Tensor, total: int) -> Any:
        """The context of some rows of the batch."""
        select = getattr(self.model, "rows", None)
        return take_rows(context, rows, total) if select is None else select(context, rows, total)

    def _hit(self, x: Tensor, state: State, context: Any, rows: Tensor | None) -> Tensor:
        whole = self.program.hit_whole
        if whole == "out":
            return self._kept("out", rows)
        if whole == "drift":
            return self._drifted(x, rows)
        if whole == "state":
            return self.model.head(self._kept_state(state, rows), context)
        return self.model.head(self._play(self.program.hit, state, context, {}, rows, 0), context)

    def _kept(self, kind: str, rows: Tensor | None) -> Tensor:
        """The forecast of the whole network's output, or of its drift."""
        reuse = self.program.compute.reuse
        assert reuse is not None
        key = (self.network, (kind, 0, self.program.sites))
        out = self.cache.read(key, self.streams, reuse, self.moment, None, rows)[0]
        assert out is not None
        return out

    def _kept_state(self, state: State, rows: Tensor | None) -> State:
        """The forecast of what the head reads; state: of the same form, for its dtype."""
        reuse = self.program.compute.reuse
        assert reuse is not None
        key = (self.network, ("state", 0, self.program.sites))
        kept = self.cache.read(key, self.streams, reuse, self.moment, state[0].dtype, rows)
        return tuple(s if k is None else k for s, k in zip(state, kept, strict=True))

    def _drifted(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """The input of now plus what the network added to its input then; further channels as they were."""
        out = self._kept("drift", rows).clone()
        out[:, : x.shape[1]] += self.sign * x
        return out

    def _miss(
        self, x: Tensor, state: State, context: Any, marks: dict[int, State], rows: Tensor | None, total: int
    ) -> Tensor:
        """The call's own sites from where the gate looked, the head, and what is kept of the whole."""
        whole = self.program.miss_whole
        if whole == "out":
            return self._kept("out", rows)
        if whole == "drift":
            return self._drifted(x, rows)
        if whole == "state":
            state = self._kept_state(state, rows)
        else:
            state = self._play(self.program.miss, state, context, marks, rows, total)
        out = self.model.head(state, context)
        for kind in self.program.write_whole:
            kept: Branch = state if kind == "state" else (out,)
            if kind == "drift":
                drift = out.clone()
                drift[:, : x.shape[1]] -= self.sign * x
                kept = (drift,)
            self._write((kind, 0, self.program.sites), kept, rows, total)
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
                state = self._run(op.first, op.last, state, context)
            elif isinstance(op, RunStore):
                if op.increment is None:
                    branch = kept = self._branch(op.site, state, context)
                else:
                    kept = model.traced(op.site, model.norm(op.site, state, context), op.increment, context)
                    branch = kept[:1]
                self._write((branch_slot(op.increment), op.site, op.site + 1), kept, rows, total)
                state = model.add(op.site, state, branch, context)
            elif isinstance(op, AddBranch):
                assert reuse is not None
                key = (self.network, (branch_slot(op.rank), op.site, op.site + 1))
                branch = self.cache.read(key, self.streams, reuse, self.moment, state[0].dtype, rows)
                if op.rank:
                    branch = model.corrected(op.site, model.norm(op.site, state, context), branch, op.rank, context)
                state = model.add(op.site, state, branch, context)
            elif isinstance(op, AddSpan):
                assert reuse is not None
                key = (self.network, ("span", op.first, op.last))
                change = self.cache.read(key, self.streams, reuse, self.moment, state[0].dtype, rows)
                state = tuple(s if c is None else s + c for s, c in zip(state, change, strict=True))
            elif isinstance(op, PoolTokens):
                means = averaged(state[0], self._tokens.grid, op.window)
                dense, state = state[0], (means, *state[1:])
            elif isinstance(op, SpreadTokens):
                state = (dense + copied_back(state[0] - means, self._tokens.grid, op.window), *state[1:])
                del dense, means
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

    def _decide(self, gate: Gate, signal: Tensor) -> tuple[list[bool], GateMemory]:
        """Which rows hit, and what the gate remembers of these streams."""
        program, rows = self.program, len(signal)
        key = (self.network, gate.memory, self.streams)
        memory = self.cache.gates.get(key)
        if memory is None:
            memory = self.cache.gates[key] = GateMemory(signal)
        need = 1 if program.compute.reuse is None else program.compute.reuse.order + 1
        counts = [self.cache.counts((self.network, slot), self.streams, rows) for slot in program.hit_slots]
        ready = [min(counted) >= need for counted in zip(*counts, strict=True)] if counts else [True] * rows
        voters = None
        if gate.deciders == "cond" and "cond" in self.streams:
            size = rows // len(self.streams)
            place = self.streams.index("cond") * size
            voters = list(range(place, place + size)) * len(self.streams)
        hit = decide(gate, memory, signal, ready, voters)
        self.cache.decisions.append(Decision(self.moment.step, self.streams, tuple(hit)))
        return hit, memory


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
