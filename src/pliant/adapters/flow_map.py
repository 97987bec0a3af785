"""The one call that makes a denoiser a flow map: told where a step lands, it can learn to jump there in one call."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.dit import DiT
from pliant.models.layers import TimestepEmbedder


def flow_map(denoiser: Denoiser, *, seed: int = 0) -> Denoiser:
    """A denoiser that is also told where a step lands, with a copy of the weights; the given one stays untouched.

    A second time embedder for the length of the jump is added (MeanFlow, arXiv 2505.13447; CTM, 2310.02279). Its last
    layer starts at zero: whatever it is told, the new network predicts what the given one does, until it is trained.
    Patch sizes are kept. Raises ConfigError for a flow map and for networks with exits, routers or routed width.
    """
    network = denoiser.network
    if not isinstance(network, DiT | FlexiDiT):
        raise ConfigError("a flow map is made of a plain or flexible network, not of one with exits or routers")
    if denoiser.config.flow_map:
        raise ConfigError("this model is a flow map already")
    network = copy.deepcopy(network)
    plain = network.base if isinstance(network, FlexiDiT) else network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder = TimestepEmbedder(plain.config.width, plain.config.frequency_divisor)
        nn.init.normal_(embedder.fc1.weight, std=0.02)
    for tensor in (embedder.fc1.bias, embedder.fc2.weight, embedder.fc2.bias):
        nn.init.zeros_(tensor)
    weight = plain.modulation.weight
    plain.jump_embed = embedder.to(weight.device, weight.dtype)
    plain.config = replace(plain.config, flow_map=True)
    network.config = replace(network.config, flow_map=True)
    return replace(denoiser, network=network, forward=None)
