"""Wrong solvers and grids from the command line: exit code 2 and one line that says what to do (issue 3, item 5)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import Run, refused

SOLVERS = [
    ("multistep:order=0", ["orders 1 to 6", "got 0"]),
    ("multistep:order=7", ["orders 1 to 6", "got 7"]),
    ("unipc-2:order=0", ["orders 1 to 5", "got 0"]),
    ("dpmpp-2s:order=7", ["orders 1 to 3", "got 7"]),
    ("plms:order=7", ["orders 1 to 4", "got 7"]),
    ("dpmp-2m", ["'dpmpp-2m'"]),
    ("unipc-3:B=bh3", ["'bh2'"]),
    ("ddim:etta=1", ["'eta'"]),
    ("heun:method=huen", ["'heun'"]),
]


@pytest.mark.parametrize("command", ["plan", "sample"])
@pytest.mark.parametrize(("solver", "words"), SOLVERS)
def test_wrong_solvers(command: str, solver: str, words: list[str], plain: Path, run: Run) -> None:
    refused(run(command, plain, "--steps", 4, "--solver", solver), *words)


def times(*values: float) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        for step, t in zip(plan["steps"], values, strict=False):
            step["t"] = t
        plan["end"] = values[-1]

    return change


def solver(**config: Any) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        for step in plan["steps"]:
            step["solver"] = config

    return change


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        for one in changes:
            one(plan)

    return change


FILES = {
    "repeated": (times(1.0, 0.5, 0.5, 0.2, 0.0), ["both 0.5"]),
    "turning": (times(1.0, 0.4, 0.6, 0.2, 0.0), ["turns back"]),
    "outside": (times(1.5, 0.7, 0.5, 0.2, 0.0), ["between 0", "1.5"]),
    "inverted-sde": (both(times(0.1, 0.3, 0.5, 0.7, 0.9), solver(name="ddim", eta=1.0)), ["ddim", "inversion"]),
    "order": (solver(name="unipc-3", order=7), ["orders 1 to 5"]),
    "order-0": (solver(name="dpmpp-2m", order=0), ["orders 1 to 6"]),
    "name": (solver(name="unipc3"), ["'unipc-3'"]),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_plan_files(case: str, plain: Path, tmp_path: Path, run: Run) -> None:
    change, words = FILES[case]
    file = tmp_path / "plan.json"
    assert run("plan", plain, "--steps", 4, "-o", file).code == 0
    plan = json.loads(file.read_text())
    change(plan)
    file.write_text(json.dumps(plan))
    refused(run("sample", plain, "--plan", file), *words)
    refused(run("plan", plain, "--show", file), *words)
