"""Several requests on one model at the same time: every request its own plan, their network calls in shared batches.

Solvers, guidance, noise and caches stay each request's own; in every round the next network call of every unfinished
request is collected, and those that run the same network run as one batch (`together.answer_together`). Requests may
differ in steps, solver, guidance and patch sizes, and may join while others are half done.

Results are those of separate runs: bit for bit wherever a call has its batch to itself, otherwise to the rounding of
the precision they run in (matrix products of other sizes add up in another order): in float32 within 1e-5 of the
largest value, in bfloat16 within about 1e-2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError, PliantError
from pliant.plans.engine import Answer, Weights
from pliant.plans.plan import Plan
from pliant.plans.sampling import Begun, Sampler, sized
from pliant.plans.together import answer_together
from pliant.solvers import Ask, NetworkOutput, StepResult, stepwise
from pliant.solvers.interpreter import Combine, combine

KEPT_SAMPLERS = 32
"""Plans that a batcher keeps lowered for further requests."""


@dataclass(frozen=True, eq=False)
class Request:
    """What `pliant.sample` takes, for one of several runs. Its images run as one batch."""

    plan: Plan
    cond: Sequence[int] | Tensor
    """Class labels."""
    seeds: Sequence[int] | None = None
    """One per label; 0, 1, 2, ... by default."""
    x: Tensor | None = None
    mu: Tensor | None = None
    origin: Tensor | None = None
    """As `Sampler.steps` takes them."""
    size: tuple[int, ...] | None = None
    extrapolation: str | None = None
    """As `sample` takes them. Requests of different sizes share passes only with those of their own size."""


class Progress(NamedTuple):
    """A step that a request has done."""

    request: int
    result: StepResult
    last: bool
    """Whether the request is finished."""


class _Run:
    """A request under way. `asked`: what it waits for; None before the start and after the end."""

    def __init__(self, begun: Begun, program_of: Sampler) -> None:
        self.evaluate = begun.evaluate
        self.loop = stepwise(program_of.program, begun.x, begun.noise, begun.mu, program_of.add)
        self.steps = len(program_of.program.steps)
        self.started = False
        self.asked: Ask | None = None

    def go_on(self, output: NetworkOutput | None = None) -> list[StepResult]:
        """Everything up to the next network call, or to the end. output: the answer to what was asked."""
        results: list[StepResult] = []
        self.started, self.asked = True, None
        item = next(self.loop, None) if output is None else self.loop.send(output)
        while isinstance(item, StepResult):
            results.append(item)
            item = next(self.loop, None)
        self.asked = item
        return results


class Batcher:
    """A queue of requests on one model. `add` at any time, `advance` until nothing is `waiting`."""

    def __init__(self, model: Denoiser, max_rows: int = 128, add: Combine = combine) -> None:
        """max_rows: rows of one network pass (a guided image has two); a request with more runs in passes of its own.

        add: how states are updated, as `Sampler` takes it.
        """
        if max_rows < 1:
            raise PlanError(f"a network pass needs room for at least 1 row, got max_rows={max_rows}")
        self.model = model
        self.max_rows = max_rows
        self.update = add
        self.weights = Weights()
        self._samplers: list[Sampler] = []
        self._runs: dict[int, _Run] = {}
        self._done: list[Progress] = []
        self._count = 0

    @property
    def waiting(self) -> list[int]:
        """The numbers of the unfinished requests, in the order they came."""
        return list(self._runs)

    def add(self, request: Request) -> int:
        """Check a request and put it in the queue; its number, counted from 0. No network runs yet.

        Raises PlanError, naming the request, if the plan or an argument does not fit the model.
        """
        number = self._count
        seeds = list(range(len(request.cond))) if request.seeds is None else request.seeds
        try:
            sampler = self._sampler(request.plan, sized(self.model, request.size, request.extrapolation))
            begun = sampler.begin(request.cond, seeds, request.x, request.mu, request.origin)
        except PliantError as error:
            raise PlanError(f"request {number}: {error}") from None
        self._count += 1
        self._runs[number] = _Run(begun, sampler)
        return number

    def cancel(self, number: int) -> None:
        """Forget an unfinished request and all it remembers. Raises PlanError if there is no such request."""
        if number not in self._runs:
            raise PlanError(f"request {number} is not waiting: it is finished, cancelled or never came")
        del self._runs[number]

    @torch.no_grad()
    def advance(self) -> list[Progress]:
        """One round: the next evaluation of every unfinished request, and the steps that this completed.

        Raises PlanError, naming the request, where one cannot go on. That one is dropped, the others are not harmed:
        what they did in this round is reported by the next.
        """
        failed: list[PlanError] = []
        for number, run in list(self._runs.items()):
            if not run.started:
                self._go_on(number, run, None, [], failed)
        asking = [(number, run, run.asked) for number, run in self._runs.items() if run.asked is not None]
        wanted = [run.evaluate.network_calls(*asked) for _, run, asked in asking]
        answers = iter(answer_together([call for calls in wanted for call in calls], self.max_rows))
        own = [[next(answers) for _ in calls] for calls in wanted]
        for (number, run, asked), found in zip(asking, own, strict=True):
            self._go_on(number, run, asked, found, failed)
        if failed:
            raise failed[0]
        done, self._done = self._done, []
        return done

    def _go_on(self, number: int, run: _Run, asked: Ask | None, answers: list[Answer], failed: list[PlanError]) -> None:
        """Up to this request's next network call; what it did is noted, and why it failed if it did."""
        try:
            results = run.go_on(None if asked is None else run.evaluate.finish(*asked, answers))
        except PliantError as error:
            failed.append(PlanError(f"request {number}: {error}"))
            del self._runs[number]
            return
        if run.asked is None:
            del self._runs[number]
        self._done += [Progress(number, r, r.index == run.steps - 1) for r in results]

    def _sampler(self, plan: Plan, model: Denoiser) -> Sampler:
        """The plan made ready, once for all requests that have it at this size."""
        where = (model.size, model.extrapolation)
        for sampler in self._samplers:
            same = sampler.plan is plan or sampler.plan == plan
            if same and (sampler.model.size, sampler.model.extrapolation) == where:
                return sampler
        sampler = Sampler(model, plan, self.update, self.weights)
        self._samplers = [*self._samplers[1 - KEPT_SAMPLERS :], sampler]
        return sampler


def steps_together(model: Denoiser, requests: Sequence[Request], max_rows: int = 128) -> Iterator[Progress]:
    """Run all requests, yielding each one's steps as they are done. Arguments and errors as `sample_together`'s."""
    batcher = Batcher(model, max_rows)
    for request in requests:
        batcher.add(request)
    while batcher.waiting:
        yield from batcher.advance()


def sample_together(model: Denoiser, requests: Sequence[Request], max_rows: int = 128) -> list[Tensor]:
    """The final states of every request, (B, C, H, W) each: what `sample` gives for it alone, up to rounding.

    max_rows: of one network pass, see `Batcher`. Raises PlanError, naming the request (counted from 0), before
    anything runs if a plan, label or seed does not fit.
    """
    final: dict[int, Tensor] = {}
    for progress in steps_together(model, requests, max_rows):
        if progress.last:
            final[progress.request] = progress.result.x
    return [final[i] for i in range(len(requests))]
