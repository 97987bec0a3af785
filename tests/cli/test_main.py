"""The program as a whole: help, exit codes, streams, start-up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.cli import Run, refused

VERBS = ("demo", "info", "convert", "flexify", "train", "plan", "sample", "stream", "eval")


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_and_options(verb: str, run: Run) -> None:
    done = run(verb, "--help")
    assert done.code == 0
    assert f"Usage: pliant {verb}" in done.out
    assert "Examples:" in done.out
    assert f"  pliant {verb} " in done.out or f"  pliant {verb}\n" in done.out
    assert "--json" in done.out
    assert done.err == ""


def test_help_lists_all_verbs(run: Run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        done = run(*arguments)
        assert done.code == 0
        for verb in VERBS:
            assert f"  {verb} " in done.out


def test_version(run: Run) -> None:
    import pliant

    assert run("--version").out == f"pliant {pliant.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampl"], ["sampl", "pliant --help"]),
        (["sample", "--stepz", "3"], ["--stepz", "pliant sample --help"]),
        (["sample", "x", "--steps", "many"], ["--steps", "pliant sample --help"]),
        (["sample", "x", "--steps", "0"], ["--steps"]),
        (["info"], ["MODEL|PLAN|PNG", "pliant info --help"]),
        (["eval", "x"], ["--reference"]),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], words: list[str], run: Run) -> None:
    refused(run(*arguments), *words)


def test_interruption(monkeypatch: pytest.MonkeyPatch, run: Run, plain: Path) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pliant.formats.describe_source", stop)
    done = run("info", plain)
    assert (done.code, done.out) == (130, "")
    assert done.err.strip() == "interrupted"


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, run: Run, plain: Path) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("pliant.formats.describe_source", fail)
    with pytest.raises(ZeroDivisionError):
        run("info", plain)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from pliant.cli import main; main(['sample', '--help']);"
        "print([m for m in ('torch', 'numpy', 'PIL', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_as_a_process(plain: Path) -> None:
    """`python -m pliant.cli`: exit codes and streams of the real thing."""
    command = [sys.executable, "-m", "pliant.cli", "info"]
    good = subprocess.run([*command, str(plain), "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("{")
    bad = subprocess.run([*command, "nowhere"], capture_output=True, text=True, timeout=120, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error(plain: Path) -> None:
    command = f"{sys.executable} -m pliant.cli plan --schema | head -c 10 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "0"
    assert done.stderr == ""
