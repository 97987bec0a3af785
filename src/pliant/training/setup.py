"""From a configuration to the denoiser and the objective that it names."""

from __future__ import annotations

from typing import Any

import torch

from pliant.adapters.token_router import RouterSpec, TokenRoutedDiT
from pliant.adapters.width import DynamicDiT, WidthSpec
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.models.dit import DiT, DiTConfig
from pliant.models.equilibrium import EquilibriumConfig, EquilibriumTransformer
from pliant.models.fit import FiT, FiTConfig
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.models.network import Backbone
from pliant.paths import (
    NetworkTime,
    Path,
    Preconditioning,
    PredictionType,
    VPDiscrete,
    get_path,
    prediction_type,
)
from pliant.training.config import ModelConfig, TrainConfig
from pliant.training.draws import derived_seed
from pliant.training.low_rank import add_low_rank
from pliant.training.objective_config import DynamicWidthConfig, SharedConfig
from pliant.training.objectives import ExitDistillation, Objective
from pliant.training.resolution import freeze_for_resolution


def build_denoiser(config: TrainConfig) -> Denoiser:
    """The denoiser to train, float32 on the CPU. New weights are a function of the seed alone."""
    denoiser = _loaded(config.model.from_) if config.model.from_ is not None else _new(config)
    if config.model.flexify is not None:
        from pliant.adapters.flexify import flexify

        flex = config.model.flexify
        patches = [patch if isinstance(patch, int) else (patch[0], patch[-1]) for patch in flex.patch_sizes]
        native = isinstance(denoiser.network, FlexibleTransformer)
        options = flex.options if native else {"recipe": flex.recipe, **flex.options}
        denoiser = flexify(denoiser, patches, seed=config.seed, **options)
    if config.model.flow_map:
        from pliant.adapters.flow_map import flow_map

        denoiser = flow_map(denoiser, seed=derived_seed("jump", config.seed))
    if config.model.width is not None:
        from pliant.adapters.route_width import route_width

        spec = WidthSpec.from_dict(config.model.width)
        denoiser = route_width(denoiser, seed=config.seed, **spec.to_dict())
    if config.model.routers is not None:
        from pliant.adapters.token_router import route_tokens

        denoiser = route_tokens(denoiser, seed=config.seed, **RouterSpec.from_dict(config.model.routers).to_dict())
    if config.model.exits is not None:
        from pliant.adapters.exits import attach_exits

        denoiser = attach_exits(denoiser, config.model.exits.depths, gates=config.model.exits.gates)
    return _unfreeze(denoiser, config.model)


def _loaded(source: str) -> Denoiser:
    from pliant.formats import load

    denoiser: Denoiser = load(source)
    denoiser.network.float()
    return denoiser


def _unfreeze(denoiser: Denoiser, config: ModelConfig) -> Denoiser:
    """Models for inference may come frozen. Recipe "lora" trains its modes, exits and routers on a frozen base train
    themselves, the rest all weights; unless `trainable` says otherwise."""
    from pliant.adapters import ExitDiT, FlexiDiT

    network = denoiser.network
    network.requires_grad_(True)
    if config.trainable == "all":
        return denoiser
    if config.trainable == "lora":
        add_low_rank(network, config.lora_rank)
        return denoiser
    if config.trainable == "resolution":
        freeze_for_resolution(network)
        return denoiser
    if isinstance(network, FlexiDiT) and network.spec.recipe == "lora":
        network.base.requires_grad_(False)
    frozen = isinstance(network, DynamicDiT) and network.spec.base == "frozen"
    if frozen or isinstance(network, ExitDiT | TokenRoutedDiT):
        network.base.requires_grad_(False)
    return denoiser


def _new(config: TrainConfig) -> Denoiser:
    path, ddpm = _path(config), _own_objective(config) == "ddpm"
    preconditioning = None if config.preconditioning is None else Preconditioning.from_config(config.preconditioning)
    usual: PredictionType = "epsilon" if ddpm else "velocity" if preconditioning is None else "sample"
    prediction = prediction_type(config.prediction or usual)
    network: Backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("weights", config.seed))
        if config.model.flexible is not None:
            network = FlexibleTransformer(FlexibleConfig.from_dict(config.model.flexible))
        elif config.model.equilibrium is not None:
            network = EquilibriumTransformer(EquilibriumConfig.from_dict(config.model.equilibrium))
        elif config.model.fit is not None:
            network = FiT(_fit_config(config.model.fit))
        else:
            network = DiT(_dit_config(config.model, learn_sigma=ddpm))
    return Denoiser(network, path, prediction, _network_time(config, path), preconditioning=preconditioning)


def _own_objective(config: TrainConfig) -> str:
    objective = config.objective
    return objective.own.name if isinstance(objective, SharedConfig | DynamicWidthConfig) else objective.name


def _path(config: TrainConfig) -> Path:
    given = config.path or ("vp-discrete" if _own_objective(config) == "ddpm" else "linear")
    if isinstance(given, str):
        return get_path(given)
    options = dict(given)
    return get_path(str(options.pop("name", None)), **options)


def _network_time(config: TrainConfig, path: Path) -> NetworkTime:
    if config.network_time is not None:
        return NetworkTime.from_config(config.network_time)
    if config.model.fit is not None and not isinstance(path, VPDiscrete):
        return NetworkTime.sit()  # FiTv2's own, so that its official code can read the result
    # The sinusoidal embedder resolves times of 0..1000 best, whatever the path.
    return NetworkTime.timesteps(path.num_timesteps) if isinstance(path, VPDiscrete) else NetworkTime(scale=1000.0)


def _dit_config(model: ModelConfig, learn_sigma: bool) -> DiTConfig:
    fields: dict[str, Any] = {"learn_sigma": learn_sigma, **(model.dit or {})}
    name = fields.pop("name", None)
    if name is None:
        return DiTConfig.from_dict(fields)
    base = DiTConfig.named(str(name)).to_dict()
    return DiTConfig.from_dict({**base, **fields})


def _fit_config(given: dict[str, Any]) -> FiTConfig:
    values = dict(given)
    name = values.pop("name", None)
    base = {} if name is None else FiTConfig.named(str(name)).to_dict()
    return FiTConfig.from_dict({**base, **values})


def build_objective(config: TrainConfig, denoiser: Denoiser) -> Objective:
    """The objective, checked against the denoiser. Raises ConfigError if they do not fit."""
    objective = config.objective.build(denoiser)
    if denoiser.exit_depths and not isinstance(objective, ExitDistillation):
        raise ConfigError("a model with exits is frozen but for them: its objective is 'exits', {name: exits}")
    objective.check(denoiser)
    return objective
