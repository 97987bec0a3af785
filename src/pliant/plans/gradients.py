"""Gradients of what a plan samples: with respect to the start noise, the conditioning and the weights (sheet D, 11)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pliant.compute import Compute
from pliant.denoiser import Denoiser, Prediction
from pliant.errors import PlanError, suggest
from pliant.guidance import Linear, guide
from pliant.plans.calls import reuses
from pliant.plans.noise import batch_noise, check_seeds, start_state
from pliant.plans.plan import Plan
from pliant.plans.sampling import check_labels, check_offset
from pliant.solvers import Eval, Evaluate, Output
from pliant.solvers.adjoint import differentiable_run

WRT = ("x", "cond", "parameters")


@dataclass(frozen=True)
class Gradients:
    """One sampling run and the gradients of a scalar of it. What was not asked for is None or empty."""

    sample: Tensor
    """(B, C, H, W), detached."""
    loss: Tensor
    """The scalar, detached."""
    x: Tensor | None = None
    """With respect to the start state, (B, C, H, W)."""
    cond: Tensor | None = None
    """With respect to each sample's label embedding, (B, D)."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name; those that do not act are absent."""


def sample_with_gradients(
    model: Denoiser,
    plan: Plan,
    cond: Sequence[int] | Tensor,
    loss: Callable[[Tensor], Tensor],
    seeds: Sequence[int] | None = None,
    x: Tensor | None = None,
    wrt: Sequence[str] = ("x",),
    mu: Tensor | None = None,
) -> Gradients:
    """Sample, and differentiate `loss(sample) -> scalar`: the exact discrete adjoint, with the memory of one call.

    wrt: any of "x" (the start state), "cond" (the label embedding that the network adds to its time embedding, one per
    sample) and "parameters" (those of the network that require grad). cond, seeds, x, mu: as in `sample`. Costs about
    three times the forward FLOPs of the plan: one more forward pass and one backward pass per call.
    """
    for name in wrt:
        if name not in WRT:
            raise PlanError(f"unknown gradient {name!r}: {suggest(name, WRT)}")
    labels = check_labels(cond, model)
    if x is None:
        seeds = check_seeds(list(range(len(labels))) if seeds is None else seeds, len(labels))
        program = plan.program(model)
        offset = check_offset(program, mu, (len(labels), *model.sample_shape), model.device)
        x = start_state(program.start, seeds, model.sample_shape, model.device, model.path, offset)
    start = x.detach().clone().requires_grad_("x" in wrt)
    embedding = label_embedding(model, labels).detach().requires_grad_() if "cond" in wrt else None
    named = [(n, p) for n, p in model.network.named_parameters() if p.requires_grad] if "parameters" in wrt else []
    out = differentiable_sample(
        model, plan, labels, start, seeds, embedding, [p for _, p in named], partial="parameters" not in wrt, mu=mu
    )
    value = loss(out)
    if value.numel() != 1:
        raise PlanError(f"loss must return one number, got shape {tuple(value.shape)}")
    targets = [("x", start)] * ("x" in wrt) + ([("cond", embedding)] if embedding is not None else []) + named
    if not targets:
        raise PlanError("wrt is empty: name what to differentiate for, e.g. wrt=('x',)")
    gradients = torch.autograd.grad(value, [t for _, t in targets], allow_unused=True)
    found = {name: g for (name, _), g in zip(targets, gradients, strict=True) if g is not None}
    return Gradients(out.detach(), value.detach(), found.pop("x", None), found.pop("cond", None), found)


def differentiable_sample(
    model: Denoiser,
    plan: Plan,
    cond: Sequence[int] | Tensor,
    x: Tensor,
    seeds: Sequence[int] | None = None,
    embedding: Tensor | None = None,
    inputs: Sequence[Tensor] = (),
    partial: bool = False,
    mu: Tensor | None = None,
) -> Tensor:
    """The sample (B, C, H, W) as a function of x, `embedding` and `inputs` that autograd can differentiate.

    embedding: (B, D) label embeddings in place of the table's, for conditional calls. inputs: the weights that should
    get gradients; a weight that requires grad and is not listed raises PlanError unless `partial`. seeds: of the noise
    of stochastic solvers. mu: as in `sample`; it may require grad.
    """
    plan.check(model)
    _check_plain(plan)
    labels = check_labels(cond, model)
    program = plan.program(model)
    mu = check_offset(program, mu, (len(labels), *model.sample_shape), model.device)
    noise = None
    if seeds is not None:
        drawn = check_seeds(seeds, len(labels))
        noise = lambda slot: batch_noise(drawn, slot, model.sample_shape, model.device)  # noqa: E731
    listed = [*([] if embedding is None else [embedding]), *inputs]
    evaluate = _evaluator(model, plan, labels, embedding)
    return differentiable_run(program, x, evaluate, listed, noise, mu, partial=partial)


def _label_table(model: Denoiser) -> nn.Embedding:
    for name, module in model.network.named_modules():
        if name.rpartition(".")[2] == "label_embed" and isinstance(module, nn.Embedding):
            return module
    raise PlanError("this network has no label embedding to differentiate for")


def label_embedding(model: Denoiser, labels: Tensor) -> Tensor:
    """(B,) labels -> the network's embeddings of them, (B, D)."""
    out: Tensor = _label_table(model)(labels)
    return out


def _check_plain(plan: Plan) -> None:
    """Raise PlanError, naming the step, for what the adjoint does not differentiate: memory between evaluations."""
    for i, step in enumerate(plan.steps):
        guidance = step.guidance
        if reuses(plan.with_steps([step])):
            raise PlanError(f"step {i} keeps or reuses parts of the network; gradients need steps that run all of it")
        if guidance is not None and not (
            guidance.against in ("null", "weak") and guidance.rule == Linear() and not guidance.rescale
        ):
            raise PlanError(f"step {i} is guided by {guidance.describe()!r}; gradients know plain guidance only")


def _evaluator(model: Denoiser, plan: Plan, labels: Tensor, embedding: Tensor | None) -> Evaluate:
    """A plain, differentiable form of what the sampling engine does: weights as stored, one call after another."""
    null = torch.full_like(labels, model.num_classes)

    def call(x: Tensor, t: float, which: Tensor, compute: Compute) -> Prediction:
        if embedding is None or which is null:
            return model(x, t, which, compute)
        with _replaced(_label_table(model), embedding):
            return model(x, t, which, compute)

    def evaluate(x: Tensor, evaluation: Eval) -> Output:
        step, t = plan.steps[evaluation.step], evaluation.node.t
        main = call(x, t, labels, step.compute)
        if step.guidance is None:
            return Output(main.value, main.variance)
        g = step.guidance
        reference = call(x, t, null if g.against == "null" else labels, g.compute or step.compute)
        return Output(guide(main.value, reference.value, g.scale, g.channels), main.variance)

    return evaluate


@contextlib.contextmanager
def _replaced(table: nn.Embedding, embedding: Tensor) -> Iterator[None]:
    """The table answers with `embedding` meanwhile."""
    handle = table.register_forward_hook(lambda *_: embedding)
    try:
        yield
    finally:
        handle.remove()
