"""Which machine a time was measured on: what must agree before the time means anything."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pliant.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """The hardware that computes and the library that drives it."""

    processor: str
    """Model name of the CPU."""
    cores: int
    """Logical CPUs that this process may use."""
    threads: int
    """Threads that PyTorch computes with."""
    device: str
    """"cpu", or the name of the accelerator."""
    torch: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Machine:
        """Inverse of `to_dict`. Raises ConfigError."""
        try:
            return Machine(**data)
        except TypeError as error:
            raise ConfigError(f"this is not the description of a machine: {error}") from None

    def describe(self) -> str:
        """e.g. `AMD EPYC, 2 cores, 1 thread, torch 2.13.0`."""
        accelerator = "" if self.device == "cpu" else f"{self.device}, "
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        return f"{accelerator}{self.processor}, {cores}, {threads}, torch {self.torch}"

    def differences(self, other: Machine) -> list[str]:
        """What another machine has that this one has not: `threads 2, not 1`."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{name} {theirs[name]}, not {mine[name]}" for name in mine if mine[name] != theirs[name]]

    def digest(self) -> str:
        """8 hex digits, for file names."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]


def this_machine(device: torch.device | str = "cpu") -> Machine:
    """The machine that runs this, computing on a device."""
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(_processor(), cores, torch.get_num_threads(), name, torch.__version__)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
