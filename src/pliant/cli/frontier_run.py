"""What a frontier runs: plans made and measured, with everything kept that was measured before."""

from __future__ import annotations

import hashlib
import itertools
import json as json_module
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli.console import Advance, note, progress
from pliant.cli.evaluate import ALIASES, default_extractor
from pliant.cli.planning import own_precision, solver_config
from pliant.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from pliant.cli.frontier_rows import Row
    from pliant.cli.models import Opened
    from pliant.planning.distribution import FrechetObjective
    from pliant.planning.entries import Entry, Skipped
    from pliant.plans import Budget, Plan

PROBE = 2
"""Steps of the full plan that are timed to say how long all will take."""
ROUND = 2.0
"""Seconds that the full plan's batch may take in a round of timings."""


@dataclass(frozen=True, eq=False)
class Run:
    """What every part of one frontier needs."""

    opened: Opened
    full: Plan
    budgets: dict[str, Budget]
    guidance: float | None
    objectives: tuple[FrechetObjective, ...]
    """One per repeat."""
    facts: dict[str, Any]
    """What decides a distance beside plan, extractor, reference and seeds."""
    out: Path


def prepare(
    model: str,
    reference: str | None,
    extractor: str | None,
    limits: dict[str, Budget],
    steps: int,
    guidance: float | None,
    num: int,
    repeats: int,
    batch_size: int,
    decode: str | None,
    device: str | None,
    format: str | None,
    option: list[str] | None,
    out: Path,
) -> tuple[Run, Any, Any]:
    from pliant import __version__
    from pliant.cli.models import open_model, weights_hash
    from pliant.evaluation import get_extractor, load_reference
    from pliant.planning import FrechetObjective
    from pliant.planning.distribution import MEASURED
    from pliant.plans import Plan

    opened = open_model(model, format, option, device)
    denoiser = opened.denoiser
    decoder = None
    if decode is not None:
        from pliant.cli.decoding import open_decoder

        decoder = open_decoder(decode, denoiser)
    elif denoiser.config.in_channels not in (1, 3):
        raise ConfigError("this model makes latents, which have no features: give --decode with its autoencoder")
    if reference is None:
        if opened.name != "digits" and opened.source != "digits":
            raise ConfigError("say what real images to compare with: --reference photos/ (or .parquet, .npz, digits)")
        reference = "digits"
    name = extractor or default_extractor(denoiser.image_shape)
    network = get_extractor(ALIASES.get(name, name), str(denoiser.device))
    real = load_reference(reference, network, size=None if decoder else denoiser.image_shape[1:])
    first = FrechetObjective(denoiser, real, network, num, batch=batch_size, decode=decoder)
    full = Plan.uniform(denoiser, steps, guidance=guidance)
    facts = {
        "weights_sha256": weights_hash(denoiser),
        "precision": own_precision(denoiser) or "auto",
        "autoencoder": decode,
        "pliant": __version__,
    }
    objectives = tuple(first.starting_at(MEASURED + k * num) for k in range(repeats))
    return Run(opened, full, limits, guidance, objectives, facts, out), network, real


def baseline_entries(run: Run, solvers: str, files: Sequence[Path]) -> tuple[list[Entry], list[Skipped]]:
    """The full plan first, then fewer steps, the model's own plan and the user's."""
    from pliant.planning.entries import Entry, baselines
    from pliant.plans import Plan
    from pliant.solvers import get_solver

    denoiser = run.opened.denoiser
    named = [text if ":" not in text else solver_config(text) for text in listed(solvers)]
    for solver in named:
        get_solver(solver)  # a misspelt name is refused before anything runs
    entries = [Entry("full", f"full, {len(run.full.steps)} steps", "", run.full)]
    fewer, skipped = baselines(denoiser, run.full, run.budgets, named, run.guidance)
    own = Plan.own(denoiser)
    if own is not None:
        entries.append(Entry("own", "the model's own plan", "", own))
    for file in files:
        plan = Plan.load(file)
        plan.check(denoiser)
        entries.append(Entry("own", file.stem, "", plan))
    return [*entries, *fewer], skipped


def planner_names(planners: str | None, run: Run) -> list[str]:
    from pliant.planning import get_planner

    if planners is None:
        return ["weak-split"] if len(run.opened.denoiser.patch_sizes) > 1 else []
    names = listed(planners)
    for name in names:
        get_planner(name)
        if name == "router":
            raise ConfigError("a frontier compares single plans, and router gives one per class: leave it out")
    return names


def make_folders(out: Path, cache: Path) -> None:
    for folder in (out, out / "plans", cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the folder {folder}: {error.strerror or error}") from None


def planned_entries(
    run: Run, names: Sequence[str], cache: Path, search_num: int, seed: int, network: Any, real: Any
) -> tuple[list[Entry], list[Skipped]]:
    """Every planner at every budget; what a search found is kept, for it may have taken long."""
    from pliant.planning import FrechetObjective, PlanResult, get_planner
    from pliant.planning.entries import Entry, Skipped
    from pliant.plans.timing.ready import ready_table

    confirming = run.objectives[0]
    objective = None
    if search_num > 1 and names:
        objective = FrechetObjective(
            run.opened.denoiser, real, network, search_num, batch=confirming.batch, decode=confirming.decode
        )
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for name, (text, budget) in itertools.product(names, run.budgets.items()):
        asked: dict[str, Any] = {"planner": name, "budget": text, "full": run.full.digest(), "seed": seed}
        if budget.seconds is not None:  # a plan for a time is one for these measurements
            asked["throughput"] = ready_table(run.opened.denoiser).to_dict()
        asked |= {
            **run.facts,
            "guidance": run.guidance,
            "objective": None if objective is None else objective.describe(),
        }
        file = cache / f"planned-{name}-{_digest(asked)}.json"
        if file.exists():
            entries.append(Entry("planner", name, text, PlanResult.load(file).single))
            continue
        try:
            with progress(f"planning: {name} {text}") as advance:
                result = get_planner(name)(
                    run.opened.denoiser, budget, objective=objective, steps=len(run.full.steps),
                    guidance=run.guidance, seed=seed, progress=_without_text(advance),
                )  # fmt: skip
        except PlanError as error:
            skipped.append(Skipped(name, text, str(error)))
            continue
        result.save(file)
        entries.append(Entry("planner", name, text, result.single))
    return entries, skipped


def _without_text(advance: Advance) -> Callable[[int, int, str], None]:
    return lambda done, total, _: advance(done, total)


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json_module.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def measure(run: Run, entries: Sequence[Entry], cache: Path, rounds: int) -> tuple[list[Row], dict[str, str]]:
    """Distances (stored or new) and seconds of all plans; each plan once however many entries share it."""
    from pliant.cli.frontier_rows import Row
    from pliant.planning.measuring import Quality, QualityStore
    from pliant.plans.timing import this_machine

    denoiser = run.opened.denoiser
    unique = {e.plan.digest(): e.plan for e in entries}
    costs = {key: plan.cost(denoiser) for key, plan in unique.items()}
    store = QualityStore(cache, run.facts)
    missing = [(key, o) for key, plan in unique.items() for o in run.objectives if store.known(plan, o) is None]
    work = [costs[key].flops * run.objectives[0].num for key, _ in missing]
    machine = this_machine(denoiser.device)
    timing_file = cache / f"seconds-{_digest({**machine.to_dict(), **run.facts, 'rounds': rounds})}.json"
    batch, timed = _stored_seconds(timing_file) if rounds else (0, {})
    untimed = rounds > 0 and not set(unique) <= set(timed)
    if missing or untimed:
        pace = _seconds_per_flop(run)
        batch = _timed_batch(run, pace) if untimed else batch
        timing = (rounds + 1) * batch * sum(c.flops for c in costs.values()) if untimed else 0
        new = len({key for key, _ in missing})
        spoken = _spoken(pace * (sum(work) + timing))
        note(f"{len(unique)} plans, {len(unique) - new} measured before; about {spoken} to go")
    done = 0.0
    with progress("measuring plans") as advance:
        for (key, objective), flops in zip(missing, work, strict=True):
            store.measure(unique[key], objective.starting_at(objective.first_seed))  # whose features are not kept
            done += flops
            advance(round(1000 * done / sum(work)), 1000)
    if untimed:
        from pliant.files import write_json
        from pliant.planning.measuring import seconds_in_turns

        with progress("timing plans in turn") as advance:
            timed = seconds_in_turns(denoiser, list(unique.values()), batch, rounds, advance)
        facts = {"machine": machine.to_dict(), "rounds": rounds, "batch": batch}
        write_json(timing_file, {**facts, "seconds_per_image": timed})
    where = {"machine": machine.describe()}
    if rounds:
        where["timed"] = f"median of {rounds} rounds in turn, batches of {batch}"
    rows = []
    for entry in entries:
        key = entry.plan.digest()
        file = f"plans/{key}.json"
        quality = Quality(tuple(store.measure(entry.plan, o) for o in run.objectives))
        rows.append(Row(entry, costs[key], quality, quality.interval(), timed.get(key), file))
    return rows, where


def strips(run: Run, rows: Sequence[Row], cache: Path) -> list[tuple[Row, bytes]]:
    """PNG strips of what the full and the best plans make, stored or new."""
    from pliant.cli.frontier_pictures import shown, strip
    from pliant.cli.frontier_rows import undominated

    objective = run.objectives[0]
    facts = _digest({**run.facts, "seeds": str(objective.seeds)})
    chosen = shown(rows, undominated(rows))
    return [(row, strip(row, objective, cache / f"strip-{row.entry.plan.digest()}-{facts}.png")) for row in chosen]


def _seconds_per_flop(run: Run) -> float:
    """From the first steps of the full plan at the batch that will be used, after a warm-up."""
    from pliant.plans import Sampler

    denoiser, batch = run.opened.denoiser, min(run.objectives[0].batch, run.objectives[0].num, 16)
    sampler, seeds = Sampler(denoiser, run.full), list(range(batch))
    labels = [k % denoiser.num_classes for k in seeds]
    count = min(PROBE, len(run.full.steps))
    spent = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        for _result in itertools.islice(sampler.steps(labels, seeds), count):
            pass
        spent = time.perf_counter() - begun
    flops = run.full.cost(denoiser).flops * count / len(run.full.steps)
    return spent / (flops * batch)


def _timed_batch(run: Run, pace: float) -> int:
    """Images per timed call: at most 16, fewer where one call of the full plan would take long."""
    per_image = pace * run.full.cost(run.opened.denoiser).flops
    return 1 if per_image <= 0 else 1 << max(0, min(4, int(ROUND / per_image).bit_length() - 1))


def _stored_seconds(file: Path) -> tuple[int, dict[str, float]]:
    """(batch, seconds per image by plan); nothing if there are none."""
    try:
        found = json_module.loads(file.read_text(encoding="utf-8"))
        return int(found["batch"]), {str(k): float(v) for k, v in found["seconds_per_image"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0, {}  # measured again: nothing of value is lost


def _spoken(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def listed(text: str) -> list[str]:
    """ "a,b:x=1,y=2" -> ["a", "b:x=1,y=2"]: a piece with "=" but no name belongs to the one before it."""
    found: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        if "=" in piece and ":" not in piece and found:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return [] if found == ["none"] else found
