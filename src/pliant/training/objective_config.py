"""Configuration of all objectives, and how those of plain training and of flexible models become what they name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pliant.denoiser import Denoiser
from pliant.models.autoencoders import load_autoencoder
from pliant.training.distill_config import (
    ConsistencyConfig,
    EDMConfig,
    FlowGuidedConfig,
    InterpolantConfig,
    PhasedConfig,
    SegmentsConfig,
    StepsConfig,
)
from pliant.training.flow_config import FlowMatchingConfig, class_dropout, density
from pliant.training.flow_map_config import (
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
from pliant.training.section import ObjectiveSection, Section


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


class AnySizeConfig(ObjectiveSection):
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

    def build(self, denoiser: Denoiser) -> Objective:
        patches = None if self.patches is None else tuple(self.patches)
        dropout = class_dropout(self.class_dropout, denoiser)
        flow = AnySizeFlow(density(self.time), dropout, self.shift_pixels, patches)
        return flow if self.align is None else _aligned(flow, self.align, denoiser)


def _aligned(flow: AnySizeFlow, config: AlignConfig, denoiser: Denoiser) -> Objective:
    """The objective with REPA's term. The network gets the projector, which trains with it and is not exported."""
    from pliant.training.representation import RepresentationAlignment, TokenEncoder, attach_projector

    encoder = TokenEncoder.load(config.encoder)
    autoencoder = None if config.autoencoder is None else load_autoencoder(config.autoencoder)
    attach_projector(denoiser, encoder.dim, config.hidden)
    return RepresentationAlignment(flow, encoder, config.layer, config.weight, autoencoder)


class DDPMConfig(ObjectiveSection):
    """DiT's loss: noise MSE, plus the variational bound for learned variances. Path vp-discrete."""

    name: Literal["ddpm"]
    class_dropout: float | None = Field(default=None, ge=0, le=1)

    def build(self, denoiser: Denoiser) -> Objective:
        return DDPM(class_dropout(self.class_dropout, denoiser))


class MMDConfig(Section):
    """Bootstrap of recipe S (sheet A, 7.3)."""

    weight: float = Field(default=0.1, ge=0)
    weak_steps: int = Field(default=2, ge=1)
    powerful_steps: int = Field(default=2, ge=1)
    grid: int = Field(default=250, ge=3)
    clean_bias: float = Field(default=2.0, gt=0)


class SharedConfig(ObjectiveSection):
    """Recipe S: the model's own loss at a random patch size per batch."""

    name: Literal["shared"]
    own: Annotated[
        FlowMatchingConfig | DDPMConfig | StepsConfig | FlowGuidedConfig | PhasedConfig | SegmentsConfig
        | ConsistencyConfig | MeanFlowConfig | ImprovedMeanFlowConfig | AlphaFlowConfig | SplitMeanFlowConfig
        | ShortcutConfig | TrajectoryConfig | SegmentedConfig | TrigConsistencyConfig,
        Field(discriminator="name"),
    ] = FlowMatchingConfig()
    mmd: MMDConfig | None = None

    def build(self, denoiser: Denoiser) -> Objective:
        mmd = None if self.mmd is None else MMDBootstrap(**self.mmd.model_dump())
        return SharedPatches(self.own.build(denoiser), mmd)


class DistillConfig(ObjectiveSection):
    """Recipe L: new patch sizes imitate the original one."""

    name: Literal["distill"]
    time: str | dict[str, Any] | None = None
    """Default: uniform (over the table's entries on vp-discrete)."""
    class_dropout: float | None = Field(default=None, ge=0, le=1)
    variance_weight: float = Field(default=0.1, ge=0)

    def build(self, denoiser: Denoiser) -> Objective:
        time = density(self.time) if self.time else None
        return PatchDistillation(time, class_dropout(self.class_dropout, denoiser), self.variance_weight)


class ExitDistillConfig(ObjectiveSection):
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

    def build(self, denoiser: Denoiser) -> Objective:
        time = density(self.time) if self.time else None
        times = _plan_times(self.plan, denoiser) if self.plan else ()
        dropout = class_dropout(self.class_dropout, denoiser)
        return ExitDistillation(time, times, self.weight, dropout, self.variance_weight)


def _plan_times(file: str, denoiser: Denoiser) -> tuple[float, ...]:
    """House times at which a plan calls the network."""
    from pliant.plans import Plan

    plan = Plan.load(file)
    plan.check(denoiser)
    return tuple(evaluation.node.t for evaluation in plan.program(denoiser).evaluations)


class DynamicWidthConfig(ObjectiveSection):
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

    def build(self, denoiser: Denoiser) -> Objective:
        own = self.own.build(denoiser)
        assert isinstance(own, (FlowMatching, DDPM))
        target = FlopsTarget(self.target, self.hold, self.warmup)
        return DynamicWidth(own, target, self.weight, self.complete_steps)


class TokenRouterConfig(ObjectiveSection):
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

    def build(self, denoiser: Denoiser) -> Objective:
        time, dropout = density(self.time) if self.time else None, class_dropout(self.class_dropout, denoiser)
        return TokenDistillation(self.keep, self.budget, self.norm, self.entropy, time, dropout)


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
