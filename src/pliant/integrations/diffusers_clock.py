"""Which step of its request a network call belongs to, when all one sees is the scheduler and the timestep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.compute import Moment


class CallClock:
    """A new step begins whenever the timestep changes: enough for loops whose timesteps are all different."""

    def __init__(self, times: Sequence[float]) -> None:
        """times: house time of every step, 1 is noise."""
        self.times = tuple(float(t) for t in times)
        self._step = -1
        self._last: Tensor | None = None

    def step(self, timestep: Tensor) -> int:
        """The number of this call's step; call it once for every network call."""
        if self._last is None or not torch.equal(self._last, timestep):
            self._step += 1
            self._last = timestep
        return self._step

    def moment(self, step: int) -> Moment:
        """Half log-SNR is that of a straight path."""
        t = self.times[step]
        return Moment(step, t, math.log((1 - t) / t) if 0 < t < 1 else math.copysign(math.inf, 0.5 - t))


class SchedulerClock:
    """Asks a diffusers scheduler, which counts its own steps; of those that do not, timesteps are compared."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._first = 0
        self._calls: CallClock | None = None

    @property
    def times(self) -> tuple[float, ...]:
        """House time of the steps of this request; known from its first call on."""
        return () if self._calls is None else self._calls.times

    def step(self, timestep: Tensor) -> int:
        """The number of this call's step; call it once for every network call."""
        if self._calls is None:
            # Image-to-image enters the scheduler's list of timesteps late.
            steps = self.scheduler.timesteps.double()
            n = float(getattr(self.scheduler.config, "num_train_timesteps", 1000))
            now = float(timestep.reshape(-1)[0])
            found = (((steps - now).abs() < 1e-3) | ((steps - n * now).abs() < 1e-3)).nonzero()
            begin = getattr(self.scheduler, "begin_index", None)
            self._first = int(begin or 0) if begin is not None or not len(found) else int(found[0])
            self._calls = CallClock((steps[self._first :] / n).tolist())
        compared = self._calls.step(timestep)
        if hasattr(self.scheduler, "step_index"):
            counted = self.scheduler.step_index
            return 0 if counted is None else int(counted) - self._first
        if hasattr(self.scheduler, "counter"):  # PNDM asks twice at one timestep
            return int(self.scheduler.counter)
        return compared

    def moment(self, step: int) -> Moment:
        """Half log-SNR from the scheduler's alphas where it has them, else that of a straight path."""
        assert self._calls is not None
        moment = self._calls.moment(step)
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas is None:
            return moment
        at = min(len(alphas) - 1, max(0, round(moment.time * len(alphas))))
        a = float(alphas[at])
        return Moment(step, moment.time, 0.5 * math.log(a / (1 - a)) if 0 < a < 1 else moment.logsnr)
