"""Training with compiled blocks is the same training, leaves the same names, and resumes exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pliant.errors import ConfigError
from pliant.training import compiling, parse_config, setup, train
from pliant.training.trainer import TrainResult
from support.training import equal_states, packs, pictures, tiny_config


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.model_folder / "model.safetensors")


def same_training(tree: dict[str, Any], output: Path, within: float) -> None:
    def run(name: str, **changes: Any) -> TrainResult:
        return train(parse_config({**tree, "output": str(output / name), **changes}), quiet=True)

    plain, compiled = run("plain"), run("compiled", compile=True)
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
    a, b = weights(plain), weights(compiled)
    assert a.keys() == b.keys()
    assert all(float((a[k] - b[k]).abs().max()) < within for k in a)
    assert all("attend" not in vars(m) and m._compiled_call_impl is None for m in compiled.denoiser.network.modules())
    run("halves", compile=True, steps=tree["steps"] // 2)
    resumed = run("halves", compile=True, resume="latest")
    assert equal_states(weights(resumed), b)


@pytest.mark.parametrize("kind", ["dit", pytest.param("packs", marks=pytest.mark.slow)])
def test_compiled_training_is_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    dit = tiny_config(tmp_path, steps=4).to_dict()
    data = pictures(tmp_path / "data")
    same_training(dit if kind == "dit" else packs(data, tmp_path, checkpointing=False), tmp_path, 1e-4)


@pytest.mark.slow
def test_inductor_training_is_the_same(tmp_path: Path) -> None:
    same_training(tiny_config(tmp_path, steps=4).to_dict(), tmp_path, 1e-3)


def test_blocks_are_compiled_and_plain_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    tree = packs(tmp_path, tmp_path)
    network = setup.build_denoiser(parse_config(tree)).network
    names, block = list(network.state_dict()), network.blocks[0]  # type: ignore[index,union-attr]
    compiling.compile_blocks(network)
    assert list(network.state_dict()) == names
    assert block._compiled_call_impl is not None and "attend" in vars(block)
    compiling.plain_blocks(network)
    assert block._compiled_call_impl is None and "attend" not in vars(block)
    assert copy.deepcopy(block).attend.__self__ is not block


def test_networks_without_blocks_say_so() -> None:
    with pytest.raises(ConfigError, match="compile is for networks of transformer blocks"):
        compiling.compile_blocks(torch.nn.Linear(2, 2))
