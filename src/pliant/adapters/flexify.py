"""The one call that makes a denoiser flexible (FlexiDiT, arXiv 2502.20126; sheet A, 1.2-1.6)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from pliant.adapters import DynamicDiT, ExitDiT, FlexiDiT, FlexSpec
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.dit import DiT
from pliant.models.flexible import FlexibleTransformer, with_patches
from pliant.models.patches import patch_pair


def flexify(
    denoiser: Denoiser, patch_sizes: Iterable[int | tuple[int, ...]] = (4,), *, seed: int = 0, **options: Any
) -> Denoiser:
    """A denoiser that also runs at `patch_sizes`; the given one is left untouched.

    options: the fields of `FlexSpec` (recipe="lora" | "shared", rank, initialisation, position, ...). With recipe
    "lora" results at the original patch size stay bit-identical, before and after training. The native flexible
    network takes no options: new sizes get projections of their own, made of the finest's. Raises ShapeError for a
    size that does not divide the input, ConfigError for other impossible requests.
    """
    if isinstance(denoiser.network, ExitDiT):
        raise ConfigError("flexify comes before exits: flexify the model without them, then attach_exits")
    if isinstance(denoiser.network, DynamicDiT):
        raise ConfigError("a network with width routers has one patch size; flexify its original")
    if isinstance(denoiser.network, TokenRoutedDiT):
        raise ConfigError("flexify comes before token routers: flexify the model without them")
    if isinstance(denoiser.network, FlexiDiT):
        raise ConfigError("this model is flexible already; flexify its original, naming all patch sizes at once")
    plain = denoiser.network
    if isinstance(plain, FlexibleTransformer):
        if options:
            given = ", ".join(options)
            raise ConfigError(f"a native flexible network takes new patch sizes without options, got {given}")
        return replace(denoiser, network=with_patches(plain, patch_sizes), forward=None)
    if not isinstance(plain, DiT):
        raise ConfigError(f"flexify works on a DiT; this model is a {plain.family} network")
    try:
        spec = FlexSpec(tuple(patch_pair(p) for p in patch_sizes), **options)
    except TypeError as error:
        raise ConfigError(f"flexify: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # only the low-rank factors are drawn
        network = FlexiDiT(copy.deepcopy(plain), spec)
    return replace(denoiser, network=network.to(denoiser.device).train(denoiser.network.training))
