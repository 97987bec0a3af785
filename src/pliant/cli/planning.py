"""From the plan options of `plan`, `sample` and `eval` to a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pliant.cli import options as opt
from pliant.cli.console import note, progress
from pliant.cli.models import parse_patch
from pliant.errors import ConfigError

if TYPE_CHECKING:
    from pliant.compute import Compute
    from pliant.denoiser import Denoiser
    from pliant.guidance import Guidance
    from pliant.plans import AnyPlan, Budget, Plan, RoutedPlans
    from pliant.plans.timing import Throughput

P = TypeVar("P", "Plan", "RoutedPlans", "AnyPlan")
STEPS, SOLVER = 50, "dpmpp-2m"


@dataclass(frozen=True)
class PlanOptions:
    """As typed; None where nothing was typed. One parameter of a command stands for all (`grouped`)."""

    budget: opt.Budget = None
    steps: opt.Steps = None
    solver: opt.SolverName = None
    grid: opt.GridName = None
    cache: opt.CacheName = None
    guide: opt.GuideName = None
    guidance: opt.GuidanceScale = None
    guided_channels: opt.GuidedChannels = None
    weak_steps: opt.WeakSteps = None
    weak_guidance_steps: opt.WeakGuidanceSteps = None
    weak: opt.WeakKind = None
    weak_last: opt.WeakLast = False
    precision: opt.PrecisionName = None
    throughput: opt.ThroughputFile = None

    def given(self) -> list[str]:
        """The options that were typed, as typed."""
        return ["--" + name.replace("_", "-") for name, value in asdict(self).items() if value not in (None, False)]


def solver_config(text: str) -> dict[str, Any]:
    """ "ddim:eta=0.5,..." -> {"name": "ddim", "eta": 0.5}. Raises ConfigError."""
    return _named(text, "solver", "ddim:eta=0.5")


def grid_config(text: str | None) -> dict[str, Any] | None:
    """ "shifted:shift=3" -> {"name": "shifted", "shift": 3}; None stays None. Raises ConfigError."""
    return None if text is None else _named(text, "grid", "shifted:shift=3")


def cache_config(text: str) -> dict[str, Any]:
    """ "teacache:threshold=0.2" -> {"name": "teacache", "threshold": 0.2}. Raises ConfigError."""
    return _named(text, "cache", "teacache:threshold=0.2")


_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""1e-3: a number, which YAML 1.1 reads as a text."""


def _numbers(value: Any) -> Any:
    """The value with numbers that YAML took for texts."""
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


_COMMA = re.compile(r",(?![^\[\]{}]*[\]}])")
"""Between options, not inside of a list: "teacache:threshold=0.2,polynomial=[7, -1, 0]"."""


def _named(text: str, what: str, example: str) -> dict[str, Any]:
    """A name and its options. Raises ConfigError."""
    import yaml

    name, _, rest = text.partition(":")
    config: dict[str, Any] = {"name": name.strip()}
    for pair in filter(None, _COMMA.split(rest)):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"cannot read the {what} {text!r}; write a name, or options as in {example}")
        try:
            config[key.strip()] = _numbers(yaml.safe_load(value))
        except yaml.YAMLError:
            raise ConfigError(f"cannot read the value {value!r} of {key.strip()!r} in the {what} {text!r}") from None
    return config


ONLY_BUDGET = {"--budget", "--guidance", "--throughput"}
"""With no other option typed the planner decides everything."""


def make_plan(model: Denoiser, options: PlanOptions) -> Plan:
    """For a budget alone what the planner knows best: found in advance, or in closed form.

    With more options weak steps first if a budget or a number of weak steps is given, else the same compute at every
    step.
    """
    if options.budget is not None and set(options.given()) <= ONLY_BUDGET:
        from pliant.planning import known
        from pliant.plans import Plan

        budget, full = ready_budget(model, options), Plan.uniform(model, STEPS, guidance=options.guidance)
        whole = budget.spent(full, model)
        if 1.05 * whole < budget.limit(full, model):
            note(
                f"full compute, {STEPS} steps, costs {budget.describe(whole, full, model)}, less than this budget: "
                f"--steps asks for more steps"
            )
        return known(model, budget, steps=STEPS, guidance=options.guidance).single
    return made_plan(model, options)


def made_plan(model: Denoiser, options: PlanOptions) -> Plan:
    """What the options say."""
    from pliant.compute import Compute
    from pliant.models.precision import check_precision
    from pliant.plans import Plan, weakest
    from pliant.solvers import get_solver

    solver = get_solver(solver_config(options.solver or SOLVER))
    times = grid_config(options.grid)
    if options.precision is not None:  # before the plan is made: seconds depend on it
        check_precision(options.precision)
    if options.cache is not None and (options.guide or "").partition(":")[0] == "every":
        note(
            "--cache with --guide every: a step that computes the reference again after the last full step was without "
            "it runs in full, and gates compare with its last such step; `pliant plan` shows what is left to save"
        )

    def finished(plan: Plan) -> Plan:
        """With what is decided about steps that are there already; a budget counts it."""
        if options.guide is not None:
            plan = _guided(plan, options)
        if options.precision is not None:
            plan = with_precision(plan, options.precision)
        return plan if options.cache is None else plan.cached(model, **cache_config(options.cache))

    steps = options.steps or STEPS
    if options.budget is None and options.weak_steps is None:
        for name, value in (("--weak-last", options.weak_last), ("--weak-guidance-steps", options.weak_guidance_steps)):
            if value:
                raise ConfigError(f"{name} belongs to plans with weak steps: give --budget or --weak-steps too")
        compute = weak_compute(options.weak) if options.weak else Compute()
        return finished(Plan.uniform(model, steps, solver, compute, _guidance(options), times))
    if options.budget is not None and options.weak_steps is not None:
        raise ConfigError("give either --budget or --weak-steps, not both")
    weak = weak_compute(options.weak) if options.weak else weakest(model)
    return Plan.weak_to_powerful(
        model,
        steps,
        None if options.budget is None else ready_budget(model, options),
        weak_steps=options.weak_steps,
        weak_guidance_steps=options.weak_guidance_steps,
        weak=replace(weak, precision=options.precision),
        powerful=Compute(precision=options.precision),
        solver=solver,
        times=times,
        guidance=options.guidance,
        guided_channels=options.guided_channels,
        weak_last=options.weak_last,
        then=finished,
    )


def ready_budget(model: Denoiser, options: PlanOptions) -> Budget:
    """The budget; one in seconds with its throughput table, which is measured now if there is none."""
    from pliant.plans import parse_budget
    from pliant.plans.timing import Throughput, cached_table
    from pliant.plans.timing.measure import default_computes
    from pliant.plans.timing.ready import missing_kinds, ready_table

    budget = parse_budget(options.budget or "")
    if budget.seconds is None:
        return budget
    if options.throughput is not None:
        table = Throughput.load(options.throughput)
        table.check(model)
        return replace(budget, throughput=table)
    computes = default_computes(model, (options.precision,))
    if options.weak:
        computes.append(replace(weak_compute(options.weak), precision=options.precision))
    if missing_kinds(cached_table(model), model, computes):
        note("measuring how fast this machine runs the model, once; 'pliant bench' does it ahead")
    with progress("measuring") as advance:
        return replace(budget, throughput=ready_table(model, computes, advance))


def weak_compute(text: str) -> Compute:
    """ "4", "2x4", "exit:3", "scale", "scale:ratio=2,band=dct" -> the compute of weak steps. Raises ConfigError."""
    from pliant.compute import Compute, LowBand

    name, colon, rest = text.partition(":")
    if name == "exit":
        if not rest.isdecimal():
            raise ConfigError(f"cannot read the exit in --weak {text!r}; write the blocks before it: exit:3")
        return Compute(exit=int(rest))
    if name == "scale":
        config = _named(text, "scale", "scale:ratio=2,band=dct")
        del config["name"]
        return Compute(scale=LowBand.from_config(config))
    if colon:
        raise ConfigError(f"cannot read --weak {text!r}; write a patch size (4, 2x4), exit:3 or scale:ratio=2")
    return Compute.of(parse_patch(text))


def _guided(plan: Plan, options: PlanOptions) -> Plan:
    """The plan guided as --guide says, at the scale of --guidance. Raises ConfigError without one."""
    from pliant.plans.guiding import guided_plan

    guidance = _guidance(options)
    if guidance is None:
        raise ConfigError("--guide says how to guide; say how far, too: --guidance 2")
    if options.weak_guidance_steps:
        raise ConfigError("--guide and --weak-guidance-steps both decide about guidance: give one of them")
    return guided_plan(plan, guidance, **_named(options.guide or "", "guidance", "interval:least=0.28,most=1.6"))


def _guidance(options: PlanOptions) -> Guidance | None:
    from pliant.guidance import Guidance

    if options.guidance in (None, 1.0):
        return None
    return Guidance.cfg(float(options.guidance or 1.0), channels=options.guided_channels)


def plan_from(file: Path | None, model: Denoiser, options: PlanOptions) -> AnyPlan:
    """The plan file if one is given (checked against the model), else a plan from the options. Raises PliantError.

    Without any option that decides about steps, a few-step model's own plan.
    """
    from pliant.plans import Plan, load_plan

    if file is None:
        own = Plan.own(model) if not set(options.given()) - {"--precision", "--throughput"} else None
        if own is None:
            return make_plan(model, options)
        return own if options.precision is None else with_precision(own, options.precision)
    if options.given():
        raise ConfigError(f"a plan file decides everything: leave out {options.given()[0]}, or --plan")
    plan = load_plan(file)
    plan.check(model)
    return plan


def plans_in(plan: AnyPlan) -> tuple[Plan, ...]:
    """A plan alone, or all that are routed to."""
    from pliant.plans import Plan

    return (plan,) if isinstance(plan, Plan) else plan.plans


def with_precision(plan: P, precision: str) -> P:
    """The plan with the precision of every call that leaves it open set to `precision`."""
    from pliant.plans import Plan

    if not isinstance(plan, Plan):
        return plan.with_plans(lambda one: with_precision(one, precision))

    def pinned(compute: Any) -> Any:
        # Checked by Compute, which names the known precisions.
        return replace(compute, precision=precision) if compute.precision is None else compute

    steps = []
    for step in plan.steps:
        guidance = step.guidance
        if guidance is not None and guidance.compute is not None:
            guidance = replace(guidance, compute=pinned(guidance.compute))
        steps.append(replace(step, compute=pinned(step.compute), guidance=guidance))
    return plan.with_steps(steps)


def own_precision(model: Denoiser) -> str:
    """What calls that leave the precision open run in on this machine."""
    from pliant.adapters import FlexiDiT
    from pliant.models.precision import resolve_precision

    core = model.core
    return resolve_precision(None, core.base if isinstance(core, FlexiDiT) else core)


def table_for(model: Denoiser, file: Path | None) -> Throughput | None:
    """The throughput table in a file, checked, or the one kept for this model and machine, if there is one."""
    from pliant.plans.timing import Throughput, cached_table

    if file is None:
        return cached_table(model)
    table = Throughput.load(file)
    table.check(model)
    return table


def cost_facts(
    plan: AnyPlan,
    model: Denoiser,
    batch: int | None = None,
    throughput: Throughput | None = None,
    classes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Exact cost of a plan, for JSON; batch: also its bytes, and its seconds where a table says them.

    Of routed plans the mean over `classes`, by default all, and FLOPs alone.
    """
    from pliant.errors import PlanError
    from pliant.plans import Plan
    from pliant.plans.describe import baseline_share

    if not isinstance(plan, Plan):
        cost = plan.cost(model, classes)
    else:
        try:
            cost = plan.cost(model, batch, throughput)
        except PlanError:  # the table was not measured on this plan's calls
            cost = plan.cost(model, batch)
    facts: dict[str, Any] = {
        "flops_per_image": cost.flops,
        "full_flops_per_image": cost.full_flops,
        "share": cost.share,
        "of_budget_baseline": baseline_share(plan, cost.flops),
        "evaluations": cost.evaluations,
        "network_calls": cost.calls,
    }
    if cost.batch is not None:
        run = cost.batch
        facts["batch"] = {
            "images": run.images,
            "peak_bytes": run.memory.peak,
            "moved_bytes": run.memory.moved,
            "seconds": run.seconds,
            "seconds_per_image": run.seconds_per_image,
            "least_seconds": None if run.time is None else run.time.least,
        }
    return facts
