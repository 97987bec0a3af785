"""Pliant's own model folder: `config.json` (what the tensors mean) and `model.safetensors` (the tensors).

An adapter folder holds only the tensors that flexification (recipe "lora"), early exits or width routers (on a frozen
base) added, in `adapter.safetensors`; its config names the architecture of the base it belongs to.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pliant.adapters.exit_dit import ExitDiT, ExitSpec
from pliant.adapters.flexible_dit import FlexiDiT
from pliant.adapters.spec import FlexSpec
from pliant.adapters.token_router import RouterSpec, TokenRoutedDiT
from pliant.adapters.width import DynamicDiT, WidthSpec
from pliant.denoiser import Denoiser, Network, Trained
from pliant.errors import FormatError, PliantError
from pliant.files import replaced_folder, write_json
from pliant.formats.source import dit_of, meta_dit, owned
from pliant.models.dit import DiT, DiTConfig
from pliant.models.network import Family, NetworkConfig, family_of
from pliant.paths import NetworkTime, Path, Preconditioning, PredictionType, path_from_config, prediction_type

FORMAT, VERSION = "pliant", 1
MODEL_FILE, ADAPTER_FILE, CONFIG_FILE = "model.safetensors", "adapter.safetensors", "config.json"
PLAN_FILE = "plan.json"
"""Of a few-step model: the plan it was made for."""
REFINER = "refiner"
"""Folder, itself a model's, of the network that corrects velocities."""


def model_config(denoiser: Denoiser) -> dict[str, Any]:
    """The content of config.json."""
    return {"format": FORMAT, "version": VERSION, **denoiser.identity(), "metadata": denoiser.metadata}


def save(denoiser: Denoiser, folder: str | FilePath, dtype: torch.dtype | None = None) -> None:
    """Write a model folder atomically. `dtype` converts floating tensors (e.g. torch.bfloat16 to halve the size)."""
    with replaced_folder(folder) as temporary:
        _fill(temporary, model_config(denoiser), MODEL_FILE, denoiser.network.state_dict(), dtype)
        if denoiser.own_plan is not None:
            write_json(temporary / PLAN_FILE, denoiser.own_plan)
        if denoiser.refiner is not None:
            save(denoiser.refiner, temporary / REFINER, dtype)


def save_adapter(denoiser: Denoiser, folder: str | FilePath, dtype: torch.dtype | None = None) -> None:
    """Write only what was added: exits or routers if there are any, else what flexification added (recipe "lora")."""
    if not isinstance(denoiser.network, FlexiDiT | ExitDiT | DynamicDiT | TokenRoutedDiT):
        raise FormatError(
            "this model is not flexible and has no exits, so it has no adapter; see pliant.flexify, attach_exits"
        )
    with replaced_folder(folder) as temporary:
        _fill(temporary, model_config(denoiser), ADAPTER_FILE, denoiser.network.adapter_state_dict(), dtype)


def _fill(
    folder: FilePath, config: dict[str, Any], name: str, state: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Write tensors and config into a folder that nobody sees yet."""
    tensors = {k: (v.to(dtype) if dtype and v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)


def read_tensors(file: FilePath) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises FormatError if it is missing or damaged."""
    if not file.is_file():
        raise FormatError(f"{file} does not exist; a model folder needs {CONFIG_FILE} and {MODEL_FILE}")
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is damaged or not a safetensors file ({error}); copy or download it again") from None


def read_tensor(file: FilePath, name: str) -> Tensor:
    """One tensor of a safetensors file that `read_tensors` could open."""
    with safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor


def read_config(folder: FilePath) -> dict[str, Any]:
    """config.json of any folder. Raises FormatError if it is missing or not JSON."""
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{folder} holds no {CONFIG_FILE}, so it is not a model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{file} is not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{file} holds {type(config).__name__}, expected a JSON object")
    return config


class Meaning(NamedTuple):
    """A checked config.json."""

    family: Family
    network: NetworkConfig
    flex: FlexSpec | None
    exits: ExitSpec | None
    width: WidthSpec | None
    routers: RouterSpec | None
    path: Path
    prediction: PredictionType
    network_time: NetworkTime
    metadata: dict[str, Any]
    preconditioning: Preconditioning | None
    trained: Trained | None

    def denoiser(self, network: Network) -> Denoiser:
        return Denoiser(
            network,
            self.path,
            self.prediction,
            self.network_time,
            self.metadata,
            preconditioning=self.preconditioning,
            trained=self.trained,
        )


def parse(config: dict[str, Any], where: object) -> Meaning:
    """Check a config. Raises FormatError naming what is missing or unknown."""
    if config.get("format") != FORMAT:
        raise FormatError(f"{where} is not a Pliant config (format {config.get('format')!r})")
    if config.get("version") != VERSION:
        raise FormatError(f"{where} has config version {config.get('version')!r}, this Pliant reads version {VERSION}")
    try:
        kind, network = family_of(config["network"])
        flex, exits, width = (config["network"].get(name) for name in ("flex", "exits", "width"))
        routers = config["network"].get("routers")
        preconditioning, trained = config.get("preconditioning"), config.get("trained")
        return Meaning(
            family=kind,
            network=network,
            flex=FlexSpec.from_dict(flex) if flex else None,
            exits=ExitSpec.from_dict(exits) if exits else None,
            width=WidthSpec.from_dict(width) if width else None,
            routers=RouterSpec.from_dict(routers) if routers else None,
            path=path_from_config(config["path"]),
            prediction=prediction_type(config["prediction"]),
            network_time=NetworkTime.from_config(config["network_time"]),
            metadata=dict(config.get("metadata", {})),
            preconditioning=Preconditioning.from_config(preconditioning) if preconditioning else None,
            trained=Trained.from_config(trained) if trained else None,
        )
    except KeyError as error:
        raise FormatError(f"{where} lacks the field {error.args[0]!r}") from None
    except PliantError as error:
        raise FormatError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{where} has a field of the wrong type ({error})") from None


def build(config: dict[str, Any], where: object) -> Denoiser:
    """An untrained denoiser as a config describes it. Raises FormatError naming what is missing or unknown."""
    meaning = parse(config, where)
    try:
        base = meaning.family.build(meaning.network)
        if not isinstance(base, DiT):
            if (meaning.flex, meaning.exits, meaning.width, meaning.routers) != (None,) * 4:
                raise FormatError(f"adapters of a DiT on a {base.family} network")
            return meaning.denoiser(base)
        network: DiT | FlexiDiT = FlexiDiT(base, meaning.flex) if meaning.flex else base
        if meaning.width:
            return meaning.denoiser(DynamicDiT(base, meaning.width))
        if meaning.routers:
            return meaning.denoiser(TokenRoutedDiT(network, meaning.routers))
        if meaning.exits:
            return meaning.denoiser(ExitDiT(network, meaning.exits))
        return meaning.denoiser(network)
    except PliantError as error:
        raise FormatError(f"{where}: {error}") from None


def count_parameters(file: FilePath) -> int:
    """Numbers in a safetensors file, from its header alone. Raises FormatError if it is missing or damaged."""
    if not file.is_file():
        raise FormatError(f"{file} does not exist; a model folder needs {CONFIG_FILE} and {MODEL_FILE}")
    try:
        with safe_open(file, framework="pt") as handle:
            shapes = [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is damaged or not a safetensors file ({error}); copy or download it again") from None
    return sum(math.prod(shape) for shape in shapes)


def load(folder: str | FilePath) -> Denoiser:
    """Read a model folder; weights come back in fp32 and the network in eval mode."""
    folder = FilePath(folder)
    refiner = load(folder / REFINER) if (folder / REFINER).is_dir() else None
    return replace(_load(folder), own_plan=read_plan(folder), refiner=refiner)


def read_plan(folder: FilePath) -> dict[str, Any] | None:
    """The plan beside the weights, unchecked; None if there is none. Raises FormatError if it is not JSON."""
    file = folder / PLAN_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{file} is not readable JSON ({error}); delete it, or write the plan again") from None
    if found is not None and not isinstance(found, dict):
        raise FormatError(f"{file} holds {type(found).__name__}, expected a plan: a JSON object")
    return found


def _load(folder: FilePath) -> Denoiser:
    file, config = folder / MODEL_FILE, read_config(folder)
    meaning = parse(config, folder / CONFIG_FILE)
    if not file.exists() and (folder / ADAPTER_FILE).exists():
        raise FormatError(f"{folder} holds only an adapter; load its base model first, then pliant.load_adapter")
    tensors = read_tensors(file)
    plain = (meaning.flex, meaning.exits, meaning.width, meaning.routers) == (None,) * 4
    if plain and isinstance(meaning.network, DiTConfig):
        _check_fit(meta_dit(meaning.network).state_dict(), tensors, file)
        names = list(tensors)
        del tensors
        # One mapping per tensor: a single one would keep every page it read, a second copy of the model in memory.
        network: Network = dit_of(meaning.network, {name: owned(read_tensor(file, name)) for name in names})
        return meaning.denoiser(network)
    denoiser = build(config, folder / CONFIG_FILE)
    assign(denoiser.network, tensors, file)
    denoiser.network.eval()
    return denoiser


def assign(network: Network, tensors: dict[str, Tensor], where: object) -> None:
    """Copy tensors into a network. Raises FormatError naming the first tensor that is missing, odd or mis-shaped."""
    _check_fit(network.state_dict(), tensors, where)
    network.load_state_dict(tensors)


def _check_fit(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: object) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        found = f"has the unknown tensor {extra[0]!r} and {len(extra) - 1} more" if extra else "has no unknown tensors"
        lost = f"lacks {missing[0]!r} and {len(missing) - 1} more" if missing else "lacks none"
        raise FormatError(f"{where} does not fit its config: it {lost} and {found}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise FormatError(
                f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"the config says {tuple(expected[name].shape)}"
            )


def load_adapter(denoiser: Denoiser, folder: str | FilePath) -> Denoiser:
    """A base denoiser plus an adapter folder -> the flexible denoiser, or the one with exits or routers.

    The base's weights are shared, not copied (and frozen). Exits go on top: load a flexible adapter before them.
    """
    folder = FilePath(folder)
    config = read_config(folder)
    wanted, core = build(config, folder / CONFIG_FILE).network, denoiser.dit
    base = core.base if isinstance(core, FlexiDiT) else core
    if wanted.config != base.config:
        raise FormatError(f"{folder} was made for another architecture than this model; see both with 'pliant info'")
    if not isinstance(wanted, FlexiDiT | ExitDiT | DynamicDiT | TokenRoutedDiT):
        raise FormatError(f"{folder} adds neither patch sizes nor exits nor routers, so it is no adapter")
    if isinstance(wanted, FlexiDiT) and isinstance(denoiser.network, ExitDiT):
        raise FormatError(f"{folder} adds patch sizes, which go below exits; load it first, then the exits")
    try:
        network: FlexiDiT | ExitDiT | DynamicDiT | TokenRoutedDiT
        if isinstance(wanted, TokenRoutedDiT):
            network = TokenRoutedDiT(core, wanted.spec)
        elif isinstance(wanted, DynamicDiT):
            network = DynamicDiT(base, wanted.spec)
        else:
            assert isinstance(wanted, ExitDiT | FlexiDiT)  # for the type checker: DiT adapters are these
            network = ExitDiT(core, wanted.spec) if isinstance(wanted, ExitDiT) else FlexiDiT(base, wanted.spec)
        network.load_adapter_state_dict(read_tensors(folder / ADAPTER_FILE))
    except PliantError as error:
        raise FormatError(f"{folder}: {error}") from None
    return replace(denoiser, network=network.eval(), metadata=dict(denoiser.metadata), forward=None)
