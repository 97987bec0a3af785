"""diffusers' schedulers inside Pliant: run one on basis vectors, read off its coefficients, replay them as a plan.

Every linear sampler is a matrix (sheet D, 14.5): feeding it unit vectors instead of images and network outputs gives
each state's row over (start, outputs, noises). A row is then written through the few newest states and outputs that
explain it, which makes a plan of `rows` steps: a file, with a cost, for the one loop that Pliant has.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, PlanError
from pliant.guidance import Guidance
from pliant.integrations.diffusers_grids import PREDICTIONS, path_of_config
from pliant.paths import NetworkTime, Path, PredictionType
from pliant.plans import Plan, Step
from pliant.plans.plan import made_for
from pliant.plans.presets import as_guidance
from pliant.solvers import Program, compile_program
from pliant.solvers.normal_form import walk
from pliant.solvers.rows import MEMORY, Rows, Stage

_TOLERANCE = 1e-10


class SchedulerForm(NamedTuple):
    """A scheduler's coefficients for the grid it is set to.

    rows: (calls + 1, 1 + calls + noises) float64; what every call sees, then the sample. Columns: a standard normal
    start, outputs, noises. timesteps: (calls,) as the network gets them. noises: how many columns are noise.
    """

    rows: Tensor
    timesteps: Tensor
    noises: int


class Imported(NamedTuple):
    """A scheduler in Pliant's terms: times (steps + 1), one solver per step, path and prediction of its network."""

    times: list[float]
    solvers: list[Rows]
    path: Path
    prediction: PredictionType


def scheduler_form(scheduler: Any, **step_options: Any) -> SchedulerForm:
    """The coefficients of a diffusers scheduler after `set_timesteps`, in float64 (its own tables stay float32).

    step_options: passed to `step` (for instance eta=1.0). The scheduler itself is left alone. Raises PlanError for one
    that has no grid yet or is not linear in states and outputs (clipping, thresholding).
    """
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise PlanError("call set_timesteps on the scheduler first")
    count = len(scheduler.timesteps)
    basis = torch.eye(1 + 3 * count, dtype=torch.float64)  # room for two noises per call
    start = torch.ones(1 + count, 1, dtype=torch.float64)
    start[0] = float(getattr(scheduler, "init_noise_sigma", 1.0))
    rows, noises = walk(scheduler, start * basis[: 1 + count], basis[1 + count :], **step_options)
    form = rows[:, : 1 + count + noises]
    # A linear sampler agrees with its matrix on any numbers; large ones reach every clipping.
    generator = torch.Generator().manual_seed(0)
    values = 10.0 * torch.randn(1 + 3 * count, 7, generator=generator, dtype=torch.float64)
    seen, _ = walk(scheduler, start * values[: 1 + count], values[1 + count :], **step_options)
    if not torch.allclose(seen, form @ values[: form.shape[1]], rtol=1e-6, atol=1e-6 * float(seen.abs().max())):
        raise PlanError(f"{type(scheduler).__name__} is not linear here; switch off clip_sample and thresholding")
    # Noise that is drawn but multiplied by 0 (a last step to clean data) is no noise.
    used = torch.cat([torch.ones(1 + count, dtype=torch.bool), form[:, 1 + count :].abs().amax(0) > 0.0])
    form = form[:, used]
    return SchedulerForm(form, torch.as_tensor(scheduler.timesteps).detach().cpu(), form.shape[1] - 1 - count)


def imported(scheduler: Any, **step_options: Any) -> Imported:
    """A diffusers scheduler with a grid as times and `rows` solvers.

    Raises PlanError if it is not linear, remembers too much or goes back in time; ConfigError for EDM schedulers.
    """
    config = dict(scheduler.config)
    if "sigma_data" in config:
        raise ConfigError("EDM schedulers precondition the network themselves and cannot be imported")
    plain_flow = "shift" in config and "beta_schedule" not in config  # FlowMatch*: they do not name a prediction
    config.setdefault("prediction_type", "flow_prediction" if plain_flow else "epsilon")
    if config["prediction_type"] != "flow_prediction" and "beta_schedule" not in config:
        raise ConfigError(f"{type(scheduler).__name__} has a noise schedule of its own and cannot be imported")
    config = {"trained_betas": None, "rescale_betas_zero_snr": False, **config}
    flow = config["prediction_type"] == "flow_prediction"
    path = path_of_config(config)
    form = scheduler_form(scheduler, **step_options)
    network_time = NetworkTime(float(config["num_train_timesteps"]), offset=0.0 if flow else -1.0)
    times = network_time.decode(form.timesteps.double()).tolist()
    calls = len(times)
    # A step begins wherever time moves on; calls at the same time (Heun's second one) belong to one step.
    begins = [k for k in range(calls) if k == 0 or times[k] != times[k - 1]]
    grid = [*(times[k] for k in begins), 0.0]
    if any(b >= a for a, b in pairwise(grid)):
        raise PlanError(f"{type(scheduler).__name__} goes back in time between calls, so it cannot become a plan")
    start = float(form.rows[0, 0])
    solvers = [
        Rows(tuple(_stage_of(form.rows, k, calls) for k in range(first, after)), start if first == 0 else 1.0)
        for first, after in pairwise([*begins, calls])
    ]
    return Imported(grid, solvers, path, PREDICTIONS[config["prediction_type"]])


def _stage_of(rows: Tensor, k: int, calls: int) -> Stage:
    """What follows call k, through the newest evaluated states and outputs: as few as explain it."""
    target, scale = rows[k + 1], float(rows[k + 1].abs().max())
    most = min(k + 1, MEMORY)
    older = rows[: k + 1, 1 + calls :].abs().amax(0) > 0.0  # noises that earlier states hold
    for states, outputs in sorted(((a, b) for a in range(1, most + 1) for b in range(1, most + 1)), key=sum):
        basis = rows[k - states + 1 : k + 1].flip(0)
        # What only states can explain: the start, all older outputs and noises.
        fixed = torch.ones(rows.shape[1], dtype=torch.bool)
        fixed[k + 2 - outputs : k + 2] = False
        fixed[1 + calls :] = older
        found = torch.linalg.lstsq(basis[:, fixed].T, target[fixed][:, None], driver="gelsd").solution[:, 0]
        rest = target - found @ basis
        if float(rest[fixed].abs().max()) > _TOLERANCE * scale:
            continue
        noises = [float(v) for v in rest[1 + calls :][~older] if abs(float(v)) > _TOLERANCE * scale]
        return tuple(found.tolist()), tuple(rest[k + 2 - outputs : k + 2].flip(0).tolist()), tuple(noises)
    raise PlanError(f"call {k} of this scheduler remembers more than {MEMORY} calls, so it cannot become a plan")


def program_from_scheduler(scheduler: Any, **step_options: Any) -> Program:
    """A diffusers scheduler, set to a grid, as a program for outputs of its own prediction type.

    Deterministic schedulers become static coefficients; the noise of stochastic ones becomes the program's noise slots.
    """
    made = imported(scheduler, **step_options)
    return compile_program(made.path, made.times, made.solvers, made.prediction)


def plan_from_scheduler(
    model: Denoiser, scheduler: Any, guidance: float | Guidance | None = None, **step_options: Any
) -> Plan:
    """A plan that samples `model` as a diffusers scheduler (set to a grid) would.

    Raises PlanError if the scheduler is for another noise schedule or prediction type than the model.
    """
    made = imported(scheduler, **step_options)
    if made.path != model.path:
        raise PlanError(
            f"the scheduler follows {made.path.name}, the model {model.path.name}, or another schedule of that family; "
            f"give the scheduler the model's betas"
        )
    if made.prediction != model.prediction:
        raise PlanError(f"the scheduler expects {made.prediction}, but the model predicts {model.prediction}")
    rows = zip(made.times[:-1], made.solvers, strict=True)
    steps = tuple(Step(t, solver, guidance=as_guidance(guidance)) for t, solver in rows)
    provenance = {"scheduler": type(scheduler).__name__}
    plan = Plan(steps, made.path, made.times[-1], made_for(model), provenance=provenance)
    plan.check(model)
    return plan
