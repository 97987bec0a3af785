"""The one call that makes a denoiser's width depend on the time (DyDiT, arXiv 2410.03456; sheet A, 5)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.width import DynamicDiT, WidthSpec
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.dit import DiT


def route_width(denoiser: Denoiser, *, seed: int = 0, **options: Any) -> Denoiser:
    """A denoiser with routers for heads, MLP features and tokens; the given one is left untouched.

    options: the fields of `WidthSpec` (routes, base, groups, ...). Results stay bit-identical until training. Of a
    model flexible with recipe "lora" the original patch size is taken. Raises ConfigError for a model that has routers
    or exits already, one flexible with recipe "shared", or impossible options.
    """
    network: Any = denoiser.network
    if isinstance(network, FlexiDiT) and network.spec.recipe == "lora":
        network = network.base
    if not isinstance(network, DiT):
        raise ConfigError("routing needs a plain network, not one with routers, exits or shared patch sizes")
    try:
        spec = WidthSpec(**options)
    except TypeError as error:
        raise ConfigError(f"route_width: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the routers' weights
        dynamic = DynamicDiT(copy.deepcopy(network), spec)
    return replace(denoiser, network=dynamic.train(network.training), forward=None)
