"""The throughput table of one model on one machine, as data: read, written, kept between runs, checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pliant.adapters.flexible_dit import FlexiDiT
from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError, PliantError
from pliant.files import write_json
from pliant.models.network import Backbone
from pliant.models.patches import patch_name
from pliant.models.precision import resolve_precision
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.machine import Machine, this_machine

FORMAT, VERSION = "pliant-throughput", 2
CACHE_VARIABLE = "PLIANT_CACHE"

Curves = Mapping[str, Curve]
"""By what is timed."""


@dataclass(frozen=True)
class Throughput:
    """Seconds of the pieces that plans of one model are made of, measured on one machine. See `pricing`."""

    machine: Machine
    model: str
    """`model_key` of the model."""
    name: str = ""
    networks: Mapping[str, Curves] = field(default_factory=dict)
    """By kind of network (`network_kind`): seconds by rows of "call", "ends", "attention", "mlp", ..."""
    outside: Curves = field(default_factory=dict)
    """What happens around the calls: seconds by images of "step", "guided", "update", "term", "noise", "begin"."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """"date", "seconds" it took, by what share calls differed from pass to pass ("spread"); for people."""

    def with_more(self, other: Throughput) -> Throughput:
        """Both tables' measurements, the other's where both have one."""
        networks = {kind: {**self.networks.get(kind, {}), **other.networks.get(kind, {})}
                    for kind in {**self.networks, **other.networks}}  # fmt: skip
        outside = {**self.outside, **other.outside}
        return replace(self, networks=networks, outside=outside, measured={**self.measured, **other.measured})

    def scaled(self, factor: float, facts: Mapping[str, Any]) -> Throughput:
        """Every second times a factor; facts: added to what is said of the measurement."""

        def times(curves: Curves) -> dict[str, Curve]:
            return {unit: curve.scaled(factor) for unit, curve in curves.items()}

        networks, outside = {kind: times(curves) for kind, curves in self.networks.items()}, times(self.outside)
        return replace(self, networks=networks, outside=outside, measured={**self.measured, **facts})

    def check(self, model: Denoiser, machine: Machine | None = None) -> None:
        """Raise PlanError unless this is a table of this model and of the machine that runs this (or the given one)."""
        here = machine or this_machine(model.device)
        if differences := self.machine.differences(here):
            raise PlanError(
                f"this throughput table is of another machine ({self.machine.describe()}; here: "
                f"{', '.join(differences)}); measure this one with 'pliant bench MODEL'"
            )
        if self.model != (key := model_key(model)):
            raise PlanError(
                f"this throughput table is of another model ({self.name or '?'}, {self.model}; this one is {key}); "
                f"measure this one with 'pliant bench MODEL'"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine.to_dict(),
            "model": self.model,
            "name": self.name,
            "measured": dict(self.measured),
            "outside": {unit: curve.to_list() for unit, curve in self.outside.items()},
            "networks": {
                kind: {unit: curve.to_list() for unit, curve in curves.items()}
                for kind, curves in self.networks.items()
            },
        }

    @staticmethod
    def from_dict(data: Any) -> Throughput:
        """Inverse of `to_dict`. Raises PlanError for another format or version, or damaged content."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f'this is not a throughput table: expected a JSON object with "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise PlanError(
                f"this throughput table has version {data.get('version')!r}; this Pliant reads {VERSION}: measure "
                f"again with 'pliant bench MODEL'"
            )
        try:
            return Throughput(
                Machine.from_dict(data["machine"]),
                str(data["model"]),
                str(data.get("name", "")),
                {
                    kind: {unit: Curve.from_list(points) for unit, points in curves.items()}
                    for kind, curves in data["networks"].items()
                },
                {unit: Curve.from_list(points) for unit, points in data["outside"].items()},
                dict(data.get("measured") or {}),
            )
        except (KeyError, AttributeError, TypeError, PliantError) as error:
            raise PlanError(f"this throughput table is damaged ({error}); measure again with 'pliant bench'") from None

    def save(self, file: str | Path) -> None:
        """Write the table as JSON, atomically."""
        write_json(file, self.to_dict())

    @staticmethod
    def load(file: str | Path) -> Throughput:
        """Read a table. Raises PlanError if it is missing, not JSON, or not a table."""
        try:
            return Throughput.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise PlanError(f"throughput table {file} does not exist; make it: pliant bench MODEL -o {file}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"throughput table {file} is not readable JSON ({error})") from None


def model_key(model: Denoiser) -> str:
    """12 hex digits of what decides how fast a model runs: its networks' structure and stored number format."""
    facts: list[Any] = [model.identity()["network"], model.sample_shape, str(next(model.network.parameters()).dtype)]
    if model.guide is not None:
        facts.append(model_key(model.guide))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def network_kind(model: Denoiser, compute: Compute, guide: bool = False) -> str:
    """The kind of network a call runs, on which its speed depends: patch, scale, precision, whether adapters are
    merged. An exit runs the same blocks, fewer of them. `guide`: the model is another's guide.
    """
    words = ["guide"] if guide else []
    words.append(patch_name(model.patch_of(compute)))
    if compute.scale is not None:
        words.append(f"scale {compute.scale.describe()}")
    if runs_unmerged(model, compute):
        words.append("unmerged")
    else:
        words.append(resolve_precision(compute.precision, plain_core(model)))
    return " ".join(words)


def runs_unmerged(model: Denoiser, compute: Compute) -> bool:
    """Whether a call runs the weights as they are stored, adapters beside them."""
    core = model.core
    return isinstance(core, FlexiDiT) and (not compute.merged or core.spec.norm == "layernorm")


def plain_core(model: Denoiser) -> Backbone:
    """The bare network under adapters, exits and routers."""
    core = model.core
    return core.base if isinstance(core, FlexiDiT) else core


# Between runs ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where measurements are kept: `$PLIANT_CACHE`, or ~/.cache/pliant."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "pliant").expanduser()


def cache_file(model: Denoiser) -> Path:
    """Where the table of this model on this machine is kept."""
    return cache_folder() / "throughput" / f"{model_key(model)}-{this_machine(model.device).digest()}.json"


def cached_table(model: Denoiser) -> Throughput | None:
    """The table kept for this model and machine; None if there is none, or it cannot be read."""
    file = cache_file(model)
    if not file.exists():
        return None
    try:
        table = Throughput.load(file)
        table.check(model)
    except PlanError:
        return None
    return table
