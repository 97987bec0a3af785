"""The folder of a distillation, and the kinds of stages that recipes are made of. Every stage can be resumed.

    OUT/recipe.json     settings; resuming with others is refused
    OUT/STAGE/          pairs (shards) or a training run (checkpoints, metrics.jsonl, model/)
    OUT/model/          the result, with plan.json beside the weights
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, DataError, PliantError
from pliant.files import write_json
from pliant.formats import load, native
from pliant.mappings import first_difference
from pliant.training.data.pairs import PairSet

if TYPE_CHECKING:
    from pliant.distillation.recipe import PairsPart, TrainPart
    from pliant.training.config import DataConfig
    from pliant.training.flow_config import PlanConfig

Progress: TypeAlias = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""`with progress("pairs") as advance: advance(done, total)`."""

SETTINGS = "recipe.json"


@contextmanager
def _silent(text: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


class Workshop:
    """Where a recipe's stages run."""

    def __init__(
        self,
        teacher: str,
        folder: Path,
        seed: int,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        quiet: bool = False,
        progress: Progress = _silent,
        read: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """teacher: folder, file, bundled name or Hub id. read: completes the stored settings of a folder in use.

        Raises PliantError if the folder is in use or unwritable.
        """
        self.teacher, self.folder, self.seed, self.quiet, self.progress = teacher, folder, seed, quiet, progress
        self._flexible: bool | None = None
        _open(folder, settings, resume, read)

    def pairs(self, stage: str, teacher: str, part: PairsPart) -> str:
        """The folder of a complete store of a teacher's pairs, made or completed now unless `part.folder` is one."""
        from pliant.distillation.pairs import Wanted, generate_pairs

        if part.folder is not None:
            PairSet(part.folder)
            return part.folder
        denoiser = _placed(teacher)
        plan = part.plan.build(denoiser)
        wanted = Wanted(part.count, part.first_seed, part.shard_size)
        target = self.folder / stage
        with self.progress(f"{stage}: pairs of the teacher") as advance:
            generate_pairs(target, denoiser, plan, wanted, batch_size=part.batch_size, progress=advance)
        return str(target)

    def inverted(self, stage: str, teacher: str, plan: PlanConfig, data: DataConfig) -> str:
        """The folder of real images with the noise that the teacher's flow takes them to."""
        from pliant.distillation.pairs import invert_images
        from pliant.training.setup_data import open_data

        denoiser = _placed(teacher)
        target = self.folder / stage
        with self.progress(f"{stage}: real images to noise") as advance:
            invert_images(target, denoiser, plan.build(denoiser), open_data(data, denoiser), progress=advance)
        return str(target)

    def trajectories(
        self, stage: str, teacher: str, plan: PlanConfig, places: Sequence[int], count: int, first_seed: int
    ) -> str:
        """The folder of a store of a teacher's trajectories, kept at these steps of its plan."""
        from pliant.distillation.pairs import Wanted, generate_trajectories

        denoiser = _placed(teacher)
        target = self.folder / stage
        with self.progress(f"{stage}: trajectories of the teacher") as advance:
            generate_trajectories(
                target, denoiser, plan.build(denoiser), places, Wanted(count, first_seed), progress=advance
            )
        return str(target)

    def flexible(self, objective: Mapping[str, Any], patches: str = "all") -> dict[str, Any]:
        """The objective at all patch sizes in turn, if `patches` is "all" and the teacher has several."""
        if patches not in ("all", "own"):
            raise ConfigError(f"patches is 'all' or 'own', not {patches!r}")
        if self._flexible is None:
            self._flexible = len(load(self.teacher).patch_sizes) > 1
        several = patches == "all" and self._flexible
        return {"name": "shared", "own": dict(objective)} if several else dict(objective)

    def train(
        self,
        stage: str,
        model: str | Mapping[str, Any],
        objective: Mapping[str, Any],
        part: TrainPart,
        data: str | Mapping[str, Any],
        **more: Any,
    ) -> str:
        """The model folder of a training run. model: where it starts (a source), or the section of a new network;
        data: a folder of pairs, or the section; more: further top-level settings of the run.
        """
        from pliant.training import parse_config, train

        target = self.folder / stage
        start = {"from": model} if isinstance(model, str) else dict(model)
        if "from" in start:
            start = {"trainable": part.trainable, "lora_rank": part.lora_rank, **start}
        kept = ("steps", "batch_size", "accumulate", "precision", "optimizer", "ema", "checkpoint", "log_every")
        source = {"source": data} if isinstance(data, str) else dict(data)
        tree = {
            "model": start,
            "objective": dict(objective),
            "data": {"flip": part.flip, **source},
            **{name: value for name, value in part.model_dump(mode="json").items() if name in kept},
            "seed": self.seed,
            "output": str(target),
            "resume": "latest",
            **more,
        }
        config = parse_config(tree)
        done = target / "done.json"
        if not done.is_file():  # a finished stage is not even loaded
            self.say(f"{stage}: training, {config.steps} steps of {config.batch_size}")
            train(config, quiet=self.quiet)
            if _is_main():
                write_json(done, config.to_dict())
        return str(target / "model")

    def finish(self, model: str, plan: PlanConfig) -> Denoiser:
        """Write the result with its plan to `model/` in the folder, and return it."""
        denoiser = load(model)
        made = plan.build(denoiser)
        result = replace(denoiser, own_plan=made.to_dict())
        if _is_main():
            native.save(result, self.folder / "model")
        return result

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return _is_main()

    def say(self, text: str) -> None:
        """A line for people about what happens now."""
        if not self.quiet and _is_main():
            print(text, flush=True)


def _open(
    folder: Path, settings: Mapping[str, Any], resume: bool, read: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Create the folder, or find it begun with the same settings."""
    file = folder / SETTINGS
    if file.is_file():
        if not resume and _is_main():
            raise ConfigError(f"{folder} already holds a distillation: continue with --resume, or choose another --out")
        try:
            before = read(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}); choose another --out") from None
        now = json.loads(json.dumps(settings))
        if changed := first_difference(before, now):
            name, old, new = changed
            raise ConfigError(
                f"{folder} was begun with another {name!r} ({old!r}, now {new!r}): resume with the same settings, or "
                f"choose another --out"
            )
        return
    if not _is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if others := [f.name for f in folder.iterdir()]:
            raise ConfigError(f"{folder} is not empty (it holds {others[0]!r}); choose another --out")
        write_json(file, dict(settings))
    except OSError as error:
        raise PliantError(f"cannot create the folder {folder}: {error.strerror or error}") from None


def _placed(source: str) -> Denoiser:
    """A model on this process's device, for inference."""
    from accelerate import PartialState

    denoiser = load(source)
    denoiser.network.requires_grad_(False)
    return denoiser.to(PartialState().device)


def _is_main() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
