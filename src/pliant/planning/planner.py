"""`pliant.plan`: from a budget to a plan in one call; `search`, which also says what was tried and how good it is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path as FilePath
from typing import Any

from pliant.denoiser import Denoiser
from pliant.errors import PlanError, suggest
from pliant.planning.closed_form import known
from pliant.planning.defaults import default_objective
from pliant.planning.distribution import FRESH, FrechetObjective
from pliant.planning.objective import Objective
from pliant.planning.proxies import SampleError, TrajectoryError
from pliant.planning.registry import PLANNERS, get_planner
from pliant.planning.result import PlanResult, Progress, confirm
from pliant.plans import Budget, Plan


def search(
    model: Denoiser,
    budget: float | str | Budget,
    planner: str = "auto",
    *,
    time: float | str | None = None,
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    objective: Objective | None = None,
    journal: str | FilePath | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PlanResult:
    """What a planner finds, with its cost, quality, frontier and settings.

    time: limit of a search, in seconds or as "90 s", "5min"; with it, it searches as long as that allows.
    journal: file that makes the search resumable. objective: None for `default_objective`, or, where a planner does not
    search by it, its own proxy. What was chosen by measuring has its quality from seeds that no search saw: by the
    objective, or where a proxy chose by `default_objective`. Of a search's three or four finalists those seeds
    choose the best, so that its quality is a little flattered. options: the planner's own.
    Raises PlanError for an unknown planner or option, and for a budget below its cheapest plan.
    """
    run = get_planner(planner)
    takes = list(inspect.signature(run).parameters)
    seconds = None if time is None else read_time(time)
    for name, value in (("seconds", seconds), ("journal", journal)):
        if value is not None:
            if name not in takes:
                what = "limit of time" if name == "seconds" else "journal"
                searching = ", ".join(n for n, p in PLANNERS.items() if name in inspect.signature(p).parameters)
                raise PlanError(f"planner {planner!r} takes no {what}; those that search do: {searching}")
            options[name] = value
    for name in options:
        if name not in takes:
            raise PlanError(f"planner {planner!r} has no option {name!r}: {suggest(name, takes[2:])}")
    searches = "evaluations" in takes
    if seconds is not None and searches:
        options.setdefault("evaluations", 100_000)  # the clock decides
    if objective is None and searches:
        objective = default_objective(model, steps, guidance)
    found = run(
        model, budget, objective=objective, steps=steps, guidance=guidance, seed=seed, progress=progress, **options
    )
    proxy = objective is None or isinstance(objective, (SampleError, TrajectoryError))
    if found.quality is None or (searches and not proxy):  # closed forms measure nothing; searches confirm finalists
        return found
    if proxy or objective is None:
        judge: Objective = default_objective(model, steps, guidance, first_seed=FRESH)
    else:
        judge = objective.on_fresh_seeds() if isinstance(objective, FrechetObjective) else objective
    return confirm([found], model, judge, progress)


_search = search  # `plan` has an argument of that name


def plan(
    model: Denoiser,
    budget: float | str | Budget,
    *,
    search: str | None = None,
    time: float | str | None = None,
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    objective: Objective | None = None,
    journal: str | FilePath | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """The best plan that Pliant knows or finds for a budget: `pliant.plan(model, "10%", search="auto", time="5min")`.

    budget: as `parse_budget` reads it, of `steps` steps at full compute with this classifier-free guidance scale.
    search: None takes what was found in advance for a model inside the package, else the closed form, without sampling
    anything; a name of `PLANNERS` searches. `planning.search` returns the same with its evidence.
    """
    if search is not None:
        return _search(
            model, budget, search, time=time, seed=seed, steps=steps, guidance=guidance, objective=objective,
            journal=journal, progress=progress, **options,
        ).single  # fmt: skip
    given = [k for k, v in (("time", time), ("objective", objective), ("journal", journal)) if v is not None]
    given += list(options)
    if given:
        raise PlanError(f"{given[0]} belongs to a search: give search='auto', or leave it out")
    return known(model, budget, steps=steps, guidance=guidance).single


_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}


def read_time(value: float | str) -> float:
    """90, "90 s", "2min", "1.5 h" -> seconds. Raises PlanError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*?)s?\s*", str(value).lower())
    unit = match.group(2) if match else None
    if match is None or unit not in _UNITS or not float(match.group(1)) > 0.0:
        raise PlanError(f"cannot read the time {value!r}; write seconds, or 90s, 5min, 1.5h")
    return float(match.group(1)) * _UNITS[unit]
