"""A dataclass of options is one parameter of a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from pliant.cli.option_groups import grouped


@dataclass(frozen=True)
class Fruit:
    apples: Annotated[int, typer.Option("--apples", min=0, help="How many.")] = 2
    kind: Annotated[str | None, typer.Option("--kind", show_default=False)] = None


heard: list[tuple[str, Fruit, bool]] = []


def buy(where: str, fruit: Fruit = Fruit(), now: bool = False) -> None:
    """Buy fruit."""
    heard.append((where, fruit, now))


def run(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(grouped(buy))
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.output


def test_fields_are_options() -> None:
    heard.clear()
    assert run("market")[0] == 0
    assert run("shop", "--kind", "sweet", "--now", "--apples", "5")[0] == 0
    assert heard == [("market", Fruit(), False), ("shop", Fruit(5, "sweet"), True)]


def test_ranges_and_help_are_kept() -> None:
    code, words = run("shop", "--apples", "-1")
    assert code == 2 and "--apples" in words
    words = run("--help")[1]
    assert words.index("Buy fruit") < words.index("--apples") < words.index("How many") < words.index("--now")


def test_a_name_twice_is_refused() -> None:
    def twice(apples: int = 1, fruit: Fruit = Fruit()) -> None:
        pass

    with pytest.raises(TypeError, match="'apples' twice"):
        grouped(twice)
