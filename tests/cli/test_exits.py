"""`pliant exits`."""

from __future__ import annotations

from pathlib import Path

import pytest

import pliant
from pliant.training import load_config
from support.cli import Run
from support.networks import tiny_denoiser


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "deep"
    pliant.save(tiny_denoiser(in_channels=1, depth=4), folder)
    return folder


def test_exits_and_what_to_do_next(deep: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    done = run("exits", deep, out, "--depths", "3, 1", "--gates", "zero", "--json").json
    model = pliant.load(out)
    assert model.exit_depths == (1, 3)
    assert done["new_parameters"] == sum(p.numel() for p in model.network.exits.parameters())  # type: ignore[union-attr]
    shares = {c.get("exit"): c["flops"] for c in done["calls"]}
    assert shares == {e: model.flops(pliant.Compute(exit=e)) for e in (None, 1, 3)}
    assert done["calls"] == run("info", out, "--json").json["calls"]
    config = load_config(done["finetune_config"], ["data.source=digits"])
    assert config.objective.name == "exits" and config.model.from_ == str(out)
    assert "early exits after 1, 3 of 4 blocks" in run("info", out).out


def test_exits_alone(deep: Path, tmp_path: Path, run: Run) -> None:
    assert "new" in run("exits", deep, tmp_path / "alone", "--depths", "2", "--adapter-only").out
    assert pliant.load_adapter(pliant.load(deep), tmp_path / "alone").exit_depths == (2,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--depths", "4"], "1 to 3"),
        (["--depths", "two"], "cannot read the depths 'two'"),
        (["--depths", "2", "--gates", "none"], "gates='none' is unknown"),
    ],
)
def test_refused(options: list[str], words: str, deep: Path, tmp_path: Path, run: Run) -> None:
    done = run("exits", deep, tmp_path / "x", *options)
    assert done.code == 2 and words in done.err and len(done.err.splitlines()) == 1
