"""The levels of a stream: a plan compiled to one row of numbers per step, so that all steps can run as one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.compute.numbers import is_number, is_whole
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.paths import AlphaSigma
from pliant.plans import Plan
from pliant.plans.plan import Step, made_for
from pliant.solvers import Eval, Instruction, Lin, Node, Rows, SolverLike
from pliant.solvers.interpreter import sample_coefficients

RENOISE = "flow-stochastic"
"""The solver of published streams, for distilled models: estimate x0, then noise it anew to the next level."""
FOLLOW = "ddim"
"""The default: the same estimate, but the noise that is left stays. Networks that are not distilled keep closer to the
frame with it (docs/streaming.md has numbers)."""


@dataclass(frozen=True)
class Level:
    """One step: `next state = state*x + output*prediction + noise*z[slot]`, evaluated at `node`."""

    node: Node
    state: float
    output: float
    noise: float
    slot: int | None
    """Noise slot of the plan's program; None: no noise."""
    compute: Compute


def check_levels(levels: Sequence[float]) -> list[float]:
    """House times of the levels, noisiest first. Raises PlanError unless they decrease strictly within (0, 1]."""
    if not all(is_number(t) for t in levels):  # a text is a sequence, too, of letters
        raise PlanError(f"levels are numbers, noisiest first, e.g. [0.6, 0.3]; got {levels!r}")
    times = [float(t) for t in levels]
    if not times:
        raise PlanError("a stream needs at least one level, e.g. 0.6")
    for t in times:
        if not 0.0 < t <= 1.0:
            raise PlanError(f"levels lie above 0 (data) and at most at 1 (noise), got {t:g}")
    for a, b in pairwise(times):
        if b >= a:
            raise PlanError(f"levels must decrease, noisiest first, but {b:g} follows {a:g}")
    return times


def even_levels(strength: float, steps: int) -> list[float]:
    """`steps` equally spaced levels from `strength` (how much of a frame is replaced, (0, 1]) down, without 0."""
    if not is_whole(steps) or steps < 1:
        raise PlanError(f"a stream needs at least one step, got {steps!r}")
    if not is_number(strength) or not 0.0 < strength <= 1.0:
        raise PlanError(f"the strength lies above 0 (keep the frame) and at most at 1 (ignore it), got {strength!r}")
    return [strength * (steps - k) / steps for k in range(steps)]


def levels_plan(model: Denoiser, levels: Sequence[float], solver: SolverLike = FOLLOW) -> Plan:
    """The plan of a stream: a single-step solver through the levels (house times) to clean data."""
    times = check_levels(levels)
    return Plan.uniform(model, len(times), solver, times=[*times, 0.0])


def consistency_plan(
    model: Denoiser, levels: Sequence[float], sigma_data: float = 0.5, timestep_scale: float = 10.0
) -> Plan:
    """As `levels_plan` for latent consistency models (arXiv 2310.04378, section 4.1), whose estimate of x0 is
    `c_out*x0 + c_skip*x` with `c_skip = sigma_data^2/(k^2 + sigma_data^2)`, `c_out = k/sqrt(k^2 + sigma_data^2)` and k
    the network's own time times `timestep_scale`. The numbers are for this model's prediction kind.
    """
    times = check_levels(levels)
    steps = []
    nodes = levels_of(levels_plan(model, times), model)
    for here, there in zip(nodes, [*nodes[1:], None], strict=True):
        k = timestep_scale * float(model.encode(torch.tensor(here.node.t, dtype=torch.float64)))
        c_skip = sigma_data**2 / (k**2 + sigma_data**2)
        c_out = k / math.sqrt(k**2 + sigma_data**2)
        p, q = sample_coefficients(model.prediction, here.node)
        alpha, sigma = (1.0, 0.0) if there is None else (there.node.alpha, there.node.sigma)
        stage = ((alpha * (c_out * p + c_skip),), (alpha * c_out * q,), (sigma,) if sigma else ())
        steps.append(Step(here.node.t, Rows((stage,))))
    return Plan(tuple(steps), model.path, 0.0, made_for(model), provenance={"preset": "consistency"})


def levels_of(plan: Plan, model: Denoiser) -> tuple[Level, ...]:
    """One `Level` per step of the plan.

    Raises PlanError for steps that cannot be pipelined: several calls, earlier outputs, learned variances, guidance.
    """
    plan.check(model)
    times = [s.t for s in plan.steps]
    check_levels(times)
    for i, step in enumerate(plan.steps):
        if step.guidance is not None:
            raise PlanError(f"step {i} carries guidance; a stream has its own: take it out of the plan")
        if not step.compute.plain or step.compute.scale is not None or step.compute.refine:
            raise PlanError(
                f"step {i} does not run the whole network on the state ({step.compute.describe()}); the steps of a "
                f"stream belong to different frames, so each is a whole call: choose patch, exit and precision only"
            )
    program = plan.program(model)
    found: list[Level] = []
    state = 0
    for i, (ops, label) in enumerate(zip(program.steps, program.labels, strict=True)):
        pair = _pipelined(ops, state)
        if pair is None:
            raise PlanError(
                f"step {i} ({label}) needs more than its own state and one prediction, so it cannot be pipelined; "
                f"a stream takes single-step solvers: flow-stochastic, ddim, euler, ddpm"
            )
        call, update = pair
        slot, noise = update.z[0] if update.z else (None, 0.0)
        on = [sum(c for _, c in terms) for terms in (update.x, update.m)]
        found.append(Level(call.node, on[0], on[1], noise, slot, plan.steps[i].compute))
        state = update.out
    return tuple(found)


def _pipelined(ops: Sequence[Instruction], state: int) -> tuple[Eval, Lin] | None:
    """The call and the update of a step that needs the state and its prediction only; None for all others."""
    if len(ops) != 2:
        return None
    call, update = ops
    if not isinstance(call, Eval) or not isinstance(update, Lin) or call.state != state:
        return None
    own = all(register in (("x", state), ("m", call.out)) or register[0] == "z" for register in update.reads())
    plain = len(update.z) <= 1 and update.learned is None and update.mu == 0.0
    return (call, update) if own and plain else None


def alpha_sigma(levels: Sequence[Level]) -> AlphaSigma:
    """The path at the levels, float64 (n,)."""
    return AlphaSigma(
        *(
            torch.tensor([getattr(level.node, name) for level in levels], dtype=torch.float64)
            for name in ("alpha", "sigma", "dalpha", "dsigma")
        )
    )


def column(values: Sequence[float] | Tensor, like: Tensor, repeat: int = 1) -> Tensor:
    """One number per level -> (levels*repeat, 1, 1, 1) in `like`'s dtype and device."""
    v = torch.as_tensor(values, dtype=torch.float64).repeat_interleave(repeat)
    return v.to(like.device, like.dtype).reshape(-1, 1, 1, 1)
