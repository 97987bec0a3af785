"""The one call that gives a denoiser early exits (Balcony, arXiv 2503.05005; sheet E, section 6)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

from pliant.adapters.exit_dit import ExitDiT, ExitSpec, Gates, depths_of
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.adapters.width import DynamicDiT
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError


def attach_exits(denoiser: Denoiser, depths: Iterable[int] = (2, 4), *, gates: Gates = "copy") -> Denoiser:
    """A denoiser that can also leave after each of `depths` blocks; the given one is left untouched.

    At full depth results stay bit-identical, before and after training: the network is frozen, each exit is one new
    block before its head. gates: "copy" starts an exit as the last block, "zero" as no block at all. Raises ConfigError
    for a depth the network does not have, a network that has exits already, or one flexible with recipe "shared".
    """
    if isinstance(denoiser.network, ExitDiT):
        raise ConfigError("this model has exits already; attach them to its original, naming all depths at once")
    if isinstance(denoiser.network, DynamicDiT):
        raise ConfigError("a network with width routers takes no exits; attach them to its original")
    if isinstance(denoiser.network, TokenRoutedDiT):
        raise ConfigError("a network with token routers takes no exits; attach them to its original")
    network = ExitDiT(copy.deepcopy(denoiser.dit), ExitSpec(depths_of(depths), gates))
    return replace(denoiser, network=network.train(denoiser.network.training), forward=None)
