"""Configuration of couplings, metrics and plans, and how each becomes the thing it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pliant.errors import ConfigError
from pliant.paths import TimeDensity, get_time_density, prediction_type
from pliant.training import couplings, losses
from pliant.training.models import Runner
from pliant.training.objectives import FlowMatching, Objective
from pliant.training.section import ObjectiveSection, Section

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.plans import Plan


class PlanConfig(Section):
    """A plan of few steps: of a teacher that makes pairs, or of the model that a recipe leaves."""

    file: str | None = None
    """A plan file, instead of all below."""
    steps: int = Field(default=1, ge=1)
    solver: str = "euler"
    guidance: float = Field(default=1.0, ge=0)
    weak_steps: int = Field(default=0, ge=0)
    """First steps at the coarsest patch size."""
    patch: int | None = Field(default=None, ge=1)
    """Patch size of all other steps; null: the model's own."""
    precision: str | None = None
    """Of all calls: fp32, bf16, ...; null: what suits the processor."""
    turbo: list[int] | None = Field(default=None, min_length=3, max_length=3)
    """FlowTurbo's plan instead of `steps` and `solver`: steps by Heun, by its pseudo corrector, and by the refiner."""
    times: list[float] | str | dict[str, Any] | None = None
    """steps + 1 house times, or a grid by name; null: the path's own grid."""

    def build(self, model: Denoiser) -> Plan:
        """The plan for a model. Raises PlanError if the model cannot run it."""
        from dataclasses import replace

        from pliant.compute import Compute
        from pliant.plans import Plan, turbo, uniform, weakest

        if self.file is not None:
            plan = Plan.load(self.file)
            plan.check(model)
            return plan
        if self.turbo is not None:
            heun, pseudo, refined = self.turbo
            return turbo(model, heun, pseudo, refined, guidance=self.guidance, times=self.times)
        patch = None if self.patch is None else (self.patch, self.patch)
        compute = Compute(patch=patch, precision=self.precision)
        plan = uniform(model, self.steps, self.solver, compute, self.guidance, self.times)
        if self.weak_steps:
            weak = replace(weakest(model), precision=self.precision)
            rows = [replace(s, compute=weak) if i < self.weak_steps else s for i, s in enumerate(plan.steps)]
            plan = plan.with_steps(rows)
            plan.check(model)
        return plan


class CouplingConfig(Section):
    """Which noise belongs to which sample."""

    name: Literal["independent", "stored", "annealed", "optimal-transport", "online"] = "independent"
    steps: int = Field(default=300_000, ge=1)
    """annealed: optimizer steps from all fresh noise to the pairs' own."""
    schedule: Literal["linear", "cosine", "exponential"] = "linear"
    """annealed: course of the share of fresh noise."""
    solver: Literal["scipy", "pot"] = "scipy"
    """optimal-transport: what solves the assignment."""
    within_classes: bool = True
    """optimal-transport: pair only samples of one class."""
    teacher: str | None = None
    """online: model whose flow makes the pairs."""
    plan: PlanConfig = PlanConfig(steps=20)
    """online: the teacher's."""

    def build(self) -> couplings.Coupling:
        """Raises ConfigError, or FormatError for a teacher that cannot be read."""
        if self.name == "stored":
            return couplings.Stored()
        if self.name == "annealed":
            return couplings.Annealed(self.steps, self.schedule)
        if self.name == "optimal-transport":
            return couplings.OptimalTransport(self.solver, self.within_classes)
        if self.name == "online":
            teacher = load_teacher(self.teacher, "coupling.teacher")
            return couplings.Online(Runner(teacher, self.plan.build(teacher)))
        return couplings.Independent()


class MetricConfig(Section):
    """How an error is measured. "huber" and the perceptual ones are for pairs of a deterministic teacher only."""

    name: Literal["l2", "l1", "huber", "element-huber", "perceptual", "perceptual-huber", "l2+perceptual"] = "l2"
    c: float | None = Field(default=None, gt=0)
    """huber, perceptual-huber: the paper's 0.00054 per element; element-huber: 0.001."""
    weight: Literal["1", "1/t"] = "1/t"
    """perceptual-huber: of the perceptual term (rfpp's configurations E and F)."""
    perceptual: str = "lpips"
    """"lpips" (package lpips) or "classifier:digits-classifier", features of one of our classifiers."""

    def build(self) -> losses.Metric:
        """Raises ConfigError."""
        if self.name == "l1":
            return losses.AbsoluteError()
        if self.name == "huber":
            return losses.PseudoHuber(self.c or 0.00054)
        if self.name == "element-huber":
            return losses.ElementHuber(self.c or 0.001)
        if self.name == "l2":
            return losses.SquaredError()
        from pliant.training.perceptual import get_perceptual

        distance = get_perceptual(self.perceptual)
        if self.name == "perceptual-huber":
            return losses.PerceptualHuber(distance, self.c or 0.00054, self.weight)
        perceptual = losses.Perceptual(distance)
        return perceptual if self.name == "perceptual" else losses.Sum((losses.SquaredError(), perceptual))


class FlowMatchingConfig(ObjectiveSection):
    """Velocity regression on any path with a Gaussian source."""

    name: Literal["flow_matching"] = "flow_matching"
    time: str | dict[str, Any] = "uniform"
    """Density of training times: uniform, logit-normal, mode, cosmap, u-shaped, discrete; or {name: ..., options}."""
    class_dropout: float | None = Field(default=None, ge=0, le=1)
    """Probability of training without label; default: the network's own (0.1)."""
    coupling: CouplingConfig = CouplingConfig()
    metric: MetricConfig = MetricConfig()
    space: Literal["velocity", "epsilon", "sample", "v_prediction", "score"] = "velocity"
    """What is regressed; the network's output is converted to it."""

    def build(self, denoiser: Denoiser) -> Objective:
        time, dropout = density(self.time), class_dropout(self.class_dropout, denoiser)
        return FlowMatching(time, dropout, self.coupling.build(), self.metric.build(), prediction_type(self.space))


def density(given: str | dict[str, Any]) -> TimeDensity:
    """A time density by name, or {name: ..., options}. Raises ConfigError."""
    if isinstance(given, str):
        return get_time_density(given)
    options = dict(given)
    return get_time_density(str(options.pop("name", None)), **options)


def class_dropout(given: float | None, denoiser: Denoiser) -> float:
    """How often training drops labels; None: as often as the network says. Raises ConfigError if it has no null."""
    own = denoiser.config.class_dropout
    if given is not None and given > 0 and own == 0:
        raise ConfigError("class_dropout needs a null label: give the network `class_dropout` above 0 (DiT: 0.1)")
    return own if given is None else given


def load_teacher(source: str | None, key: str) -> Denoiser:
    """A frozen denoiser in eval mode. Raises ConfigError if none is named."""
    from pliant.formats import load

    if source is None:
        raise ConfigError(f"config key {key} names the teacher: a folder, file, bundled name or Hub id")
    teacher: Denoiser = load(source)
    teacher.network.float().eval().requires_grad_(False)
    return teacher
