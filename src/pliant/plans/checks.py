"""Whether a model can run what a step asks for: its calls, and guidance that means something for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pliant.adapters.width import DynamicDiT
from pliant.compute import Compute, Subset
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.models.block_precision import is_by_blocks, parse_block_precision
from pliant.models.precision import check_precision
from pliant.plans.calls import calls_of
from pliant.plans.regions import check_tokens

if TYPE_CHECKING:
    from pliant.plans.plan import Step


def check_step(step: Step, model: Denoiser) -> None:
    """Raise a PliantError unless the model can run this step's calls."""
    model.patch_of(step.compute)
    model.exit_of(step.compute)
    for call in calls_of(step):
        own = call.model(model)
        own.patch_of(call.compute)
        own.exit_of(call.compute)
        shape = own.shape(call.compute)  # a smaller grid may not exist
        check_precision(call.compute.precision, shape.depth)
        _check_network(call.compute, own)
    check_tokens(calls_of(step), model)
    if step.guidance is not None:
        check_guidance(step.guidance, step.compute, model)


def _check_network(compute: Compute, model: Denoiser) -> None:
    """Raise PlanError where this kind of network cannot do what a compute asks for."""
    if isinstance(model.network, DynamicDiT) and not (compute.plain and compute.scale is None):
        raise PlanError("sites, caches, token subsets and scales do not work on a network with routed width")
    formats = set(_formats(compute.precision))
    if compute.has_increments and (others := sorted(formats & {"int8d", "bf16-mixed", "bf16-compiled"})):
        raise PlanError(
            f"increments are corrected with parts of the weights, which precision {others[0]!r} lacks; use 'bf16'"
        )
    if (isinstance(compute.tokens, Subset) or "kv" in compute.write) and "bf16-compiled" in formats:
        raise PlanError("subsets of tokens need blocks that are not compiled; use precision 'bf16'")
    model.core.check_compute(compute)


def _formats(precision: str | None) -> list[str]:
    """The number formats of a precision's blocks."""
    if precision is None:
        return []
    return [span.format for span in parse_block_precision(precision)] if is_by_blocks(precision) else [precision]


def check_guidance(guidance: Guidance, compute: Compute, model: Denoiser) -> None:
    """Raise a PliantError unless this guidance means something for calls with `compute`."""
    channels = guidance.channels
    if channels is not None and channels > model.config.in_channels:
        raise PlanError(f"guidance asks for {channels} channels, the model has {model.config.in_channels}")
    if guidance.rule.space == "sample" and model.prediction == "score":
        raise PlanError("this guidance rule works on clean-data estimates; use another prediction than 'score'")
    if guidance.still and model.prediction != "velocity":
        raise PlanError(f"a still step predicts zero velocity; this model predicts {model.prediction!r}")
    if not guidance.called:
        return
    reference = guidance.compute or compute
    if guidance.against == "guide":
        return
    scaled = reference.scale is not None or compute.scale is not None
    if scaled and model.flops(reference) > model.flops(compute):
        raise PlanError("the guidance call costs more than the conditional one; guidance compares with a weaker call")
    patch, leave = model.patch_of(compute), model.exit_of(compute)
    coarser, earlier = model.patch_of(reference), model.exit_of(reference)
    if math.prod(coarser) < math.prod(patch):
        raise PlanError(
            f"the guidance call uses patch {coarser}, finer than the conditional call's {patch}; "
            f"guidance compares with an equal or weaker call"
        )
    if leave is not None and (earlier is None or earlier > leave):
        raise PlanError(
            f"the guidance call runs deeper than the conditional call, which leaves after {leave} blocks; "
            f"guidance compares with an equal or weaker call"
        )
    if guidance.against == "null":
        _ = model.null_label
    elif coarser == patch and replace(reference, merged=compute.merged, patch=None) == replace(compute, patch=None):
        raise PlanError("weak-model guidance with a call as strong as the conditional one guides nowhere")
