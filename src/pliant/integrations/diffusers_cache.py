"""Pliant's caches inside diffusers pipelines: no hooks, nothing kept in modules, one explicit memory per request.

    fast = cached(pipe, "fbc", threshold=0.1)     # any caching preset, or a list of computes
    image = fast("a fox in the snow").images[0]   # `pipe` itself is not changed

A caching preset is a published rule; what it runs in each step is worked out when a request's first step is known.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from pliant.compute import Cache, Compute, Moment
from pliant.compute.cache import Decision
from pliant.compute.executor import Call
from pliant.compute.lowering import SiteProgram, lower
from pliant.errors import ConfigError, PlanError
from pliant.integrations.diffusers_clock import CallClock, SchedulerClock
from pliant.integrations.sites import BlockSites, sites_of
from pliant.integrations.sites.schedule import cache_schedule, check_schedule, preset_rule

CONTEXTS = {"cond": "cond", "uncond": "null"}
"""Names that pipelines give to `cache_context`, and the streams they mean."""


class Clock(Protocol):
    """Tells the step of every call of a request."""

    @property
    def times(self) -> tuple[float, ...]: ...

    def step(self, timestep: Tensor) -> int: ...

    def moment(self, step: int) -> Moment: ...


Schedule = Callable[[BlockSites, Sequence[float]], Sequence[Compute]]
"""(sites, house times of the steps) -> what each step runs."""


class SiteTransformer(torch.nn.Module):
    """A diffusers transformer that runs a schedule of computes: one object is one request, and is cheap to make.

    Called like the transformer, it answers like it; config, dtype, device and all other attributes are the
    transformer's. Two of these on one transformer know nothing of each other.
    """

    def __init__(
        self,
        transformer: Any,
        computes: Sequence[Compute] | Schedule,
        clock: Clock | None = None,
        streams: tuple[str, ...] | None = None,
    ) -> None:
        """computes: one per step. clock: by default a new step begins when the timestep changes.

        streams: what the rows of a batch are, in equal shares, e.g. ("null", "cond") where classifier-free guidance
        is one batch; only rules whose conditional rows decide for all ask. Each row decides for itself otherwise.
        """
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        super().__init__()
        _refuse_hooks(transformer)
        self.transformer = transformer
        self.sites = sites_of(transformer)
        self.cache = Cache()
        self._given = computes
        if clock is None and callable(computes):
            raise ConfigError("a schedule that depends on times needs a clock, e.g. SchedulerClock(pipe.scheduler)")
        self._clock = clock
        self._names = _CallNames(streams)
        self._computes: list[Compute] | None = None
        if not callable(computes):
            self._begin(computes)
            if clock is None:
                self._clock = CallClock([1 - i / len(computes) for i in range(len(computes))])
        self._programs: dict[Compute, SiteProgram] = {}
        self._context: str | None = None
        self._answer = Transformer2DModelOutput

    @property
    def computes(self) -> tuple[Compute, ...]:
        """What each step runs; of a schedule that depends on times, empty before the first call."""
        return tuple(self._computes or ())

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What gates decided so far."""
        return tuple(self.cache.decisions)

    @contextmanager
    def cache_context(self, name: str, **position: Any) -> Iterator[None]:
        """Pipelines name their calls with this ("cond", "uncond"): each name has a memory of its own."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the transformer's. Raises PlanError for arguments that sites cannot honour, or a step too many."""
        values = self._bound(args, kwargs)
        as_dict = values.pop("return_dict")
        self.sites.check_arguments(values)
        x: Tensor = values.pop("hidden_states")
        clock = self._clock
        assert clock is not None
        step = clock.step(values["timestep"])
        if self._computes is None:
            assert callable(self._given)
            self._begin(self._given(self.sites, clock.times))
        assert self._computes is not None
        if not 0 <= step < len(self._computes):
            raise PlanError(
                f"this schedule has {len(self._computes)} steps and this is call {step}; one SiteTransformer is one "
                f"request: make another for the next"
            )
        compute = self._computes[step]
        if compute not in self._programs:
            self._programs[compute] = lower(compute, len(self.sites.sites))
        streams = self._names.of(step, self._context)
        call = Call(self._programs[compute], self.sites, self.cache, tuple(x.shape[1:]), streams, clock.moment(step))
        out = call(x, values)
        return self._answer(sample=out) if as_dict else (out,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    def _begin(self, computes: Sequence[Compute]) -> None:
        check_schedule(self.sites, computes)
        self._computes = list(computes)
        self.cache.depth = 1 + max((c.reuse.order for c in computes if c.reuse is not None), default=0)

    def _bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name. Raises TypeError as a call of the transformer would."""
        kind = type(self.transformer)
        names, defaults = _parameters(kind.forward)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs) or not given.keys() <= set(names):
            raise TypeError(f"forward of {kind.__name__} takes {', '.join(names)}")
        values = {**defaults, **given}
        if len(values) < len(names):
            missing = ", ".join(name for name in names if name not in values)
            raise TypeError(f"forward of {kind.__name__} needs {missing}")
        return values


class _CallNames:
    """Whose rows the calls of one request have. (Not the module's own: setting a module's attribute is slow.)"""

    def __init__(self, streams: tuple[str, ...] | None) -> None:
        """streams: of calls that nobody named."""
        self.streams = streams
        self._step = -1
        self._calls: dict[str, int] = {}

    def of(self, step: int, context: str | None) -> tuple[str, ...]:
        """Calls of one step with the same name are told apart by their order."""
        if step != self._step:
            self._step = step
            self._calls.clear()
        name = "" if context is None else CONTEXTS.get(context, context)
        k = self._calls.get(name, 0)
        self._calls[name] = k + 1
        suffix = f" {k}" if k else ""
        if self.streams is not None and not name:
            return tuple(stream + suffix for stream in self.streams)
        return ((name or "cond") + suffix,)


class CachedPipeline:
    """A pipeline whose transformer follows a schedule; call it like the pipeline, which stays as it is.

    Every call works on a shallow copy with its own scheduler and its own `SiteTransformer`, so calls may overlap.
    """

    def __init__(
        self, pipe: Any, computes: Sequence[Compute] | Schedule, streams: tuple[str, ...] | None = None
    ) -> None:
        if getattr(pipe, "transformer", None) is None:
            raise ConfigError(f"{type(pipe).__name__} has no transformer; caches of U-Nets are not supported")
        self.pipe = pipe
        self.decisions: tuple[Decision, ...] = ()
        """Of the newest call that has ended."""
        self.computes: tuple[Compute, ...] = ()
        """Of the newest call that has ended."""
        self._given, self._streams = computes, streams
        self.request()  # what can be checked now is checked now

    def request(self) -> Any:
        """A pipeline for one call, with a memory of its own as `.transformer`."""
        own = copy.copy(self.pipe)
        scheduler = copy.deepcopy(self.pipe.scheduler)
        network = SiteTransformer(self.pipe.transformer, self._given, SchedulerClock(scheduler), self._streams)
        # Not `setattr`: that would write the new class into the pipeline's config.
        own.__dict__.update(scheduler=scheduler, transformer=network)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's."""
        own = self.request()
        result = own(*args, **kwargs)
        self.decisions, self.computes = own.transformer.decisions, own.transformer.computes
        return result

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # while being copied
            raise AttributeError(name)
        return getattr(self.pipe, name)


def cached(
    pipe: Any, preset: str | Sequence[Compute], *, streams: tuple[str, ...] | None = None, **options: Any
) -> CachedPipeline:
    """The pipeline with a caching preset's rule in its transformer: `cached(pipe, "taylorseer", interval=4)`.

    preset: a name of `pliant.plans.caching.CACHING` with its options, or one `Compute` per step. streams: see
    `SiteTransformer`. Raises ConfigError and PlanError as `cache_schedule` does: names at once, numbers that depend on
    the steps at the first step of a call.
    """
    if isinstance(preset, str):
        preset_rule(preset, options)

        def schedule(sites: BlockSites, times: Sequence[float]) -> list[Compute]:
            return cache_schedule(sites, times, preset, **options)

        return CachedPipeline(pipe, schedule, streams)
    if options:
        raise ConfigError(f"options {', '.join(options)} belong to a preset; a list of computes takes none")
    return CachedPipeline(pipe, list(preset), streams)


@lru_cache(maxsize=16)
def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of what a `forward` takes, in order, and the defaults of those that have one."""
    known = [p for p in inspect.signature(forward).parameters.values() if p.name != "self"]
    return tuple(p.name for p in known), {p.name: p.default for p in known if p.default is not inspect.Parameter.empty}


def _refuse_hooks(transformer: Any) -> None:
    """Hooks of other libraries sit on calls that a site program does not make."""
    if not _any_hooked(transformer):
        return
    for name, module in transformer.named_modules():
        if _hooked(module):
            where = f"{type(transformer).__name__}{'.' + name if name else ''}"
            raise ConfigError(
                f"{where} has hooks (diffusers' own cache, or offloading), which a site program would pass by; remove "
                f"them first (transformer.disable_cache(), or no offloading)"
            )


def _any_hooked(root: torch.nn.Module) -> bool:
    """Whether any module is, in a fraction of the time that `root.modules()` takes: every request asks."""
    left = [root]
    while left:
        module = left.pop()
        if _hooked(module):
            return True
        left += filter(None, module.__dict__["_modules"].values())
    return False


def _hooked(module: torch.nn.Module) -> bool:
    own = module.__dict__  # asking a module for what it has not is slow
    return "_hf_hook" in own or ("_diffusers_hook" in own and bool(own["_diffusers_hook"].hooks))
