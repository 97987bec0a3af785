"""The configuration tree: what is accepted, and how refusals read."""

from pathlib import Path
from typing import Any

import pytest

from pliant.errors import ConfigError
from pliant.training.config import load_config, parse_config

GOOD: dict[str, Any] = {
    "model": {"dit": {"name": "DiT-S/2"}},
    "data": {"source": "digits"},
    "steps": 10,
    "batch_size": 4,
    "output": "runs/x",
}
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_recipes_parse(file: Path) -> None:
    assert parse_config(load_config(file).to_dict()) == load_config(file)


def test_defaults() -> None:
    config = parse_config(GOOD)
    assert config.objective.name == "flow_matching"
    assert config.optimizer.betas == (0.9, 0.999)
    assert parse_config(config.to_dict()) == config


def test_overrides(tmp_path: Path) -> None:
    text = "model: {from: some/folder}\ndata: {source: digits}\nsteps: 10\nbatch_size: 4\noutput: o\nema: null\n"
    file = write(tmp_path, text.replace("ema: null\n", ""))
    config = load_config(file, ["optimizer.lr=3e-4", "objective={name: distill}", "objective.variance_weight=0"])
    assert config.optimizer.lr == 3e-4
    assert config.objective.name == "distill"
    assert config.model.from_ == "some/folder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, r"unknown config key 'stepz': did you mean 'steps'"),
        ({"optimizer": {"rate": 1}}, r"'rate' in optimizer"),
        ({"objective": {"name": "flow_matching", "tim": 1}}, r"'tim' in objective: did you mean 'time'"),
        ({"objective": {"name": "flow_matchin"}}, r"objective.name is 'flow_matchin': did you mean 'flow_matching'"),
        ({"objective": {"name": "shared", "own": {"name": "ddpm", "x": 1}}}, r"'x' in objective.own"),
        ({"objective": {"name": "shared", "mmd": {"wieght": 1}}}, r"did you mean 'weight'"),
        ({"steps": 0}, r"config key steps: .*greater than or equal to 1, got 0"),
        ({"objective": {"name": "ddpm", "class_dropout": 2}}, r"config key objective.class_dropout"),
        ({"model": {}}, r"config key model: give one of"),
        ({"model": {"from": "x"}, "path": "linear"}, r"brings its own"),
        ({"data": {}}, r"config key data.source: Field required"),
        ({"optimizer": 3}, r"config key optimizer"),
    ],
)
def test_refusals_are_one_clear_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as info:
        parse_config({**GOOD, **change})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1", [], "not valid YAML"),
        ("- 1", [], "top level"),
        ("steps: 1", ["steps"], "key.sub=value"),
        ("steps: 1", ["steps.x=1"], "not a section"),
    ],
)
def test_bad_files_and_overrides(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
