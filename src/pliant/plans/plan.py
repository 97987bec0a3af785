"""A plan: every decision of one sampling run, step by step, as data to be read, versioned, shared and replayed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, TypeVar

from pliant.compute import Compute
from pliant.compute.numbers import is_number
from pliant.denoiser import Denoiser
from pliant.errors import PlanError, PliantError, suggest
from pliant.files import write_json
from pliant.guidance import Guidance
from pliant.paths import Path, path_from_config
from pliant.plans.calls import check_references, check_reuse, reuses
from pliant.plans.checks import check_step
from pliant.plans.cost import PlanCost, plan_cost
from pliant.plans.refining import check_refining
from pliant.plans.times import Times
from pliant.solvers import Program, Solver, SolverLike, compile_program, get_solver

if TYPE_CHECKING:
    from pliant.plans.budget import Budget
    from pliant.plans.timing import Throughput

T = TypeVar("T")
FORMAT, VERSION = "pliant-plan", 1


@dataclass(frozen=True)
class Step:
    """One step: where it starts, how the state is updated, how much network each call may use, and guidance."""

    t: float
    """House time at which the step starts; it ends where the next one starts."""
    solver: Solver
    compute: Compute = field(default_factory=Compute)
    guidance: Guidance | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "t": self.t,
            "solver": self.solver.to_config(),
            "compute": self.compute.to_dict(),
            "guidance": self.guidance.to_dict() if self.guidance else None,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Step:
        _known_keys(data, ("t", "solver", "compute", "guidance"))
        compute, guidance = data.get("compute"), data.get("guidance")
        if not is_number(data["t"]):
            raise PlanError(f"t is {data['t']!r}; expected a time, 0 (data) to 1 (noise)")
        return Step(
            float(data["t"]),
            get_solver(data["solver"]),
            Compute() if compute is None else Compute.from_dict(compute),
            None if guidance is None else Guidance.from_dict(guidance),
        )


@dataclass(frozen=True)
class Plan:
    """Steps in order of sampling, the path they are for, and the model they were made for.

    Serialisable (`save`, `load`), exact in cost before running (`cost`), runnable (`pliant.sample`).
    """

    steps: tuple[Step, ...]
    path: Path
    end: float = 0.0
    """House time at which the last step arrives; 0 is clean data."""
    model: dict[str, Any] = field(default_factory=dict)
    """{"fingerprint": ..., "name": ...} of the model it was made for; empty: for any."""
    reset_history_on_switch: bool = False
    """Multistep solvers forget earlier outputs where the patch size changes (default: they keep them)."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made; for people."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlanError("a plan needs at least one step")
        object.__setattr__(self, "steps", tuple(self.steps))

    # Making plans -------------------------------------------------------------------------------------------------

    @staticmethod
    def uniform(
        model: Denoiser,
        steps: int = 50,
        solver: SolverLike = "dpmpp-2m",
        compute: Compute | None = None,
        guidance: float | Guidance | None = None,
        times: Times = None,
    ) -> Plan:
        """The same solver, compute and guidance at every step.

        times: steps+1 house times, or a grid of `pliant.paths.GRIDS` by name ("karras") or with options ({"name":
        "shifted", "shift": 3}); "resolution" shifts by the model's size; by default the path's own.
        """
        from pliant.plans.presets import uniform

        return uniform(model, steps, solver, compute, guidance, times)

    @staticmethod
    def weak_to_powerful(
        model: Denoiser, steps: int = 50, budget: float | str | Budget | None = None, **options: Any
    ) -> Plan:
        """Weak (coarse-patch) steps first, powerful ones last: `budget=0.6`, `"30 GFLOP"`, `"2.0 s"`, ...

        See `pliant.plans.presets.weak_to_powerful`.
        """
        from pliant.plans.presets import weak_to_powerful

        return weak_to_powerful(model, steps, budget, **options)

    @staticmethod
    def own(model: Denoiser) -> Plan | None:
        """The plan that a few-step model was made for and carries beside its weights; None for other models.

        Raises PlanError if what it carries is not a plan, or not one for it.
        """
        if model.own_plan is None:
            return None
        plan = Plan.from_dict(model.own_plan)
        plan.check(model)
        return plan

    def with_steps(self, steps: Iterable[Step]) -> Plan:
        """The same plan with other steps; what was measured of this one, "score" of its provenance, does not go along.
        """
        changed = replace(self, steps=tuple(steps))
        if changed.steps == self.steps or "score" not in self.provenance:
            return changed
        return changed.noting(score=None)

    def noting(self, **facts: Any) -> Plan:
        """The same plan with more in its provenance; None takes a fact away."""
        noted = {**self.provenance, **facts}
        return replace(self, provenance={k: v for k, v in noted.items() if v is not None})

    def cached(self, model: Denoiser, name: str, calibrate: int | None = None, **options: Any) -> Plan:
        """This plan with a caching preset, e.g. `plan.cached(model, "teacache", threshold=0.2)`.

        See `pliant.plans.caching.with_caching`.
        """
        from pliant.plans.caching import with_caching

        return with_caching(self, model, name, calibrate, **options)

    def freeze(self, model: Denoiser, cond: Sequence[int], seeds: Sequence[int] | None = None) -> Plan:
        """The static plan of what this plan's gates decide on these samples. See `pliant.plans.caching.freeze`."""
        from pliant.plans.caching import freeze

        return freeze(self, model, cond, list(range(len(cond))) if seeds is None else seeds)

    # What it says -------------------------------------------------------------------------------------------------

    @property
    def times(self) -> list[float]:
        """The time grid: every step's start, then the end."""
        return [*(s.t for s in self.steps), self.end]

    def program(self, model: Denoiser) -> Program:
        """This plan compiled for a model's prediction kind. Raises PlanError for an impossible grid or step."""
        switches: list[int] = []
        if self.reset_history_on_switch:
            pairs = zip(self.steps, self.steps[1:], strict=False)
            switches = [i + 1 for i, (a, b) in enumerate(pairs) if a.compute.patch != b.compute.patch]
        solvers = [s.solver for s in self.steps]
        return compile_program(self.path, self.times, solvers, model.prediction, model.config.learn_sigma, switches)

    def check(self, model: Denoiser) -> None:
        """Raise PlanError, naming the step at fault, unless `model` can run this plan."""
        wanted = self.model.get("fingerprint")
        if wanted and wanted != model.fingerprint():
            name = self.model.get("name") or "a model"
            raise PlanError(
                f"this plan was made for {name} ({wanted}), not for this model ({model.fingerprint()}): they differ in "
                f"architecture, path or prediction. Make a plan for this model with 'pliant plan'"
            )
        if self.path != model.path:
            raise PlanError(f"this plan follows the path {self.path.to_config()}, the model {model.path.to_config()}")
        for i, step in enumerate(self.steps):
            try:
                check_step(step, model)
            except PliantError as error:
                raise PlanError(f"step {i} (t={step.t:g}): {error}") from None
        check_references(self, model)
        program = self.program(model)  # the times may turn back, or a solver not work on them
        check_refining(self, program, model)
        jumps = [e.step for e in program.evaluations if e.lands is not None]
        if jumps and not model.config.flow_map:
            raise PlanError(
                f"step {jumps[0]} (t={self.steps[jumps[0]].t:g}): the solver 'jump' is for flow maps, which are told "
                f"where a step lands; this network is not. Use 'ddim', or distil it with pliant distill"
            )
        if reuses(self):
            check_reuse(self, program, model)

    def cost(self, model: Denoiser, batch: int | None = None, throughput: Throughput | None = None) -> PlanCost:
        """Exact FLOPs per image, and as a share of the same plan run at full compute.

        batch: also the bytes of so many images at once; throughput: a table of this model and machine
        (`pliant.plans.timing`), for seconds. Both are in `PlanCost.batch`.
        """
        return plan_cost(self, model, batch=batch, throughput=throughput)

    def describe(self, model: Denoiser, batch: int = 1, throughput: Throughput | None = None) -> str:
        """A table of the steps with their FLOPs; equal neighbours are joined. Seconds of `batch` images are predicted
        from a throughput table: the given one, or what `pliant bench` measured on this machine.
        """
        from pliant.plans.describe import describe

        return describe(self, model, batch, throughput)

    # Files --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "path": self.path.to_config(),
            "end": self.end,
            "reset_history_on_switch": self.reset_history_on_switch,
            "provenance": self.provenance,
            "steps": [s.to_dict() for s in self.steps],
        }

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Inverse of `to_dict`. Raises PlanError for another format or version, unknown fields, or a bad step."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"this is not a plan: expected a JSON object with \"format\": \"{FORMAT}\"")
        if data.get("version") != VERSION or isinstance(data["version"], bool):
            raise PlanError(f"this plan has version {data.get('version')!r}; this Pliant reads version {VERSION}")
        known = ("format", "version", "model", "path", "end", "reset_history_on_switch", "provenance", "steps")
        _known_keys(data, known)
        for key in ("path", "steps"):
            if key not in data:
                raise PlanError(f"this plan lacks the field {key!r}")
        if not isinstance(data["steps"], list):
            raise PlanError("the field 'steps' of a plan is a list of steps")
        steps = []
        for i, step in enumerate(data["steps"]):
            try:
                steps.append(Step.from_dict(step))
            except KeyError as error:
                raise PlanError(f"step {i} of the plan lacks the field {error.args[0]!r}") from None
            except (PliantError, TypeError, ValueError) as error:
                raise PlanError(f"step {i} of the plan: {error}") from None
        end = data.get("end", 0.0)
        if not is_number(end):
            raise PlanError(f"a plan ends at a time, got end {end!r}")
        for key in ("path", "model", "provenance"):
            if data.get(key) is not None and not isinstance(data[key], dict):
                raise PlanError(f"the field {key!r} of a plan is an object, got {data[key]!r}")
        if not isinstance(fingerprint := (data.get("model") or {}).get("fingerprint", ""), str):
            raise PlanError(f"the fingerprint of a plan's model is a text, got {fingerprint!r}")
        resets = data.get("reset_history_on_switch", False)
        if not isinstance(resets, bool):
            raise PlanError(f"the field 'reset_history_on_switch' of a plan is true or false, got {resets!r}")
        return Plan(
            steps=tuple(steps),
            path=path_from_config(data["path"]),
            end=float(end),
            model=dict(data.get("model") or {}),
            reset_history_on_switch=resets,
            provenance=dict(data.get("provenance") or {}),
        )

    def save(self, file: str | FilePath) -> None:
        """Write the plan as JSON, atomically."""
        write_json(file, self.to_dict())

    @staticmethod
    def load(file: str | FilePath) -> Plan:
        """Read a plan file. Raises PlanError if it is missing, not JSON, or not a plan."""
        return from_file(file, Plan.from_dict)

    def digest(self) -> str:
        """12 hex digits of what the plan does (not of where it came from): equal digests sample equally."""
        content = {k: v for k, v in self.to_dict().items() if k != "provenance"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def from_file(file: str | FilePath, read: Callable[[Any], T]) -> T:
    """What `read` makes of a JSON file. Raises PlanError, naming the file."""
    try:
        data = json.loads(FilePath(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"plan file {file} does not exist; make one with 'pliant plan'") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"plan file {file} is not readable JSON ({error})") from None
    try:
        return read(data)
    except PliantError as error:
        raise PlanError(f"{file}: {error}") from None


def made_for(model: Denoiser) -> dict[str, Any]:
    """The `model` field of a plan for this model."""
    return {"fingerprint": model.fingerprint(), "name": model.metadata.get("name", "")}


def _known_keys(data: Any, known: Sequence[str]) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"expected an object with the fields {', '.join(known)}, got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise PlanError(f"unknown field {key!r}: {suggest(str(key), known)}")
