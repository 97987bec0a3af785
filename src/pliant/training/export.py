"""The averaged weights of a run: for pictures while it trains, and as a model at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from pliant.denoiser import Denoiser
from pliant.models.flexible import FlexibleTransformer
from pliant.models.network import Backbone
from pliant.training.compiling import plain_blocks
from pliant.training.config import TrainConfig
from pliant.training.ema import EMA
from pliant.training.low_rank import merge_low_rank
from pliant.training.sharding import drain, fill


@contextmanager
def averaged_weights(denoiser: Denoiser, averages: EMA, twin: nn.Module | None, keep: bool) -> Iterator[Denoiser]:
    """A denoiser with the averaged weights in eval mode; afterwards its own come back bit-equal.

    twin: of a sharded run, which gathers the averages in it, all processes together; keep: whether this one does.
    """
    network = denoiser.network
    if twin is not None:
        fill(twin.eval(), network, averages.averages, denoiser.device if keep else None)
        yield replace(denoiser, network=cast(Backbone, twin), forward=None)
        drain(twin, averages.averages)
        return
    with averages.applied():
        network.eval()
        yield denoiser
        network.train()


def finished(denoiser: Denoiser, averages: EMA, twin: nn.Module | None, config: TrainConfig) -> Denoiser:
    """What a run leaves: the averages in a plain network in eval mode, without the parts that only training has."""
    if twin is None:
        averages.copy_to_parameters()
    else:
        fill(twin, denoiser.network, averages.averages, torch.device("cpu"))
        denoiser = replace(denoiser, network=cast(Backbone, twin), forward=None)
    network = denoiser.network.eval()
    plain_blocks(network)
    merge_low_rank(network)
    if isinstance(network, FlexibleTransformer):
        network.projector = None
    training = {"config": config.to_dict(), "steps": config.steps}
    return replace(denoiser, metadata={**denoiser.metadata, "training": training})


def export(result: Denoiser, folder: Path) -> None:
    """Write `model/`, and `adapter/` where what trained is one on a frozen base. Raises OSError."""
    from pliant.adapters import DynamicDiT, ExitDiT, FlexiDiT
    from pliant.adapters.token_router import TokenRoutedDiT
    from pliant.formats import native

    network = result.network
    native.save(result, folder / "model")
    lora = isinstance(network, FlexiDiT) and network.spec.recipe == "lora"
    routers = isinstance(network, DynamicDiT) and network.spec.base == "frozen"
    if lora or routers or isinstance(network, ExitDiT | TokenRoutedDiT):
        native.save_adapter(result, folder / "adapter")
