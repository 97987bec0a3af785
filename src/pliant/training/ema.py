"""Exponential moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pliant.errors import ConfigError, FormatError
from pliant.training.sharded import local, placed


class EMA:
    """`average <- d*average + (1-d)*parameter` after each step, in float32, of trainable parameters.

    Averages of sharded parameters are sharded alike.

    With `warmup`, step k (from 0) uses `d = min(decay, (1+k)/(10+k))`, so that a short run forgets its
    initialisation; without, d is `decay` from the first step (official DiT).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"the EMA decay must be in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        self._parameters = dict(parameters)
        self.averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    def decay_at(self, step: int) -> float:
        """The decay used by update number `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step number `step` (from 0)."""
        if not self.averages:
            return
        current = [local(p).float() for p in self._parameters.values()]
        torch._foreach_lerp_([local(a) for a in self.averages.values()], current, 1.0 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the network holds the averages; then its own parameters come back bit-equal."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(own)

    def copy_to_parameters(self) -> None:
        """Make the averages the network's parameters."""
        self._assign(self.averages)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter).copy_(local(values[name]))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore averages. Raises FormatError if the names differ."""
        if state.keys() != self.averages.keys():
            odd = sorted(state.keys() ^ self.averages.keys())
            raise FormatError(f"the EMA in this checkpoint is for other parameters; differing: {', '.join(odd[:3])}")
        for name, value in state.items():
            average = self.averages[name]
            local(average).copy_(local(placed(value, average)))
