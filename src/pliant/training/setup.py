"""From a configuration to the things it names: denoiser, objective, data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch

from pliant.adapters.token_router import RouterSpec, TokenRoutedDiT
from pliant.adapters.width import DynamicDiT, WidthSpec
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, DataError
from pliant.models.autoencoders import config_scaling, downscale_factor, load_autoencoder
from pliant.models.dit import DiT, DiTConfig
from pliant.models.equilibrium import EquilibriumConfig, EquilibriumTransformer
from pliant.models.fit import FiT, FiTConfig
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.models.network import Backbone, named
from pliant.paths import (
    NetworkTime,
    Path,
    Preconditioning,
    PredictionType,
    VPDiscrete,
    get_path,
    prediction_type,
)
from pliant.training.config import (
    AlignConfig,
    AnySizeConfig,
    DataConfig,
    DDPMConfig,
    DistillConfig,
    DynamicWidthConfig,
    ExitDistillConfig,
    FlowMatchingConfig,
    ModelConfig,
    SharedConfig,
    TokenRouterConfig,
    TrainConfig,
)
from pliant.training.data import (
    JoinedPairs,
    LatentSet,
    PairSet,
    SizedSet,
    TrainingSet,
    TwoSets,
    autoencoder_encode,
    cached_latents,
    is_pair_store,
    open_any_size,
    open_images,
)
from pliant.training.data.latents import INDEX as LATENT_INDEX
from pliant.training.data.latents import Scaling
from pliant.training.distill_config import density
from pliant.training.draws import Draws, derived_seed
from pliant.training.low_rank import add_low_rank
from pliant.training.objectives import (
    DDPM,
    AnySizeFlow,
    DynamicWidth,
    ExitDistillation,
    FlopsTarget,
    FlowMatching,
    MMDBootstrap,
    Objective,
    PatchDistillation,
    SharedPatches,
    TokenDistillation,
)
from pliant.training.objectives.refiner import VelocityRefiner
from pliant.training.resolution import freeze_for_resolution
from pliant.training.section import ObjectiveSection


def build_denoiser(config: TrainConfig) -> Denoiser:
    """The denoiser to train, float32 on the CPU. New weights are a function of the seed alone."""
    denoiser = _loaded(config.model.from_) if config.model.from_ is not None else _new(config)
    if config.model.flexify is not None:
        from pliant.adapters.flexify import flexify

        flex = config.model.flexify
        patches = [patch if isinstance(patch, int) else (patch[0], patch[-1]) for patch in flex.patch_sizes]
        denoiser = flexify(denoiser, patches, seed=config.seed, recipe=flex.recipe, **flex.options)
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
    objective = _objective(config.objective, denoiser)
    if denoiser.exit_depths and not isinstance(objective, ExitDistillation):
        raise ConfigError("a model with exits is frozen but for them: its objective is 'exits', {name: exits}")
    objective.check(denoiser)
    return objective


def _objective(config: Any, denoiser: Denoiser) -> Objective:
    if isinstance(config, ObjectiveSection):
        return config.build(denoiser)
    if isinstance(config, SharedConfig):
        mmd = None if config.mmd is None else MMDBootstrap(**config.mmd.model_dump())
        return SharedPatches(_objective(config.own, denoiser), mmd)
    if isinstance(config, DynamicWidthConfig):
        own = _objective(config.own, denoiser)
        assert isinstance(own, (FlowMatching, DDPM))
        target = FlopsTarget(config.target, config.hold, config.warmup)
        return DynamicWidth(own, target, config.weight, config.complete_steps)
    dropout = _class_dropout(config.class_dropout, denoiser)
    if isinstance(config, DDPMConfig):
        return DDPM(dropout)
    if isinstance(config, DistillConfig):
        return PatchDistillation(density(config.time) if config.time else None, dropout, config.variance_weight)
    if isinstance(config, ExitDistillConfig):
        time = density(config.time) if config.time else None
        times = _plan_times(config.plan, denoiser) if config.plan else ()
        return ExitDistillation(time, times, config.weight, dropout, config.variance_weight)
    if isinstance(config, TokenRouterConfig):
        time = density(config.time) if config.time else None
        return TokenDistillation(config.keep, config.budget, config.norm, config.entropy, time, dropout)
    if isinstance(config, AnySizeConfig):
        patches = None if config.patches is None else tuple(config.patches)
        flow = AnySizeFlow(density(config.time), dropout, config.shift_pixels, patches)
        return flow if config.align is None else _aligned(flow, config.align, denoiser)
    if isinstance(config, FlowMatchingConfig):
        time, coupling, metric = density(config.time), config.coupling.build(), config.metric.build()
        return FlowMatching(time, dropout, coupling, metric, prediction_type(config.space))
    raise TypeError(type(config).__name__)  # pragma: no cover - the config's union is closed


def _aligned(flow: AnySizeFlow, config: AlignConfig, denoiser: Denoiser) -> Objective:
    """The objective with REPA's term. The network gets the projector, which trains with it and is not exported."""
    from pliant.training.representation import RepresentationAlignment, TokenEncoder, attach_projector

    encoder = TokenEncoder.load(config.encoder)
    autoencoder = None if config.autoencoder is None else load_autoencoder(config.autoencoder)
    attach_projector(denoiser, encoder.dim, config.hidden)
    return RepresentationAlignment(flow, encoder, config.layer, config.weight, autoencoder)


def _plan_times(file: str, denoiser: Denoiser) -> tuple[float, ...]:
    """House times at which a plan calls the network."""
    from pliant.plans import Plan

    plan = Plan.load(file)
    plan.check(denoiser)
    return tuple(evaluation.node.t for evaluation in plan.program(denoiser).evaluations)


def _class_dropout(given: float | None, denoiser: Denoiser) -> float:
    own = denoiser.config.class_dropout
    if given is not None and given > 0 and own == 0:
        raise ConfigError("class_dropout needs a null label: give the network `class_dropout` above 0 (DiT: 0.1)")
    return own if given is None else given


def data_model(objective: Objective, denoiser: Denoiser) -> Denoiser:
    """The denoiser whose states the training data are: a refiner's teacher, else the one in training."""
    return objective.teacher if isinstance(objective, VelocityRefiner) else denoiser


def build_data(config: TrainConfig, denoiser: Denoiser) -> TrainingSet:
    """The training set at the denoiser's size: images, their latents, or pairs. Raises DataError if unusable."""
    channels, height, width = denoiser.sample_shape
    if is_pair_store(config.data.source):
        parts = [PairSet(folder) for folder in (config.data.source, *config.data.more_pairs)]
        return parts[0] if len(parts) == 1 else JoinedPairs(parts)
    if config.data.more_pairs:
        raise ConfigError(f"data.more_pairs joins folders of pairs, but {config.data.source!r} is not one")
    if config.data.autoencoder is None:
        images = _images(config.data, channels, (height, width))
        if config.data.opposite is None:
            return images
        other = config.data.model_copy(update={"source": config.data.opposite})
        return TwoSets(images, _images(other, channels, (height, width)))
    if config.data.opposite is not None:
        raise ConfigError("data.opposite works on pixels: leave out data.autoencoder")
    autoencoder = load_autoencoder(config.data.autoencoder)
    factor = downscale_factor(autoencoder)
    size = (height * factor, width * factor)
    images = _images(config.data, int(getattr(autoencoder.config, "in_channels", 3)), size)
    return cached_latents(
        config.data.latents or f"{config.output}/latents",
        images,
        autoencoder_encode(autoencoder),
        f"{config.data.source} ({config.data.split}) at {size[0]}x{size[1]}, {config.data.autoencoder}",
        scaling=_latent_scaling(config, denoiser, autoencoder),
        flip=config.data.flip,
    )


def build_sized_data(config: TrainConfig, denoiser: Denoiser) -> SizedSet:
    """The training set of an objective for any size: a folder of latents (`pliant encode`), or images, nothing cropped.

    Raises DataError or ConfigError if it cannot be used.
    """
    data = config.data
    if (FilePath(data.source) / LATENT_INDEX).is_file():
        if data.autoencoder is not None:
            raise ConfigError(f"{data.source} holds latents already: leave out data.autoencoder")
        return LatentSet(data.source)
    if data.side is None:
        raise ConfigError("images of any size need `data.side`: those of more than side*side pixels are shrunk to that")
    steps = [math.lcm(*(patch[axis] for patch in denoiser.patch_sizes)) for axis in range(2)]
    unit = math.lcm(*steps)
    if data.autoencoder is None:
        return _sized_images(data, denoiser.config.in_channels, unit)
    autoencoder = load_autoencoder(data.autoencoder)
    unit *= downscale_factor(autoencoder)
    return cached_latents(
        data.latents or f"{config.output}/latents",
        _sized_images(data, int(getattr(autoencoder.config, "in_channels", 3)), unit),
        autoencoder_encode(autoencoder),
        f"{data.source} ({data.split}) within {data.side}x{data.side} by {unit}, {data.autoencoder}",
        scaling=_latent_scaling(config, denoiser, autoencoder),
        flip=data.flip,
    )


def _sized_images(data: DataConfig, channels: int, unit: int) -> SizedSet:
    assert data.side is not None
    return open_any_size(
        data.source, channels, data.side, unit, data.split, data.image_column, data.label_column, data.limit
    )


def check_sized_data(data: SizedSet, denoiser: Denoiser) -> None:
    """Raise DataError if a sample or a label has no place in the network."""
    channels = int(data.samples(torch.tensor([0]), torch.tensor([False]), Draws.single(1)).shape[1])
    if channels != denoiser.config.in_channels:
        raise DataError(f"the data has {channels} channels, the model takes {denoiser.config.in_channels}")
    for size in data.sizes.unique(dim=0).tolist():
        denoiser.core.check_size(tuple(size))
        reason = denoiser.core.beyond(tuple(size))
        if reason is not None:
            raise DataError(
                f"the data has samples of size {named(tuple(size))}, the model says that it trains on {reason}; set "
                f"{_RANGE[denoiser.core.family]} to what the data has"
            )
    _check_labels(data.labels, denoiser, denoiser.core.family)


_RANGE = {"flexible": "model.flexible.train_sides and train_pixels", "fit": "model.fit.train_tokens"}


def _latent_scaling(config: TrainConfig, denoiser: Denoiser, autoencoder: Any) -> Scaling:
    """A trained model keeps the normalisation it was trained with; a new one gets latents of unit variance."""
    stored = denoiser.metadata.get("latents")
    if stored:
        return stored["shift"], stored["scale"]
    return "standardise" if config.model.from_ is None else config_scaling(autoencoder)


def open_data(config: DataConfig, denoiser: Denoiser) -> TrainingSet:
    """Images (not latents) at a denoiser's size. Raises DataError if they cannot be used."""
    if config.autoencoder is not None:
        raise ConfigError("this needs images as pixels: leave out the data's autoencoder")
    channels, height, width = denoiser.sample_shape
    return _images(config, channels, (height, width))


def _images(config: DataConfig, channels: int, size: tuple[int, int]) -> TrainingSet:
    return open_images(
        config.source, channels, size, config.split, config.image_column, config.label_column, config.limit
    )


def check_data(data: TrainingSet, denoiser: Denoiser) -> None:
    """Raise DataError if a sample or a label has no place in the network."""
    if tuple(data.shape) != denoiser.sample_shape:
        raise DataError(f"the data has samples of {tuple(data.shape)}, the model takes {denoiser.sample_shape}")
    _check_labels(data.labels, denoiser, "dit")


def _check_labels(labels: torch.Tensor, denoiser: Denoiser, family: str) -> None:
    highest = int(labels.max())
    if highest >= denoiser.num_classes:
        raise DataError(
            f"the data has labels up to {highest}, but the model has {denoiser.num_classes} classes; "
            f"set model.{family}.num_classes to at least {highest + 1}"
        )


def with_data_facts(denoiser: Denoiser, data: TrainingSet | SizedSet) -> Denoiser:
    """The denoiser with what its users must know of the data: class names, and how latents were normalised."""
    facts: dict[str, Any] = {}
    names = list(data.class_names)
    if "class_names" not in denoiser.metadata and len(names) == denoiser.num_classes:
        facts["class_names"] = names
    if isinstance(data, LatentSet):
        facts["latents"] = data.normalisation
    return replace(denoiser, metadata={**denoiser.metadata, **facts})
