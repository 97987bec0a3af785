"""One sampling run's network calls: what the interpreter asks for at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pliant.compute import Cache, Moment
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance, Memory, guided
from pliant.guidance.rules import bands
from pliant.guidance.virtual_negative import virtual_rows
from pliant.paths import AlphaSigma
from pliant.plans.calls import Call, cache_depth, calls_of
from pliant.plans.engine import Answer, BoundCalls, Lowered, NetworkCall, packed_pair, share_tables
from pliant.plans.plan import Plan
from pliant.plans.refining import LastVelocity
from pliant.plans.regions import RegionKeeper
from pliant.solvers import Eval, Node, Output, Program
from pliant.solvers.interpreter import sample_coefficients


class Evaluator:
    """Picks the calls of an evaluation's step, runs and combines them. One per request: it owns what is remembered."""

    def __init__(
        self,
        model: Denoiser,
        plan: Plan,
        program: Program,
        lowered: Mapping[Call, Lowered],
        labels: Tensor,
        origin: Tensor | None = None,
    ) -> None:
        """origin: clean images (B, C, H, W) for guidance against them. Raises PlanError if they are missing."""
        self.plan = plan
        self.stored = program.stored
        self.cache = Cache(cache_depth(plan))
        self.memory = Memory()
        self.velocity = LastVelocity() if any(step.compute.refine for step in plan.steps) else None
        self.regions = RegionKeeper(self.cache.regions, plan, program, model)
        self.origin = origin
        guidances = [s.guidance for s in plan.steps if s.guidance is not None]
        if origin is None and any(g.against == "origin" for g in guidances):
            raise PlanError("this plan guides away from an image: pass origin=, the clean images (B, C, H, W)")
        self.keeps_difference = any(g.against == "difference" for g in guidances)
        self.keeps_clean = any(g.against == "remembered" for g in guidances)
        self.calls = [calls_of(step) for step in plan.steps]
        self.wanted: dict[Call, list[float]] = {}
        lands: dict[Call, list[float]] = {}
        self.position: dict[tuple[int, Call], int] = {}
        for evaluation in program.evaluations:
            for call in self.calls[evaluation.step]:
                times = self.wanted.setdefault(call, [])
                self.position[evaluation.out, call] = len(times)
                times.append(evaluation.node.t)
                lands.setdefault(call, []).append(evaluation.node.t if evaluation.lands is None else evaluation.lands)
        null = torch.full_like(labels, model.num_classes)
        rows = {"cond": labels, "null": null, "weak": labels, "guide": labels}
        self.bound: dict[Call, BoundCalls] = {}
        for call, times in self.wanted.items():
            here = torch.cat([rows[s] for s in call.streams])
            self.bound[call] = lowered[call].bind(times, here, self.cache, call.streams, lands[call])
        share_tables([(b, [out for out, c in self.position if c == call]) for call, b in self.bound.items()])

    def __call__(self, x: Tensor, evaluation: Eval) -> Output:
        calls = self.calls[evaluation.step]
        return self.finish(x, evaluation, self._answers(x, calls, evaluation) if calls else [])

    def network_calls(self, x: Tensor, evaluation: Eval) -> list[NetworkCall]:
        """The network calls of an evaluation at states x (B, C, H, W); none in a still step."""
        moment = Moment(evaluation.out, evaluation.node.t, evaluation.node.log_snr)
        return [
            NetworkCall(self.bound[call], self.position[evaluation.out, call], self._rows(x, call, evaluation), moment)
            for call in self.calls[evaluation.step]
        ]

    def finish(self, x: Tensor, evaluation: Eval, answers: list[Answer]) -> Output:
        """The evaluation's output from the answers of its `network_calls`, in their order."""
        calls = self.calls[evaluation.step]
        if not calls:  # a still step: no velocity
            return Output(torch.zeros_like(x))
        if self.velocity is not None:
            return self._refined(self.velocity, x, calls, answers, evaluation)
        if not self.regions.subsets:
            return self._guided(x, calls, answers, evaluation)
        answers = self.regions.answers(calls, answers, evaluation)
        return self.regions.finish(self._guided(x, calls, answers, evaluation), evaluation)

    def _rows(self, x: Tensor, call: Call, evaluation: Eval) -> Tensor:
        """The states once per stream of the call; a refiner also sees the velocity that the step came with."""
        if call.compute.refine:
            assert self.velocity is not None
            x = torch.cat([x, self.velocity.seen(evaluation.step).to(x.dtype)], dim=1)
        return x if len(call.streams) == 1 else torch.cat([x] * len(call.streams))

    def _refined(
        self, velocity: LastVelocity, x: Tensor, calls: list[Call], answers: list[Answer], evaluation: Eval
    ) -> Output:
        """The same in plans with a refiner, whose answers are offsets of an older velocity."""
        refine = calls[0].compute.refine
        if refine:
            base = velocity.base(evaluation.step)
            offsets = [value[:, : x.shape[1]] for value, _ in answers]
            answers = [(base.repeat(len(o) // len(base), *[1] * (x.ndim - 1)) + o, None) for o in offsets]
        output = self._guided(x, calls, answers, evaluation)
        velocity.keep(evaluation.step, output.value, refine)
        return output

    def _guided(self, x: Tensor, calls: list[Call], answers: list[Answer], evaluation: Eval) -> Output:
        """The answers of an evaluation's calls combined as its step's guidance says."""
        guidance = self.plan.steps[evaluation.step].guidance
        if guidance is None:
            return Output(*answers[0])
        if len(calls[0].streams) == 2:  # conditional and null ran as one batch
            (values, variances), n = answers[0], len(x)
            answers = [(values[:n], None if variances is None else variances[:n]), (values[n:], None)]
        conditional, variance = answers[0]
        node = evaluation.node
        if guidance.called:
            reference = answers[1][0]
            self._remember(conditional, reference, x, node)
        else:
            reference = self._from_memory(guidance, conditional, x, node)
        if guidance.rule.space == "stored":
            return Output(guided(guidance, conditional, reference, self.memory), variance)
        p, q = sample_coefficients(self.stored, node)
        state = x if guidance.channels is None else x[:, : guidance.channels]

        def to_sample(value: Tensor) -> Tensor:
            return torch.add(p * state, value.to(state.dtype), alpha=q)

        def from_sample(clean: Tensor) -> Tensor:
            return torch.sub(clean, state, alpha=p) / q

        return Output(guided(guidance, conditional, reference, self.memory, to_sample, from_sample), variance)

    def _remember(self, conditional: Tensor, reference: Tensor, x: Tensor, node: Node) -> None:
        """Keep what later steps will use of a computed reference."""
        if self.keeps_difference:
            self.memory.difference = conditional - reference
        if self.keeps_clean:
            p, q = sample_coefficients(self.stored, node)
            self.memory.clean = torch.add(p * x, reference.to(x.dtype), alpha=q)

    def _from_memory(self, guidance: Guidance, conditional: Tensor, x: Tensor, node: Node) -> Tensor:
        """A reference without a call."""
        if guidance.against == "difference":
            difference = self.memory.difference
            assert difference is not None  # the plan was checked
            low, high = guidance.gain
            if low != high:
                coarse, fine = bands(difference, 0.5)
                return conditional - low * coarse - high * fine
            return torch.sub(conditional, difference, alpha=low)
        clean = self.origin if guidance.against == "origin" else self.memory.clean
        assert clean is not None
        numbers = (node.alpha, node.sigma, node.dalpha, node.dsigma)
        at = AlphaSigma(*(torch.tensor(v, dtype=torch.float64) for v in numbers))
        on_state, on_clean = (float(v) for v in virtual_rows(self.stored, at, guidance.moderation))
        return torch.add(on_state * x, clean.to(x.dtype), alpha=on_clean)

    def _answers(self, x: Tensor, calls: list[Call], evaluation: Eval) -> list[Answer]:
        """(value, variance) of every call; a batch of two streams has twice the rows."""
        places = [self.position[evaluation.out, call] for call in calls]
        if len(calls) == 2:
            packed = packed_pair(self.bound[calls[0]], self.bound[calls[1]], places[0], places[1], x)
            if packed is not None:
                return packed
        return [call.answer() for call in self.network_calls(x, evaluation)]
