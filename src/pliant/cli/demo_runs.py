"""What the demo runs: one model at several budgets with the same seeds, measured in turns on the same machine."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pliant import imaging

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.cli.models import Opened
    from pliant.plans import Plan, PlanCost, Sampler

BUDGETS = (1.0, 0.75, 0.6, 0.45)
ENOUGH = 100
"""Images below which a distance says nothing."""
MOST = 1000


@dataclass(frozen=True)
class Setting:
    """How the demo samples a bundled model."""

    title: str
    steps: int
    solver: str
    guidance: float | None
    reference: str | None
    """What to compare with; None: not in the package, so distances that were measured with the model are shown."""
    extractor: str


SETTINGS = {
    "cifar10": Setting("CIFAR-10, 32x32", 20, "dpmpp-2m", 1.5, None, "cifar10-classifier"),
    "digits": Setting("handwritten digits, 8x8", 20, "dpmpp-2m", None, "digits", "digits-classifier"),
}


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass
class Row:
    """One budget: its plan, what it costs, what it makes, how long it takes and how good it is."""

    budget: float
    plan: Plan
    cost: PlanCost
    sampler: Sampler
    pixels: Tensor | None = None
    """(images, C, H, W) uint8 of the comparison."""
    batch_seconds: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    distance: Distance | None = None
    batch: int = 1

    @property
    def label(self) -> str:
        return f"{self.budget:.0%}"

    @property
    def seconds(self) -> float:
        """Per image, median over batches."""
        return statistics.median(self.batch_seconds) / self.batch

    @property
    def images(self) -> int:
        return self.batch * len(self.batch_seconds)


def make_rows(opened: Opened, setting: Setting) -> list[Row]:
    """A plan for every budget, ready to run."""
    from pliant.plans import Plan, Sampler

    model, rows = opened.denoiser, []
    for budget in BUDGETS:
        plan = Plan.weak_to_powerful(model, setting.steps, budget, solver=setting.solver, guidance=setting.guidance)
        rows.append(Row(budget, plan, plan.cost(model), Sampler(model, plan)))
    return rows


def choose_threads(row: Row, classes: list[int]) -> float:
    """Set the number of threads to the faster of all and one; -> seconds per image of this row.

    Small networks on a busy machine wait for each other's threads longer than they compute.
    """
    import torch

    # A few steps of one batch tell enough, and the first trial warms everything up.
    trial, found = 3, {}
    for threads in (torch.get_num_threads(), 1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        begun = time.perf_counter()
        for _ in itertools.islice(row.sampler.steps(classes, list(range(len(classes)))), trial):
            pass
        found[threads] = (time.perf_counter() - begun) / trial / len(classes) * len(row.plan.steps)
    best = min(found, key=lambda threads: found[threads])
    torch.set_num_threads(best)
    return found[best]


def draw_pictures(rows: list[Row], classes: list[int], seed: int, advance: Callable[[int, int], None]) -> None:
    """One image per entry of `classes` and budget, the same seeds in every row."""
    seeds = [seed + k for k in range(len(classes))]
    for k, row in enumerate(rows):
        row.pixels = imaging.to_pixels(row.sampler(classes, seeds))
        advance(k + 1, len(rows))


def measure(
    rows: list[Row],
    setting: Setting,
    num_classes: int,
    pace: float,
    seconds: float,
    advance: Callable[[int, int], None],
) -> None:
    """Rounds of one batch per budget until `seconds` are over: timings always, features where there is a reference."""
    import torch

    from pliant.evaluation import from_uint8, get_extractor

    extractor = get_extractor(setting.extractor) if setting.reference else None
    round_cost = sum(row.cost.share for row in rows) * pace
    # About ten rounds: enough for a median, batches as large as time allows.
    batch = int(min(50, max(1, seconds / 10 / round_cost)))
    batch -= batch % 10 if batch > 10 else 0
    for row in rows:
        row.batch = batch
    begun = time.perf_counter()
    number = 0
    while number * batch < MOST:
        seeds = range(number * batch, (number + 1) * batch)
        labels = torch.tensor([s % num_classes for s in seeds])
        for row in rows:
            if number == 0:  # a first step of this batch size warms up allocator and kernels
                next(row.sampler.steps(labels, list(seeds)))
            start = time.perf_counter()
            images = row.sampler(labels, list(seeds))
            row.batch_seconds.append(time.perf_counter() - start)
            if extractor is not None:
                row.features.append(extractor(from_uint8(imaging.to_pixels(images))))
        number += 1
        elapsed = time.perf_counter() - begun
        advance(int(min(elapsed, seconds)), int(seconds))
        if elapsed * (number + 1) / number > seconds:
            break


@dataclass(frozen=True)
class Judgement:
    """What the distances are."""

    metric: str
    images: int
    """Behind each distance."""
    here: bool
    """Measured now on this machine, or (for the same plans) when the model was made."""


def judge(rows: list[Row], setting: Setting, stored: dict[str, Any] | None) -> Judgement | None:
    """Fill in the distances: measured here, or shipped with the model. None if there are neither."""
    import torch

    from pliant.evaluation import bootstrap_interval, distance_name, get_extractor, load_reference

    if setting.reference and rows[0].images >= ENOUGH:
        extractor = get_extractor(setting.extractor)
        reference = load_reference(setting.reference, extractor)
        for row in rows:
            features = torch.cat(row.features)
            classes = torch.arange(len(features)) % row.sampler.model.num_classes
            found = bootstrap_interval(features, reference.statistics, level=0.95, groups=classes)
            row.distance = Distance(found.value, max(0.0, found.low), found.high)
        return Judgement(distance_name(extractor), rows[0].images, True)
    if stored is None or not all(_recall(row, setting, stored) for row in rows):
        for row in rows:
            row.distance = None
        return None
    first = next(iter(stored["rows"].values()))
    return Judgement(str(first["report"]["metric"]), int(stored["settings"]["num"]), False)


def _recall(row: Row, setting: Setting, stored: dict[str, Any]) -> bool:
    """Fill in the distance that was measured for this very plan when the model was made; False if there is none."""
    from pliant.evaluation import student_interval

    asked = {"steps": setting.steps, "solver": setting.solver, "guidance": setting.guidance or 1.0}
    if any(stored["settings"].get(key) != value for key, value in asked.items()):
        return False
    for found in stored["rows"].values():
        if found["family"] in ("full", "weak first") and found["flops"] == row.cost.flops:
            values = found["report"]["distance"]["values"]
            if len(values) < 2:
                row.distance = Distance(values[0], values[0], values[0])
                return True
            interval = student_interval(values, 0.95)
            row.distance = Distance(interval.value, max(0.0, interval.low), interval.high)
            return True
    return False


def stored_quality(name: str) -> dict[str, Any] | None:
    """What benchmarks/quality.py wrote into the folder of a bundled model, or None."""
    from pliant.formats.locate import ASSETS

    file = ASSETS / name / "quality.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
