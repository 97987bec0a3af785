"""`pliant plan --search`: what may be asked, the search itself with its journal, and what to say of the outcome."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, note, progress_saying
from pliant.cli.planning import STEPS, PlanOptions, ready_budget
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.planning import Objective, PlanResult

ALLOWED = {"--budget", "--steps", "--guidance", "--throughput"}


@dataclass(frozen=True)
class SearchOptions:
    """As typed; None where nothing was typed. One parameter of a command stands for all (`grouped`)."""

    planner: opt.SearchName = None
    time: opt.SearchTime = None
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the search.  [default: 0]")] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search whose journal lies beside the plan file.")
    ] = False
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Search by the distance to these images (as in 'pliant eval') instead of to full compute's samples.",
            show_default=False,
        ),
    ] = None
    num: Annotated[
        int | None, typer.Option("--num", min=20, help="Images per measured finalist.  [default: 256]")
    ] = None

    def check(self, budget: str | None, choices: PlanOptions, out: Path | None) -> None:
        """Raise PliantError for options that do not go together."""
        from pliant.planning import get_planner

        if self.planner is None:
            for name, value in (("--time", self.time), ("--seed", self.seed), ("--resume", self.resume),
                                ("--reference", self.reference), ("--num", self.num)):  # fmt: skip
                if value not in (None, False):
                    raise ConfigError(f"{name} belongs to a search: give --search auto too")
            return
        get_planner(self.planner)
        if budget is None:
            raise ConfigError(f"--search {self.planner} needs a budget, e.g. --budget 10%")
        extra = [name for name in choices.given() if name not in ALLOWED]
        if extra:
            raise ConfigError(f"--search decides about everything but guidance: leave out {extra[0]}")
        if self.resume and not keeps_journal(self.planner):
            raise ConfigError(f"planner {self.planner!r} keeps no journal to resume: leave out --resume")
        if self.resume and out is None:
            raise ConfigError("--resume goes on with the journal beside the plan file: name that file with -o")


def keeps_journal(planner: str) -> bool:
    """Whether a planner's search can be resumed."""
    from pliant.planning import get_planner

    return "journal" in inspect.signature(get_planner(planner)).parameters


def journal_file(out: Path) -> Path:
    """Beside the plan file."""
    return out.with_name(f"{out.stem}.search.jsonl")


def searched(model: Denoiser, choices: PlanOptions, request: SearchOptions, out: Path | None) -> PlanResult:
    """Run the planner. A search writes its journal beside the plan file, if there is one."""
    from pliant.planning import search as search_for

    planner = request.planner or "auto"
    if out is not None:
        _can_write(out)
    journal = journal_file(out) if out is not None and keeps_journal(planner) else None
    if journal is not None and journal.exists() and not request.resume:
        journal.unlink()
    if request.resume and journal is not None and not journal.exists():
        note(f"there is no journal {journal} to resume: the search begins anew")
    try:
        with progress_saying(f"searching ({planner})") as advance:
            return search_for(
                model,
                ready_budget(model, choices),
                planner,
                time=request.time,
                seed=request.seed or 0,
                steps=choices.steps or STEPS,
                guidance=choices.guidance,
                objective=_objective(model, request, choices),
                journal=journal,
                progress=advance,
            )
    except KeyboardInterrupt:
        if journal is not None:
            note(f"what was measured is kept in {journal}; the same command with --resume goes on")
        raise


def _can_write(out: Path) -> None:
    """Raise PliantError, before a long search, for a plan file that cannot be written after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PliantError(f"could not write {out}: {error.strerror or error}") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise PliantError(f"could not write {out}: {'it is a folder' if out.is_dir() else 'its folder is read-only'}")


def _objective(model: Denoiser, request: SearchOptions, choices: PlanOptions) -> Objective | None:
    from pliant.cli.evaluate import default_extractor
    from pliant.evaluation import get_extractor, load_reference
    from pliant.planning import FrechetObjective, default_objective
    from pliant.planning.defaults import IMAGES
    from pliant.planning.distribution import SEARCHED

    if request.reference is None:
        if request.num is None:
            return None
        return default_objective(model, choices.steps or STEPS, choices.guidance, request.num)
    channels, height, width = model.sample_shape
    extractor = get_extractor(default_extractor((channels, height, width)))
    reference = load_reference(request.reference, extractor, size=(height, width))
    return FrechetObjective(model, reference, extractor, request.num or IMAGES, SEARCHED)


def search_facts(found: PlanResult) -> dict[str, Any]:
    """For JSON reports."""
    return {
        "planner": found.planner,
        "objective": found.objective,
        "quality": None if found.quality is None else found.quality.to_dict(),
        "evaluations": found.evaluations,
        "seconds": found.seconds,
        "settings": found.settings,
        "frontier": [
            {"plan": c.plan.digest(), "flops_per_image": c.cost.flops, "score": c.score.value}
            for c in found.frontier
            if c.score is not None
        ],
    }


def list_all(json: bool) -> None:
    """Every planner, and the first line of what it says of itself."""
    from pliant.planning import PLANNERS

    rows = []
    for name, run in PLANNERS.items():
        module = inspect.getmodule(run)
        words = (inspect.getdoc(module) or "").splitlines()[0]
        rows.append({"name": name, "about": words, "searches": "evaluations" in inspect.signature(run).parameters})
    if json:
        emit_json({"planners": rows})
        return
    for row in rows:
        print(f"{row['name']:14s} {row['about']}")
