"""The one call that makes a denoiser a flow map: told where a step lands, it can learn to jump there in one call."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.dit import DiT
from pliant.models.flexible import FlexibleTransformer
from pliant.models.layers import TimestepEmbedder, reset_jump


def flow_map(denoiser: Denoiser, *, seed: int = 0) -> Denoiser:
    """A denoiser that is also told where a step lands, with a copy of the weights; the given one stays untouched.

    A second time embedder for the length of the jump is added (MeanFlow, arXiv 2505.13447; CTM, 2310.02279). Its last
    layer starts at zero: whatever it is told, the new network predicts what the given one does, until it is trained.
    Patch sizes are kept. Raises ConfigError for a flow map and for networks with exits, routers or routed width.
    """
    network = denoiser.network
    if not isinstance(network, DiT | FlexiDiT | FlexibleTransformer):
        raise ConfigError(
            f"a flow map is made of a DiT, one made flexible, or the native flexible network, without exits and "
            f"routers; this is a {type(network).__name__}"
        )
    if denoiser.config.flow_map:
        raise ConfigError("this model is a flow map already")
    network = copy.deepcopy(network)
    plain = network.base if isinstance(network, FlexiDiT) else network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder = TimestepEmbedder(plain.config.width, plain.time_embed.divisor)
        reset_jump(embedder)
    weight = plain.time_embed.fc1.weight
    plain.jump_embed = embedder.to(weight.device, weight.dtype)
    for part in {plain, network}:
        part.config = replace(part.config, flow_map=True)
    return replace(denoiser, network=network, forward=None)
