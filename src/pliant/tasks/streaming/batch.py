"""The stream batch: all denoising levels of consecutive frames as one network call (StreamDiffusion, arXiv 2312.12491).

At every tick a new frame enters at the noisiest level, every frame on its way moves one level down, and the oldest
one leaves finished. One call per frame whatever the number of levels; the price is a latency of as many ticks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, ShapeError
from pliant.guidance import guide
from pliant.guidance.virtual_negative import moderated_rows, virtual_rows
from pliant.paths import conversion
from pliant.plans import Plan
from pliant.plans.engine import Lowered
from pliant.plans.noise import seeded_noise
from pliant.tasks.streaming.calls import RowCalls
from pliant.tasks.streaming.guidance import StreamGuidance
from pliant.tasks.streaming.levels import alpha_sigma, column, levels_of, levels_plan


@dataclass(frozen=True)
class StreamState:
    """The frames on their way. A value: the same state and frame always give the same tick."""

    levels: tuple[int, ...]
    """The level that each block of frames is to be run at next, ascending (newest frames first)."""
    x: Tensor
    """(len(levels)*frames, C, H, W), a block of frames per level."""
    reference: Tensor | None = None
    """What the virtual negative leads back to, of x's shape; None for guidance without one."""


class StreamBatch:
    """A model, a plan, a label and guidance, made ready once: noise, coefficients, modulations. Keeps no frames."""

    def __init__(
        self,
        model: Denoiser,
        plan: Plan | Sequence[float],
        label: int | None = None,
        guidance: StreamGuidance | None = None,
        seed: int = 0,
        frames: int = 1,
    ) -> None:
        """plan: of single-step updates, or levels (house times, decreasing), see `levels_plan`.

        label: the class; None: unconditional. seed: of the noise, drawn here and shared by all frames, which keeps
        consecutive frames coherent. frames: how many enter per tick. Raises PlanError or ConfigError.
        """
        if frames < 1:
            raise ConfigError(f"at least one frame enters per tick, got {frames}")
        self.model = model
        self.plan = plan if isinstance(plan, Plan) else levels_plan(model, plan)
        self.levels = levels_of(self.plan, model)
        self.guidance = guidance or StreamGuidance()
        self.label = _checked_label(model, label)
        self.null = model.null_label if self.guidance.negative in ("onetime", "full") else None
        self.seed, self.frames = seed, frames
        self.lowered = {c: Lowered(model, c) for c in {level.compute for level in self.levels}}
        shape, device = model.sample_shape, model.device
        self.start_noise = seeded_noise(seed, -1, shape, model.path).to(device)
        zero = torch.zeros(shape, device=device)
        self.noise = torch.stack(
            [zero if v.slot is None else v.noise * seeded_noise(seed, v.slot, shape).to(device) for v in self.levels]
        )
        self._virtual = self._virtual_rows()
        self._prepared: dict[tuple[int, ...], _Prepared] = {}
        self.prepared(tuple(range(len(self.levels))))

    def with_label(self, label: int | None) -> StreamBatch:
        """The same stream for another class, negatives included. States carry over; frames on their way change class
        in the middle."""
        return StreamBatch(self.model, self.plan, label, self.guidance, self.seed, self.frames)

    @property
    def empty(self) -> StreamState:
        """The state before the first frame."""
        x = torch.zeros(0, *self.model.sample_shape, device=self.model.device)
        return StreamState((), x, x if self.guidance.negative in ("self", "onetime") else None)

    @property
    def rows(self) -> int:
        """Network rows of a tick with all levels busy."""
        return self.guidance.rows(len(self.levels)) * self.frames

    def prepared(self, levels: tuple[int, ...]) -> _Prepared:
        """What is known before the call of a batch with blocks at these levels; computed once per combination."""
        if levels not in self._prepared:
            self._prepared[levels] = _Prepared(self, levels)
        return self._prepared[levels]

    @torch.no_grad()
    def tick(self, state: StreamState, latents: Tensor | None) -> tuple[StreamState, Tensor | None]:
        """One network call: `latents` (frames, C, H, W) enter (None: nothing does) and every block moves a level down.

        Returns (the next state, finished latents (frames, C, H, W) or None while there are none).
        """
        levels, x, reference = state.levels, state.x, state.reference
        if latents is not None:
            if tuple(latents.shape) != (self.frames, *self.model.sample_shape):
                raise ShapeError(
                    f"this stream takes {(self.frames, *self.model.sample_shape)} (frames, channels, height, width) "
                    f"at a time, got {tuple(latents.shape)}"
                )
            latents = latents.to(x)
            node = self.levels[0].node
            entering = node.alpha * latents + node.sigma * self.start_noise
            levels, x = (0, *levels), torch.cat([entering, x])
            if reference is not None:
                reference = torch.cat([latents, reference])
        if not levels:
            return state, None
        prepared = self.prepared(levels)
        value, reference = prepared.guided(x, reference)
        x = prepared.on_state * x + prepared.on_output * value + prepared.noise
        done = None
        if levels[-1] == len(self.levels) - 1:
            levels, x, done = levels[:-1], x[: -self.frames], x[-self.frames :]
            reference = None if reference is None else reference[: -self.frames]
        return StreamState(tuple(k + 1 for k in levels), x, reference), done

    def one_by_one(self, latents: Tensor) -> Tensor:
        """The same without pipelining, one call per level: (frames, C, H, W) -> finished latents."""
        state, done = self.tick(self.empty, latents)
        while done is None:
            state, done = self.tick(state, None)
        return done

    def _virtual_rows(self) -> tuple[Tensor, Tensor]:
        at = alpha_sigma(self.levels)
        if self.guidance.negative == "self":
            return virtual_rows(self.model.prediction, at, self.guidance.delta)
        if self.guidance.negative == "onetime":  # the first level has a real negative: see _Prepared.guided
            later = alpha_sigma(self.levels[1:])
            rows = virtual_rows(self.model.prediction, later, self.guidance.delta)
            zero = torch.zeros(1, dtype=torch.float64)
            return torch.cat([zero, rows[0]]), torch.cat([zero, rows[1]])
        return torch.zeros_like(at.alpha), torch.zeros_like(at.alpha)


class _Prepared:
    """Everything of one tick that does not depend on the frames, for blocks at given levels."""

    def __init__(self, batch: StreamBatch, levels: tuple[int, ...]) -> None:
        f, model, guidance = batch.frames, batch.model, batch.guidance
        held = [batch.levels[k] for k in levels]
        like = torch.zeros((), device=model.device)
        self.frames, self.scale, self.negative = f, guidance.scale, guidance.negative
        self.on_state = column([v.state for v in held], like, f)
        self.on_output = column([v.output for v in held], like, f)
        self.noise = batch.noise[list(levels)].repeat_interleave(f, 0)
        times = [v.node.t for v in held for _ in range(f)]
        computes = [v.compute for v in held for _ in range(f)]
        labels = [batch.label] * len(times)
        self.first = guidance.negative == "onetime" and levels[0] == 0
        if guidance.negative == "full" and batch.null is not None:
            times, computes, labels = times * 2, computes * 2, labels + [batch.null] * len(labels)
        elif self.first and batch.null is not None:
            times, computes, labels = times[:f] + times, computes[:f] + computes, [batch.null] * f + labels
            at = alpha_sigma(held[:1])
            self.null_state, self.null_output = (
                column(v, like, f) for v in moderated_rows(model.prediction, at, guidance.delta)
            )
            to_sample = conversion(model.prediction, "sample", at)
            self.sample_state, self.sample_output = (column(v, like, f) for v in to_sample)
        self.calls = RowCalls(model, batch.lowered, times, labels, computes)
        on_state, on_reference = (v[list(levels)] for v in batch._virtual)
        self.virtual_state, self.virtual_reference = column(on_state, like, f), column(on_reference, like, f)

    def guided(self, x: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(guided predictions, references from now on) of states x (rows, C, H, W)."""
        if self.negative == "full":
            value, null = self.calls(torch.cat([x, x])).chunk(2)
            return guide(value, null, self.scale), None
        if reference is None:
            return self.calls(x), None
        f = self.frames
        if not self.first:
            value = self.calls(x)
            negative = self.virtual_state * x + self.virtual_reference * reference
            return guide(value, negative, self.scale), reference
        answers = self.calls(torch.cat([x[:f], x]))
        null, value = answers[:f], answers[f:]
        clean = self.sample_state * x[:f] + self.sample_output * null
        reference = torch.cat([clean, reference[f:]])
        negative = self.virtual_state * x + self.virtual_reference * reference
        negative[:f] = self.null_state * x[:f] + self.null_output * null
        return guide(value, negative, self.scale), reference


def _checked_label(model: Denoiser, label: int | None) -> int:
    if label is None:
        return model.null_label
    top = model.num_classes if model.config.class_dropout > 0 else model.num_classes - 1
    if not 0 <= int(label) <= top:
        raise ConfigError(f"class {label} does not exist: this model has classes 0 to {model.num_classes - 1}")
    return int(label)
