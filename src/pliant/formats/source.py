"""What was found at a source, before any weight is converted: enough for `pliant info`, and the way to load it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, FormatError, suggest
from pliant.models.dit import SIZES, DiT, DiTConfig
from pliant.models.fit import FiTConfig
from pliant.models.flexible import FlexibleConfig
from pliant.models.network import NetworkConfig, family_of, named
from pliant.models.positions import patch_positions
from pliant.paths import NetworkTime, Path, PredictionType, get_path, path_from_config


@dataclass(frozen=True)
class Source:
    """A recognised model. `load()` reads its weights."""

    format: str
    location: FilePath
    identity: dict[str, Any]
    """As `Denoiser.identity()`: network, path, prediction, network_time."""
    parameters: int
    """Numbers in the network as Pliant holds it (tables of positions are recomputed, not counted)."""
    notes: tuple[str, ...]
    """What was read from where, and what had to be assumed."""
    load: Callable[[], Denoiser]

    @property
    def config(self) -> NetworkConfig:
        return family_of(self.identity["network"])[1]

    @property
    def architecture(self) -> str:
        """A published name (DiT-XL/2), or the sizes of a network without one."""
        config = self.config
        if isinstance(config, FiTConfig):
            return config.name
        if not isinstance(config, DiTConfig):
            family = next(iter(self.identity["network"]))
            patch = named(config.patch_size)
            return f"{family} network of width {config.width}, depth {config.depth}, patch {patch}"
        return architecture(config, "SiT" if self.format == "sit" else "DiT")

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "format": self.format,
            "location": str(self.location),
            "architecture": self.architecture,
            "parameters": self.parameters,
            **self.identity,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """A few lines for people."""
        config, path = self.config, dict(self.identity["path"])
        size = "x".join(map(str, (config.in_channels, *config.input_size)))
        options = ", ".join(f"{k} {v}" for k, v in path.items() if k != "name")
        lines = [
            f"{self.architecture}, {self.parameters:,} parameters, format {self.format} ({self.location})",
            f"states {size}, {config.num_classes} classes, path {path['name']}{f' ({options})' if options else ''}, "
            f"predicts {self.identity['prediction']}",
        ]
        if isinstance(config, FlexibleConfig) and len(config.patch_sizes) > 1:
            sizes = ", ".join(map(named, config.patch_sizes[1:]))
            lines.append(f"flexible: also runs at patch size {sizes}, and at other sizes than this")
        flex = self.identity["network"].get("flex")
        if flex:
            sizes = ", ".join("x".join(map(str, p)) for p in flex["patch_sizes"])
            lines.append(f"flexible: also runs at patch size {sizes} (recipe {flex['recipe']})")
        exits = self.identity["network"].get("exits")
        if exits:
            lines.append(f"early exits after {', '.join(map(str, exits['depths']))} of {config.depth} blocks")
        width = self.identity["network"].get("width")
        if width:
            lines.append(f"dynamic width: routes {', '.join(width['routes'])} (base {width['base']})")
        if self.identity["network"].get("routers"):
            lines.append("token routers: every site can leave out tokens")
        return "\n".join([*lines, *self.notes])


def architecture(config: DiTConfig, family: str = "DiT") -> str:
    """The published name of a config, or its sizes."""
    ph, pw = config.patch_size
    patch = str(ph) if ph == pw else f"{ph}x{pw}"
    for name, size in SIZES.items():
        if size == {"depth": config.depth, "width": config.width, "heads": config.heads} and config.mlp_ratio == 4:
            return f"{family}-{name}/{patch}"
    return f"{family} of width {config.width}, depth {config.depth}, {config.heads} heads, patch {patch}"


def meta_dit(config: DiTConfig) -> DiT:
    """A network without storage: names, shapes and counts at no cost."""
    with torch.device("meta"):
        return DiT(config)


def dit_of(config: DiTConfig, state: dict[str, Tensor]) -> DiT:
    """A network in eval mode that takes over these tensors: no random initialisation, no second copy."""
    network = meta_dit(config)
    network.load_state_dict(state, assign=True)
    network.positions = patch_positions(config.grid(), config.patch_size, config.patch_size, config.width)
    return network.eval()


def plain_source(
    *,
    format: str,
    location: FilePath,
    config: DiTConfig,
    path: Path,
    prediction: PredictionType,
    network_time: NetworkTime,
    tensors: Callable[[], dict[str, Tensor]],
    metadata: Mapping[str, Any],
    notes: Iterable[str],
) -> Source:
    """A source that holds one plain DiT. `tensors` gives its weights under Pliant's names, fp32 and owned."""

    def load() -> Denoiser:
        network = dit_of(config, tensors())
        return Denoiser(network, path, prediction, network_time, {**metadata, "format": format})

    network = meta_dit(config)
    identity = Denoiser(network, path, prediction, network_time).identity()
    count = sum(p.numel() for p in network.parameters())
    return Source(format, location, identity, count, tuple(notes), load)


def check_options(options: Mapping[str, Any], known: Iterable[str], format: str) -> None:
    """Raises ConfigError for an option that a format does not take."""
    known = list(known)
    for name in options:
        if name not in known:
            hint = suggest(name, known) if known else "It takes none: its files say everything."
            raise ConfigError(f"format {format!r} has no option {name!r}: {hint}")


def option_path(value: str | Path | dict[str, Any]) -> Path:
    """A path given as a name, a config or a path."""
    return path_from_config(value) if isinstance(value, dict) else get_path(value)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: object) -> None:
    """Names, shapes and types must be exactly the expected ones. Raises FormatError naming the first that is not."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise FormatError(f"{where} lacks {_first(missing)}; the file is incomplete or of another architecture")
    if extra:
        raise FormatError(f"{where} has {_first(extra)}, which a plain DiT does not have; it is another architecture")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise FormatError(
                f"{where}: tensor {name!r} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            )
        if not found[name].is_floating_point():
            raise FormatError(f"{where}: tensor {name!r} is of type {found[name].dtype}, expected floating point")


def _first(names: list[str]) -> str:
    return f"the tensor {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def owned(tensor: Tensor) -> Tensor:
    """An fp32 copy that does not keep the file it was read from mapped."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def square_side(tokens: int) -> int | None:
    """n for n*n tokens, None for any other count."""
    side = math.isqrt(tokens)
    return side if side * side == tokens else None
