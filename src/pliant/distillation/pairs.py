"""Making pairs: a teacher's plan run on seeded noise, or real images run back to noise; shard by shard.

The same pairs come out whatever the number of processes, batch sizes and interruptions: pair k depends on seed k alone,
and a shard appears under its name only when complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, DataError, PliantError
from pliant.evaluation.evaluate import assigned_labels
from pliant.plans import Plan, Sampler
from pliant.plans.noise import start_state
from pliant.training.data.images import TrainingSet
from pliant.training.data.pairs import INDEX, StoreIndex, missing_shards, write_shard
from pliant.training.draws import Draws
from pliant.training.fingerprint import weights_hash

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """Which pairs: seeds first_seed .. first_seed + count - 1, classes in turn."""

    count: int
    first_seed: int = 10_000_000
    shard_size: int = 512

    def __post_init__(self) -> None:
        if self.count < 1 or self.shard_size < 1 or self.first_seed < 0:
            raise ConfigError(
                f"pairs need count >= 1, shard_size >= 1 and first_seed >= 0, got {self.count}, {self.shard_size} and "
                f"{self.first_seed}"
            )


def generate_pairs(
    folder: str | Path,
    teacher: Denoiser,
    plan: Plan,
    wanted: Wanted,
    *,
    batch_size: int = 128,
    progress: Advance | None = None,
) -> None:
    """Fill a store with what `plan` makes of seeded noise; go on where an earlier call stopped.

    The teacher's weights should be averages (exported models are). Classes are balanced over the seeds. Under
    `accelerate launch` processes share the shards. Raises DataError for a folder with other pairs, PlanError for a plan
    that the teacher cannot run or that draws noise (its result would not be a function of the start).
    """
    plan.check(teacher)
    if any(step.solver.stochastic for step in plan.steps):
        raise ConfigError(f"pairs need a deterministic plan; {plan.steps[0].solver.name} draws noise on the way")
    made_by = {
        "teacher": weights_hash(teacher),
        "fingerprint": teacher.fingerprint(),
        "plan": plan.digest(),
        "first_seed": wanted.first_seed,
    }
    index = StoreIndex(
        wanted.count, teacher.image_shape, wanted.shard_size, teacher.path.to_config(), True, made_by,
        tuple(teacher.class_names),
    )  # fmt: skip
    sampler = Sampler(teacher, plan)

    def shard(rows: range) -> dict[str, Tensor]:
        seeds = [wanted.first_seed + k for k in rows]
        labels = assigned_labels(seeds, teacher.num_classes)
        images = [
            sampler(labels[i : i + batch_size], seeds[i : i + batch_size]).float().cpu()
            for i in range(0, len(seeds), batch_size)
        ]
        return {"images": torch.cat(images), "labels": labels, "seeds": torch.tensor(seeds, dtype=torch.int64)}

    _fill(Path(folder), index, shard, progress)


def generate_trajectories(
    folder: str | Path,
    teacher: Denoiser,
    plan: Plan,
    places: Sequence[int],
    wanted: Wanted,
    *,
    batch_size: int = 128,
    progress: Advance | None = None,
) -> None:
    """Fill a store with the states that `plan` passes at `places` (0: its start, k: after step k); as `generate_pairs`.

    Stored as the noise of each pair: (K+1, C, H, W) states from the first place to the last.
    """
    plan.check(teacher)
    made_by = {
        "teacher": weights_hash(teacher),
        "plan": plan.digest(),
        "first_seed": wanted.first_seed,
        "places": list(places),
    }
    index = StoreIndex(
        wanted.count, teacher.sample_shape, wanted.shard_size, teacher.path.to_config(), False, made_by,
        tuple(teacher.class_names),
    )  # fmt: skip
    sampler = Sampler(teacher, plan)
    start = plan.program(teacher).start

    def shard(rows: range) -> dict[str, Tensor]:
        seeds = [wanted.first_seed + k for k in rows]
        labels = assigned_labels(seeds, teacher.num_classes)
        kept = []
        for i in range(0, len(seeds), batch_size):
            part = seeds[i : i + batch_size]
            x = start_state(start, part, teacher.sample_shape, teacher.device, teacher.path)
            states = [x, *(result.x.clone() for result in sampler.steps(labels[i : i + batch_size], part, x))]
            kept.append(torch.stack([states[k] for k in places], 1).float().cpu())
        noise = torch.cat(kept)
        return {"images": noise[:, -1].clone(), "labels": labels, "noise": noise}

    _fill(Path(folder), index, shard, progress)


def invert_images(
    folder: str | Path,
    teacher: Denoiser,
    plan: Plan,
    data: TrainingSet,
    *,
    count: int | None = None,
    shard_size: int = 512,
    batch_size: int = 128,
    progress: Advance | None = None,
) -> None:
    """Fill a store with real images and the noise that the teacher's flow takes them to (rfpp, configuration G).

    plan: of the teacher, run backwards; its solvers must be deterministic.
    """
    back = replace(
        plan,
        steps=tuple(replace(s, t=t) for s, t in zip(reversed(plan.steps), plan.times[::-1][:-1], strict=True)),
        end=plan.times[0],
    )
    back.check(teacher)
    total = len(data.labels) if count is None else min(count, len(data.labels))
    made_by = {"teacher": weights_hash(teacher), "plan": back.digest(), "data": _content(data, total)}
    index = StoreIndex(
        total, teacher.image_shape, shard_size, teacher.path.to_config(), False, made_by, tuple(data.class_names)
    )
    sampler = Sampler(teacher, back)
    last = teacher.path.alpha_sigma(back.end)
    scale = float(torch.hypot(last.alpha, last.sigma))  # of seeded start states

    def shard(rows: range) -> dict[str, Tensor]:
        indices = torch.tensor(list(rows))
        images = data.samples(indices, torch.zeros(len(rows), dtype=torch.bool), Draws.single(len(rows)))
        labels = data.labels[indices]
        noise = [
            sampler(labels[i : i + batch_size], [0] * len(labels[i : i + batch_size]), images[i : i + batch_size]).cpu()
            for i in range(0, len(rows), batch_size)
        ]
        return {"images": images, "labels": labels, "noise": torch.cat(noise).float() / scale}

    _fill(Path(folder), index, shard, progress)


def _content(data: TrainingSet, total: int) -> str:
    """What tells one data set from another without reading it all."""
    rows = torch.arange(min(total, 16))
    few = data.samples(rows, torch.zeros(len(rows), dtype=torch.bool), Draws.single(len(rows)))
    return f"{len(data.labels)} samples, first {few.double().sum():.6f}"


def _fill(
    folder: Path, index: StoreIndex, shard: Callable[[range], dict[str, Tensor]], progress: Advance | None
) -> None:
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        _begin(folder, index)
    state.wait_for_everyone()
    missing = missing_shards(folder, index)
    # By number, not by place in the list: another process may have written some since.
    mine = [k for k in missing if k % state.num_processes == state.process_index]
    done = index.shards - len(missing)
    for k, number in enumerate(mine):
        if progress is not None:
            progress(min(index.shards, done + k * state.num_processes), index.shards)
        try:
            write_shard(folder, number, shard(index.rows(number)))
        except OSError as error:
            raise PliantError(f"could not write pairs to {folder}: {error.strerror or error}; resume later") from None
    state.wait_for_everyone()
    if progress is not None:
        progress(index.shards, index.shards)


def _begin(folder: Path, index: StoreIndex) -> None:
    """Create the store, or find it to be this one. Raises DataError for one of other pairs."""
    if (folder / INDEX).is_file():
        if StoreIndex.read(folder) != index:
            raise DataError(f"{folder} holds other pairs (teacher, plan, seeds or data differ); choose another folder")
        for left in folder.glob(".pairs-*.tmp"):
            left.unlink(missing_ok=True)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index.write(folder)
    except OSError as error:
        raise PliantError(f"cannot create the folder {folder}: {error.strerror or error}") from None
