"""What changes while training: trainable parameters, their average and the optimizer; to and from checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import ConfigError, FormatError
from pliant.training.checkpoint import TrainingState
from pliant.training.config import TrainConfig, parse_config
from pliant.training.ema import EMA
from pliant.training.fingerprint import changed_settings, frozen_hash
from pliant.training.sharded import everywhere, gathered, local, placed

logger = logging.getLogger("pliant.training")

COMPANIONS = "companions"
"""Begins the names of companions' tensors in checkpoints."""


class Trainable:
    """The mutable half of a run. Everything else is computed from the configuration and the step number."""

    def __init__(self, network: nn.Module, config: TrainConfig, companions: Sequence[nn.Module] = ()) -> None:
        """companions: modules that train beside the network (critics): in checkpoints, but not averaged."""
        self.network, self.config = network, config
        self.companions = nn.ModuleList(companions)
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("nothing to train: every parameter of the model is frozen")
        self._frozen = frozen_hash(network)
        self.ema = EMA(dict(self.parameters), config.ema.decay, config.ema.warmup)
        beside = {f"{COMPANIONS}.{name}": p for name, p in self.companions.named_parameters() if p.requires_grad}
        self.parameters.update(beside)
        device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=device.type in ("cpu", "cuda") or None,
        )

    def update(self, step: int, rate: float) -> None:
        """Apply the gradients as optimizer step number `step` (from 0) and follow with the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)

    def is_finite(self) -> bool:
        """Whether every trainable parameter is, on all processes."""
        here = all(bool(torch.isfinite(local(p)).all()) for p in self.parameters.values())
        return everywhere(here, next(iter(self.parameters.values())))

    def capture(self, step: int, keep: bool = True) -> TrainingState:
        """The state after `step` finished steps. Shares memory: write it before training on.

        Of a sharded run all processes capture together, and those that do not keep the tensors get None for each.
        """
        return TrainingState(
            step=step,
            model=gathered(self._model_tensors(), keep),
            ema=gathered(self.ema.state_dict(), keep),
            optimizer=gathered(self.optimizer.state_dict(), keep),
            info={"config": self.config.to_dict(), "frozen": self._frozen, "torch": torch.__version__},
        )

    def restore(self, path: Path, state: TrainingState) -> None:
        """Take over a checkpoint. Raises FormatError if it belongs to another model; notes changed settings."""
        if state.info.get("frozen") != self._frozen:
            raise FormatError(f"{path} belongs to another base model: its frozen weights differ from these")
        for name in changed_settings(_completed(state.info.get("config", {})), self.config.to_dict()):
            logger.warning("resuming with another %s: not the result of one uninterrupted run", name)
        own = self._model_tensors()
        if own.keys() != state.model.keys() or any(own[k].shape != v.shape for k, v in state.model.items()):
            raise FormatError(f"{path} is for another model: its tensors differ in name or shape")
        with torch.no_grad():
            for name, tensor in state.model.items():
                local(own[name]).copy_(local(placed(tensor, own[name])))
        self.ema.load_state_dict(state.ema)
        self.optimizer.load_state_dict(self._optimizer_state(state.optimizer))

    def _optimizer_state(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """A stored optimizer state with every moment sharded as its parameter."""
        parameters = dict(enumerate(self.parameters.values()))
        moments = {
            i: {k: placed(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in values.items()}
            for i, values in stored["state"].items()
        }
        return {**stored, "state": moments}

    def _model_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of the model and its companions: trainable parameters and persistent buffers."""
        frozen = {name for name, p in self.network.named_parameters() if not p.requires_grad}
        own = {name: tensor for name, tensor in self.network.state_dict().items() if name not in frozen}
        return {**own, **{f"{COMPANIONS}.{name}": tensor for name, tensor in self.companions.state_dict().items()}}


def _completed(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored config with the defaults of settings that Pliant did not have yet; an unreadable one as it is."""
    try:
        return parse_config(stored).to_dict()
    except ConfigError:
        return stored
