"""Learning-to-Cache (arXiv 2406.01733): which sites a cached step may reuse, found by gradient; a static plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pliant.compute import Reuse
from pliant.compute.numbers import is_number
from pliant.compute.sites import format_sites, parse_sites
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PlanError
from pliant.plans.caching.intervals import BRANCHES
from pliant.plans.caching.measure import Calibration, Seen, watch
from pliant.plans.caching.options import number, whole
from pliant.plans.caching.rows import Row, Target
from pliant.plans.plan import Plan


def learning_to_cache(target: Target, *, routers: Mapping[str, str] | None = None) -> list[Row]:
    """Even steps are full, odd ones run the sites that their router says and reuse the branches of the others.

    routers: sites of every odd step, e.g. {"1": "R2C10", "3": "C12"}; `calibrate` learns them.
    """
    if routers is None:
        raise ConfigError("l2c needs learned routers: learn them with calibrate=8 (samples), or pass routers=")
    given: object = routers  # command lines may hold anything
    if not isinstance(given, Mapping):
        raise ConfigError(f"routers are {routers!r}; expected sites of every odd step; calibrate=8 learns them")
    wanted = [str(i) for i in range(1, target.steps, 2)]
    if sorted(routers) != sorted(wanted):
        raise PlanError(
            f"the routers are for the steps {', '.join(sorted(routers, key=_as_number))}; this plan of {target.steps} "
            f"steps needs {', '.join(wanted)}: learn them for it"
        )
    rows = []
    for i in range(target.steps):
        letters = "R" * target.sites if i % 2 == 0 else parse_sites(routers[str(i)])
        if len(letters) != target.sites:
            raise PlanError(f"the router of step {i} is for {len(letters)} sites, this model has {target.sites}")
        if i % 2 == 0:
            rows.append(BRANCHES)
        else:
            rows.append(Row(sites=format_sites(letters), reuse=Reuse("branch")) if "C" in letters else Row())
    return rows


def calibrate_learning_to_cache(
    plan: Plan,
    model: Denoiser,
    cond: Sequence[int],
    seeds: Sequence[int],
    penalty: float = 1e-3,
    threshold: float = 0.1,
    iterations: int = 200,
    lr: float = 0.05,
) -> Calibration:
    """routers: learned on the states of the plan without caching (one step of teacher forcing), weights frozen.

    Every site of an odd step gets a score w = sigmoid(.) and puts out `w f_now + (1 - w) f_kept` (before its gate);
    Adam lowers `|routed output - full output|^2 / |full output|^2 + penalty * sum of scores`. A site runs iff its
    score ends above `threshold`. Relative to the output, so that a penalty means the same on every model. All sites run
    where the step before is on another token grid, or one of the two calls no network.
    """
    number("penalty", penalty), number("threshold", threshold, 0, 1), whole("iterations", iterations)
    if not is_number(lr) or lr <= 0:
        raise ConfigError(f"lr is {lr!r}; expected a number > 0")
    seen = {step.step: step for step in watch(plan, model, cond, seeds)}
    routers: dict[str, str] = {}
    errors: dict[str, float] = {}
    for i in range(1, len(plan.steps), 2):
        full, cheap = seen.get(i - 1), seen.get(i)
        if full is None or cheap is None or full.grid != cheap.grid:
            routers[str(i)] = f"R{2 * model.shape(plan.steps[i].compute).depth}"
            continue
        scores, error = _learn(full, cheap, penalty, iterations, lr)
        routers[str(cheap.step)] = format_sites("".join("R" if w > threshold else "C" for w in scores))
        errors[str(cheap.step)] = error
    return Calibration({"routers": routers}, {"relative_error": errors, "penalty": penalty})


def _learn(full: Seen, cheap: Seen, penalty: float, iterations: int, lr: float) -> tuple[list[float], float]:
    """Scores of one odd step's sites, and the relative error of the interpolation they end with."""
    with torch.no_grad():
        kept = _branches(full)
        target = cheap.sites.head(cheap.end(), cheap.context)
        size = (target**2).mean().clamp_min(1e-30)
    logits = torch.zeros(len(kept), device=target.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    error = torch.zeros(())
    with torch.enable_grad():
        for _ in range(iterations):
            scores = logits.sigmoid()
            error = ((_routed(cheap, kept, scores) - target) ** 2).mean() / size
            logits.grad = torch.autograd.grad(error + penalty * scores.sum(), logits)[0]  # and nothing of the weights
            optimizer.step()
    return logits.detach().sigmoid().tolist(), float(error.detach())


def _branches(seen: Seen) -> list[Tensor]:
    """What every site puts out before its gate."""
    state, found = seen.start, []
    for s in range(len(seen.sites.sites)):
        branch = seen.sites.inner(s, seen.sites.norm(s, state, seen.context), seen.context)
        state = seen.sites.add(s, state, branch, seen.context)
        assert branch[0] is not None
        found.append(branch[0])
    return found


def _routed(seen: Seen, kept: Sequence[Tensor], scores: Tensor) -> Tensor:
    """The output with every site between run and reuse."""
    state = seen.start
    for s, old in enumerate(kept):
        now = seen.sites.inner(s, seen.sites.norm(s, state, seen.context), seen.context)[0]
        assert now is not None
        state = seen.sites.add(s, state, (torch.lerp(old.to(now.dtype), now, scores[s].to(now.dtype)),), seen.context)
    return seen.sites.head(state, seen.context)


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), text) if text.isdigit() else (-1, text)
