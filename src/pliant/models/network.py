"""What the house needs to know of a network: a `Backbone`, whatever its architecture.

A `Denoiser` holds one, the engine runs the plain network of one patch size that it hands out (`plain`), the cost model
reads its `NetworkConfig.shape`, the native format its `family`. A new architecture subclasses `Backbone`, gives its
config the fields of `NetworkConfig`, and is entered in `FAMILIES`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from pliant.compute import Compute, TransformerShape
from pliant.errors import ConfigError, PlanError, ShapeError, suggest

if TYPE_CHECKING:
    from pliant.compute.sites import SiteModel

Size: TypeAlias = tuple[int, ...]
"""Sides of a state without its channels: (H, W), (T, H, W) or (L,)."""


Taps: TypeAlias = dict[int, list[Tensor]]
"""{blocks before: tokens of every group, (B_g, N_g, D)}: which hidden states a caller wants, to be filled in."""


class NetworkConfig(Protocol):
    """What determines a network's shape and arithmetic; a frozen dataclass."""

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int:
        """in_channels, or twice as many with a variance code."""
        ...

    @property
    def input_size(self) -> Size:
        """The size of states; of networks for any size, the one they take unless another is asked for."""
        ...

    @property
    def patch_size(self) -> Size:
        """The network's own (finest) patch size."""
        ...

    @property
    def depth(self) -> int:
        """Blocks, of two residual branches each."""
        ...

    @property
    def width(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def class_dropout(self) -> float:
        """0: there is no null label. Else label `num_classes` is the null label."""
        ...

    @property
    def learn_sigma(self) -> bool: ...

    @property
    def flow_map(self) -> bool:
        """Whether calls also say where their step ends."""
        ...

    def shape(self, size: Size | None = None, patch: Size | None = None) -> TransformerShape:
        """A call's shape for the cost model, at a size and patch size (None: own)."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


class Backbone(nn.Module):
    """A network that a `Denoiser` can hold: `forward(x (B, C, *size), t (B,), y (B,), ...) -> (B, C_out, *size)`.

    A *plain* backbone runs at one patch size only and can be split into conditioning and the rest: `modulations`, then
    `forward_modulated`. All of this holds no state between calls.
    """

    family: ClassVar[str]
    """Name of the architecture: its key in `FAMILIES` and in config.json."""
    any_size: ClassVar[bool] = False
    """Whether calls may have another size than the config's."""
    config: NetworkConfig

    @property
    def patch_sizes(self) -> tuple[Size, ...]:
        """All patch sizes it runs at, the own one first."""
        return (self.config.patch_size,)

    def plain(self, patch: Size, merged: bool = True, extrapolation: str = "none") -> Backbone | None:
        """The plain backbone of one patch size, sharing weights where it can; None: calls must run this one as it is.

        extrapolation: how positions outside the trained range are met, for networks for any size.
        """
        return self

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """(B,) network times and (B,) labels -> (B, rows, D), all that the blocks need to know of them."""
        raise NotImplementedError

    def forward_modulated(self, x: Tensor, modulations: Tensor) -> Tensor:
        """(B, C, *size) and (B or 1, rows, D) -> (B, C_out, *size)."""
        raise NotImplementedError

    def forward_packed(
        self, xs: Sequence[Tensor], t: Tensor, y: Tensor, patch: Size | None = None, extrapolation: str | None = None
    ) -> list[Tensor]:
        """Groups of states of different sizes in one pass: xs[g] (B_g, C, *size_g) -> like xs; t, y: (sum of B_g,).

        Only networks for any size. Raises ConfigError for others.
        """
        raise ConfigError(f"a {self.family} network takes states of one size in a call")

    @property
    def modulation_values(self) -> int:
        """Numbers in one row of `modulations`' answer."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of a plain backbone."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """A plain backbone in another dtype, for inference, sharing the tensors that have it already."""
        raise NotImplementedError

    def site_model(self, size: Size, tokens: bool = False) -> SiteModel:
        """A plain backbone seen as sites at one size; `tokens`: as one whose tokens can be told apart."""
        raise PlanError(f"sites, caches and token subsets do not work on a {self.family} network")

    def check_compute(self, compute: Compute) -> None:
        """Raise PlanError where this network cannot do what a compute asks for. Patch sizes are checked elsewhere."""
        if compute.scale is not None:
            raise PlanError(f"compute asks for a scale, which a {self.family} network does not have; choose a size")
        if not compute.plain:
            raise PlanError(f"sites, caches and token subsets do not work on a {self.family} network")

    def check_size(self, size: Size) -> None:
        """Raise ShapeError unless the network takes states of this size."""
        own = tuple(self.config.input_size)
        if tuple(size) != own:
            raise ShapeError(f"this network takes states of size {named(own)} only, not {named(size)}")

    def check_extrapolation(self, extrapolation: str) -> None:
        """Raise ConfigError unless the network knows this way to meet positions outside the trained range."""
        if extrapolation != "none":
            raise ConfigError(f"a {self.family} network has no position extrapolation {extrapolation!r}; use 'none'")

    @property
    def reference_pixels(self) -> int:
        """The size of training states, in pixels, at which a time grid needs no shift."""
        return math.prod(self.config.input_size)

    def beyond(self, size: Size) -> str | None:
        """Why states of this size are outside what the network was trained on, in words; None: they are not."""
        return None


class Family(NamedTuple):
    """Where an architecture lives."""

    module: str
    config: str
    """Class with `from_dict`, inverse of `NetworkConfig.to_dict`."""
    network: str
    """Class made from a config alone."""

    def parse(self, values: Mapping[str, Any]) -> NetworkConfig:
        """The config that `to_dict` wrote. Raises ConfigError for unknown or impossible values."""
        config: NetworkConfig = getattr(importlib.import_module(self.module), self.config).from_dict(dict(values))
        return config

    def build(self, config: NetworkConfig) -> Backbone:
        """A network with new weights."""
        network: Backbone = getattr(importlib.import_module(self.module), self.network)(config)
        return network


FAMILIES: dict[str, Family] = {
    "dit": Family("pliant.models.dit", "DiTConfig", "DiT"),
    "equilibrium": Family("pliant.models.equilibrium", "EquilibriumConfig", "EquilibriumTransformer"),
    "fit": Family("pliant.models.fit", "FiTConfig", "FiT"),
    "flexible": Family("pliant.models.flexible", "FlexibleConfig", "FlexibleTransformer"),
}


def family(name: str) -> Family:
    """Raises ConfigError with the nearest name for one that is not registered."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown network family {name!r}: {suggest(name, FAMILIES)}")
    return FAMILIES[name]


def family_of(network: Mapping[str, Any]) -> tuple[Family, NetworkConfig]:
    """The family and config in a stored description `{family: fields, ...}`. Raises ConfigError if there is none."""
    if not isinstance(network, Mapping):
        raise TypeError(f"a network is described by a mapping, not a {type(network).__name__}")
    for name, found in FAMILIES.items():
        if name in network:
            return found, found.parse(network[name])
    has = ", ".join(network) or "nothing"
    raise ConfigError(f"the network is none of {', '.join(FAMILIES)}; its description has {has}")


def named(size: Size) -> str:
    """(24, 16) -> "24x16"."""
    return "x".join(map(str, size))
