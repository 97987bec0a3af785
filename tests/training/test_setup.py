"""From configuration to denoiser, objective and data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pliant import PliantError
from pliant.formats import native
from pliant.training import setup, setup_data
from pliant.training.data import digits
from pliant.training.objectives import DDPM, FlowMatching, MMDBootstrap, PatchDistillation, SharedPatches
from support.training import TINY_DIT, equal_states, tiny_config


def test_new_weights_depend_on_the_seed_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = setup.build_denoiser(tiny_config(tmp_path)).network.state_dict()
    torch.manual_seed(2)
    b = setup.build_denoiser(tiny_config(tmp_path)).network.state_dict()
    assert equal_states(a, b)
    assert not equal_states(a, setup.build_denoiser(tiny_config(tmp_path, seed=4)).network.state_dict())


def test_defaults_follow_the_objective(tmp_path: Path) -> None:
    flow = setup.build_denoiser(tiny_config(tmp_path))
    assert (flow.path.name, flow.prediction, flow.config.learn_sigma) == ("linear", "velocity", False)
    assert flow.network_time.scale == 1000.0
    ddpm = setup.build_denoiser(tiny_config(tmp_path, objective={"name": "ddpm"}))
    assert (ddpm.path.name, ddpm.prediction, ddpm.config.learn_sigma) == ("vp-discrete", "epsilon", True)
    # DiT's integers: the first table entry is 0, the last 999.
    assert float(ddpm.network_time.encode(torch.tensor(1.0))) == 999.0


def test_a_named_size_can_be_changed(tmp_path: Path) -> None:
    dit = {"name": "DiT-S/4", "depth": 1, "input_size": [8, 8], "in_channels": 1, "num_classes": 10}
    config = setup.build_denoiser(tiny_config(tmp_path, model={"dit": dit})).config
    assert (config.patch_size, config.width, config.depth) == ((4, 4), 384, 1)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ({"name": "flow_matching", "time": {"name": "logit-normal", "mean": 0.5}}, FlowMatching),
        ({"name": "ddpm"}, DDPM),
        ({"name": "shared", "mmd": {"weight": 0.2}}, SharedPatches),
        ({"name": "shared", "own": {"name": "ddpm"}}, SharedPatches),
        ({"name": "distill", "time": "cosmap"}, PatchDistillation),
    ],
)
def test_objectives(objective: dict[str, Any], kind: type, tmp_path: Path) -> None:
    flexible = objective["name"] in ("shared", "distill")
    recipe = "shared" if objective["name"] == "shared" else "lora"
    extra = {"flexify": {"patch_sizes": [8], "recipe": recipe}} if flexible else {}
    config = tiny_config(tmp_path, model={"dit": TINY_DIT, **extra}, objective=objective)
    built = setup.build_objective(config, setup.build_denoiser(config))
    assert isinstance(built, kind)
    if isinstance(built, SharedPatches) and "mmd" in objective:
        assert built.mmd == MMDBootstrap(weight=0.2)
    if isinstance(built, FlowMatching):
        assert built.class_dropout == 0.1


def test_recipe_lora_freezes_the_base(tmp_path: Path) -> None:
    native.save(setup.build_denoiser(tiny_config(tmp_path)), tmp_path / "base")
    model = {"from": str(tmp_path / "base"), "flexify": {"patch_sizes": [8], "options": {"rank": 2}}}
    denoiser = setup.build_denoiser(tiny_config(tmp_path, model=model, objective={"name": "distill"}))
    names = {name.split(".")[0] for name, p in denoiser.network.named_parameters() if p.requires_grad}
    assert names == {"modes"}
    assert denoiser.network.spec.rank == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "lineer"}, "did you mean 'linear'"),
        ({"prediction": "noise"}, "unknown prediction"),
        ({"model": {"dit": {"widht": 3}}}, "did you mean 'width'"),
        ({"objective": {"name": "flow_matching", "time": "uniforn"}}, "did you mean 'uniform'"),
        ({"objective": {"name": "ddpm"}, "path": "linear"}, "vp-discrete"),
        ({"objective": {"name": "distill"}}, "flexible"),
        ({"model": {"dit": {**TINY_DIT, "class_dropout": 0.0}}, "objective": {"class_dropout": 0.1}}, "null label"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "name" not in changes.get("objective", {"name": ""}):
        changes = {**changes, "objective": {"name": "flow_matching", **changes["objective"]}}
    with pytest.raises(PliantError, match=message):
        config = tiny_config(tmp_path, **changes)
        setup.build_objective(config, setup.build_denoiser(config))


def test_data_must_fit_the_model(tmp_path: Path) -> None:
    denoiser = setup.build_denoiser(tiny_config(tmp_path, model={"dit": {**TINY_DIT, "num_classes": 5}}))
    with pytest.raises(PliantError, match="labels up to 9"):
        setup_data.check_data(digits(1, (8, 8)), denoiser)
    with pytest.raises(PliantError, match="samples of"):
        setup_data.check_data(digits(3, (8, 8)), denoiser)
