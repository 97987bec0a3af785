"""The typed configuration tree of a training run, loaded from YAML; unknown keys are refused.

config = load_config("configs/digits.yaml", ["steps=200", "optimizer.lr=3e-4"])
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pliant.errors import ConfigError, suggest
from pliant.training.distill_config import (
    ConsistencyConfig,
    EDMConfig,
    FlowGuidedConfig,
    InterpolantConfig,
    PhasedConfig,
    SegmentsConfig,
    StepsConfig,
)
from pliant.training.flow_config import FlowMatchingConfig as FlowMatchingConfig
from pliant.training.flow_map_config import (
    FLOW_MAP_SECTIONS,
    AlphaFlowConfig,
    EquilibriumObjective,
    ImprovedMeanFlowConfig,
    MeanFlowConfig,
    RefinerConfig,
    SegmentedConfig,
    ShortcutConfig,
    SplitMeanFlowConfig,
    TrajectoryConfig,
    TrigConsistencyConfig,
)
from pliant.training.section import Section


class FlexifyConfig(Section):
    """Make the model flexible before training. Fields of `FlexSpec`; see `pliant flexify --help`."""

    patch_sizes: list[int | list[int]]
    recipe: Literal["lora", "shared"] = "lora"
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the recipe, e.g. {rank: 32}."""


class ExitsConfig(Section):
    """Give the model early exits before training; it is frozen itself. See `pliant exits --help`."""

    depths: list[int]
    """Blocks before each exit."""
    gates: Literal["copy", "zero"] = "copy"


class ModelConfig(Section):
    """A new network (`dit`, `flexible` or `fit`) or a trained one (`from`); optionally made flexible or given exits."""

    flexible: dict[str, Any] | None = None
    """Fields of FlexibleConfig: a new native network, for any size and several patch sizes."""
    equilibrium: dict[str, Any] | None = None
    """Fields of EquilibriumConfig: a new GET, which makes an image of noise in one call."""
    fit: dict[str, Any] | None = None
    """Fields of FiTConfig; `name: FiTv2-B/2` fills in a named size first."""
    dit: dict[str, Any] | None = None
    """Fields of DiTConfig; `name: DiT-S/2` fills in a named size first."""
    from_: str | None = Field(default=None, alias="from")
    """Folder, file or Hub id of a model."""
    flexify: FlexifyConfig | None = None
    exits: ExitsConfig | None = None
    width: dict[str, Any] | None = None
    """Give the model routers of its width (DyDiT): fields of `WidthSpec`, {} for the paper's."""
    routers: dict[str, Any] | None = None
    """Give the model token routers (Infor-Coef): fields of `RouterSpec`."""
    flow_map: bool = False
    """Tell the network where a step lands, so that it can learn to jump; see `pliant distill mean-flow`."""
    trainable: Literal["own", "all", "lora", "resolution"] = "own"
    """What trains. own: what the model's kind says (adapters, exits and routers on a frozen base, else all); all: every
    weight; lora: low-rank changes of every block's linear layers, merged into them at the end; resolution: what FiTv2
    trains on larger images (patches, heads, conditioning, biases), see `training/resolution.py`."""
    lora_rank: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        new = (self.dit, self.flexible, self.fit, self.equilibrium)
        if sum(given is not None for given in (*new, self.from_)) != 1:
            raise ValueError("give one of `dit`, `flexible`, `fit`, `equilibrium` (new) or `from` (a trained model)")
        for name in ("flexify", "exits", "width", "routers"):
            if (self.flexible is not None or self.fit is not None) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for a DiT; a flexible network has patch sizes from the start")
            if self.equilibrium is not None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for a DiT, not for an equilibrium transformer")
        if self.exits is not None and self.from_ is None:
            raise ValueError("`exits` imitate a trained model: give `from`")
        return self


class AlignConfig(Section):
    """REPA: tokens of one layer are led towards those of a frozen vision encoder that sees the clean images."""

    encoder: str
    """Folder or Hub id of a vision encoder of transformers, e.g. facebook/dinov2-base."""
    layer: int = Field(ge=1)
    """Blocks before the aligned tokens; about a quarter to a third of the depth."""
    weight: float = Field(default=0.5, ge=0)
    hidden: int = Field(default=2048, ge=1)
    """Of the projector, which is not exported."""
    autoencoder: str | None = None
    """What decodes latents to the images that the encoder sees; null: training data are images."""


class AnySizeConfig(Section):
    """Rectified flow on samples of any size, packed, at a random patch size per batch: for flexible networks."""

    name: Literal["any_size"]
    time: str | dict[str, Any] = "logit-normal"
    """Density of training times, as flow_matching's."""
    class_dropout: float | None = Field(default=None, ge=0, le=1)
    shift_pixels: int | None = Field(default=None, ge=1)
    """Size (pixels of the state) at which times are as drawn; larger states train noisier. null: no shift."""
    patches: list[float] | None = None
    """How often each patch size is trained, in the network's order; null: equally."""
    align: AlignConfig | None = None
    """Align a hidden layer with a vision encoder (REPA); of flexible networks."""


class DDPMConfig(Section):
    """DiT's loss: noise MSE, plus the variational bound for learned variances. Path vp-discrete."""

    name: Literal["ddpm"]
    class_dropout: float | None = Field(default=None, ge=0, le=1)


class MMDConfig(Section):
    """Bootstrap of recipe S (sheet A, 7.3)."""

    weight: float = Field(default=0.1, ge=0)
    weak_steps: int = Field(default=2, ge=1)
    powerful_steps: int = Field(default=2, ge=1)
    grid: int = Field(default=250, ge=3)
    clean_bias: float = Field(default=2.0, gt=0)


class SharedConfig(Section):
    """Recipe S: the model's own loss at a random patch size per batch."""

    name: Literal["shared"]
    own: Annotated[
        FlowMatchingConfig | DDPMConfig | StepsConfig | FlowGuidedConfig | PhasedConfig | SegmentsConfig
        | ConsistencyConfig | MeanFlowConfig | ImprovedMeanFlowConfig | AlphaFlowConfig | SplitMeanFlowConfig
        | ShortcutConfig | TrajectoryConfig | SegmentedConfig | TrigConsistencyConfig,
        Field(discriminator="name"),
    ] = FlowMatchingConfig()
    mmd: MMDConfig | None = None


class DistillConfig(Section):
    """Recipe L: new patch sizes imitate the original one."""

    name: Literal["distill"]
    time: str | dict[str, Any] | None = None
    """Default: uniform (over the table's entries on vp-discrete)."""
    class_dropout: float | None = Field(default=None, ge=0, le=1)
    variance_weight: float = Field(default=0.1, ge=0)


class ExitDistillConfig(Section):
    """Early exits imitate the full network, which stays frozen."""

    name: Literal["exits"]
    time: str | dict[str, Any] | None = None
    """Default: uniform (over the table's entries on vp-discrete)."""
    plan: str | None = None
    """Plan file whose own times to train at, instead of `time`."""
    weight: Literal["one", "velocity"] = "one"
    """Of an error by time: none, or what it is worth in the velocity."""
    class_dropout: float | None = Field(default=None, ge=0, le=1)
    variance_weight: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _times(self) -> ExitDistillConfig:
        if self.time is not None and self.plan is not None:
            raise ValueError("give either `time` or `plan`")
        return self


class DynamicWidthConfig(Section):
    """DyDiT: the model's own loss with routed width, and a FLOPs target. One model per target."""

    name: Literal["dydit"]
    target: float = Field(gt=0, le=1)
    """Share of all attention and MLP work."""
    own: Annotated[FlowMatchingConfig | DDPMConfig, Field(discriminator="name")] = FlowMatchingConfig()
    weight: float = Field(default=2.0, ge=0)
    """Of the FLOPs loss."""
    hold: int = Field(default=100, ge=0)
    """First steps that aim at everything."""
    warmup: int = Field(default=1000, ge=0)
    """From this step on the aim is `target`."""
    complete_steps: int = Field(default=30_000, ge=0)
    """Stage 1: so many steps also train the complete network."""


class TokenRouterConfig(Section):
    """Infor-Coef: token routers imitate the full network, which stays frozen, on fewer tokens."""

    name: Literal["token-routers"]
    keep: float | None = Field(default=None, gt=0, le=1)
    """Share of the tokens that training aims at; null: no aim, as many as the penalties leave."""
    budget: float = Field(default=1.0, ge=0)
    """Weight of `(mean keep - keep)^2`."""
    norm: float = Field(default=4e-4, ge=0)
    """Weight of the size of what is kept, per token."""
    entropy: float = Field(default=5e-4, ge=0)
    """Weight of the negative entropy of decisions."""
    time: str | dict[str, Any] | None = None
    """Default: uniform (over the table's entries on vp-discrete)."""
    class_dropout: float | None = Field(default=None, ge=0, le=1)


ObjectiveConfig = Annotated[
    FlowMatchingConfig
    | AnySizeConfig
    | DDPMConfig
    | SharedConfig
    | DistillConfig
    | ExitDistillConfig
    | DynamicWidthConfig
    | TokenRouterConfig
    | StepsConfig
    | FlowGuidedConfig
    | PhasedConfig
    | SegmentsConfig
    | ConsistencyConfig
    | InterpolantConfig
    | EDMConfig
    | MeanFlowConfig
    | ImprovedMeanFlowConfig
    | AlphaFlowConfig
    | SplitMeanFlowConfig
    | ShortcutConfig
    | TrajectoryConfig
    | SegmentedConfig
    | TrigConsistencyConfig
    | EquilibriumObjective
    | RefinerConfig,
    Field(discriminator="name"),
]


class DataConfig(Section):
    """Images and labels."""

    source: str
    """"digits", a folder (sub-folders are classes, or metadata.jsonl), a Parquet file or glob, a Hub set, or pairs."""
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = "label"
    """null: no labels, everything is class 0."""
    flip: bool = False
    """Mirror half of the samples left-right."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many images."""
    side: int | None = Field(default=None, ge=1)
    """Of images of any size: those of more than side*side pixels are shrunk to that area, none is cropped."""
    autoencoder: str | None = None
    """Folder or Hub id of a diffusers autoencoder: train on its latents instead of pixels."""
    latents: str | None = None
    """Folder that keeps the encoded latents; default: `latents/` in the output folder."""
    more_pairs: list[str] = Field(default_factory=list)
    """Further folders of pairs, if `source` is one: inverted real images."""
    opposite: str | None = None
    """A second data set (as `source`): its images, not noise, are the other end of the path (domain transfer)."""


class OptimizerConfig(Section):
    """AdamW and the learning rate's course."""

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "cosine", "linear", "refined"] = "constant"
    """refined: from the gradient norms that an earlier run recorded, `refine_from` (arXiv 2310.07831)."""
    record_norms: bool = False
    """Write every step's gradient norm (L1, for Adam) to `gradient-norms.jsonl` in the output folder."""
    refine_from: str | None = None
    """Folder of a run with recorded norms."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null: no clipping."""


    @model_validator(mode="after")
    def _refined(self) -> OptimizerConfig:
        if (self.decay == "refined") != (self.refine_from is not None):
            raise ValueError("decay 'refined' and refine_from, the folder of an earlier run, belong together")
        if self.decay == "refined" and self.warmup:
            raise ValueError("a refined schedule has its own warm-up: leave out warmup")
        return self


class EMAConfig(Section):
    """Average of the weights that is exported and sampled from."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    warmup: bool = True
    """Use min(decay, (1+k)/(10+k)) at step k; false: the plain decay of the papers."""


class CheckpointConfig(Section):
    """Resumable states `checkpoint-000500/` in the output folder."""

    every: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep: int = Field(default=2, ge=1)


class SamplingConfig(Section):
    """Sample grids during training."""

    every: int = Field(default=0, ge=0)
    """Optimizer steps between grids; 0: none."""
    steps: int = Field(default=25, ge=1)
    solver: str = "heun"
    guidance: float = Field(default=1.0, ge=0)
    columns: int = Field(default=10, ge=1)
    """Classes shown, one per column."""
    rows: int = Field(default=4, ge=1)


class TrainConfig(Section):
    """A training run. Two runs with equal configs give equal results."""

    model: ModelConfig
    path: str | dict[str, Any] | None = None
    """Of a new network: linear (default), vp-discrete (default for ddpm), vp, cosine, gvp."""
    prediction: str | None = None
    """Of a new network: velocity (default), epsilon (default for ddpm), sample, v_prediction, score."""
    network_time: dict[str, Any] | None = None
    """Of a new network: {scale, offset, reversed}; default 1000*t, or table entries on vp-discrete."""
    preconditioning: dict[str, Any] | None = None
    """Make a new network EDM's bare F: {kind: edm, sigma_data: 0.5}. It then predicts samples."""
    objective: ObjectiveConfig = FlowMatchingConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per optimizer step, over all processes and accumulation."""
    tokens: int | None = Field(default=None, ge=1)
    """Instead of batch_size, for samples of any size: most tokens per forward pass and process, at the finest patch."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step and process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, optimizer and EMA stay float32."""
    checkpointing: bool = False
    """Compute every block again in the backward pass instead of keeping its activations: less memory, more time."""
    seed: int = Field(default=0, ge=0)
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    log_every: int = Field(default=50, ge=1)
    output: str
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard events, samples, and `model/` at the end."""
    resume: Literal["latest"] | None = None
    """latest: go on from the newest valid checkpoint in `output` (from the start if there is none)."""

    @model_validator(mode="after")
    def _batches(self) -> TrainConfig:
        any_size = isinstance(self.objective, AnySizeConfig)
        wanted, other = ("tokens", "batch_size") if any_size else ("batch_size", "tokens")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"objective {self.objective.name!r} needs `{wanted}`, and not `{other}`")
        return self

    @model_validator(mode="after")
    def _model_fields(self) -> TrainConfig:
        if self.model.from_ is not None:
            for name in ("path", "prediction", "network_time", "preconditioning"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` belongs to new networks; a model loaded with `from` brings its own")
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `parse_config` reads it back."""
        return self.model_dump(mode="json", by_alias=True)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply `key.sub=value` overrides (values are YAML). Raises ConfigError."""
    return parse_config(read_tree(file, overrides))


def read_tree(file: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, changed by `key.sub=value` overrides. Raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} should hold `key: value` pairs at the top level, e.g. `steps: 1000`")
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = key.strip().split(".")
    for name in parents:
        # `dict | None` sections may be absent or null in the file.
        if not isinstance(tree.get(name), dict):
            if tree.get(name) is not None:
                raise ConfigError(f"override {override!r}: {name} is {tree[name]!r}, not a section")
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def parse_config(tree: Mapping[str, Any]) -> TrainConfig:
    """A config from nested mappings. Raises ConfigError in one line."""
    return parse_section(TrainConfig, tree)


SectionT = typing.TypeVar("SectionT", bound=Section)


def parse_section(section: type[SectionT], tree: Mapping[str, Any]) -> SectionT:
    """A section of any kind from nested mappings. Raises ConfigError in one line."""
    _reject_unknown(section, tree, "")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        # Union tags appear in pydantic's locations; a reader's keys are those that the file really has.
        where = ".".join(str(part) for part in first["loc"] if not _is_tag(str(part)))
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise ConfigError(f"config{' key ' + where if where else ''}: {message}{given}") from None


def _sections(annotation: Any) -> list[type[Section]]:
    """The Section classes in an annotation such as `X | None` or `Annotated[X | Y, ...]`."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, UnionType):
        return [section for option in typing.get_args(annotation) for section in _sections(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _is_tag(name: str) -> bool:
    return name in {tag for section in _TAGGED for tag in _tags(section)}


def _tags(section: type[Section]) -> tuple[Any, ...]:
    return typing.get_args(section.model_fields["name"].annotation)


_TAGGED: tuple[type[Section], ...] = (
    *(FlowMatchingConfig, AnySizeConfig, DDPMConfig, SharedConfig, DistillConfig, ExitDistillConfig),
    *(DynamicWidthConfig, TokenRouterConfig),
    *(StepsConfig, FlowGuidedConfig, PhasedConfig, SegmentsConfig, ConsistencyConfig, InterpolantConfig, EDMConfig),
    *FLOW_MAP_SECTIONS,
)


def _reject_unknown(section: type[Section], tree: Any, prefix: str) -> None:
    """Pydantic refuses unknown keys too, but does not say which name was meant."""
    if not isinstance(tree, Mapping):
        return
    fields = {info.alias or name: info for name, info in section.model_fields.items()}
    for key, value in tree.items():
        if key not in fields:
            where = f" in {prefix.rstrip('.')}" if prefix else ""
            raise ConfigError(f"unknown config key {str(key)!r}{where}: {suggest(str(key), fields)}")
        options = _sections(fields[key].annotation)
        if len(options) > 1 and isinstance(value, Mapping):
            options = _tagged(options, value, f"{prefix}{key}")
        if options:
            _reject_unknown(options[0], value, f"{prefix}{key}.")


def _tagged(options: list[type[Section]], value: Mapping[str, Any], where: str) -> list[type[Section]]:
    names = {tag: option for option in options for tag in _tags(option)}
    name = value.get("name")
    if name not in names:
        raise ConfigError(f"config key {where}.name is {name!r}: {suggest(str(name), names)}")
    return [names[name]]
