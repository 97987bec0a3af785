"""Whole runs of the objectives that `pliant train` gained with distillation, each a few steps on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.adapters.transport import transport
from pliant.distillation.pairs import Wanted, generate_pairs
from pliant.errors import ConfigError, DataError
from pliant.plans import sample, uniform
from pliant.training import train
from pliant.training.data import PairSet
from pliant.training.data import pairs as pairs_module
from pliant.training.draws import Draws
from support.networks import tiny_denoiser
from support.training import tiny_config

DIGITS: dict[str, Any] = {"source": "digits", "limit": 20}


@pytest.mark.parametrize("name", ["edm", "pfgmpp"])
def test_preconditioned_networks_train_and_sample(name: str, tmp_path: Path) -> None:
    """EDM's loss on EDM's path and, with heavy tails, on PFGM++'s; sampled by EDM's Heun on the path's own grid."""
    path = {"name": name, **({"dimensions": 128} if name == "pfgmpp" else {})}
    config = tiny_config(tmp_path, path=path, preconditioning={"kind": "edm"}, objective={"name": "edm"})
    result = train(config, quiet=True)
    model = pliant.load(result.model_folder)
    assert model.preconditioning is not None and model.prediction == "sample" and model.path.name == name
    images = sample(model, uniform(model, 4, "heun-edm"), [0, 1])
    assert bool(torch.isfinite(images).all())
    with pytest.raises(ConfigError, match="preconditioned"):
        train(tiny_config(tmp_path / "plain", path=path, objective={"name": "edm"}), quiet=True)


def test_domain_transfer(tmp_path: Path) -> None:
    """Two data sets as ends of the linear path: samples start from the other set's images."""
    config = tiny_config(
        tmp_path,
        data={**DIGITS, "opposite": "digits"},
        objective={"name": "flow_matching", "coupling": {"name": "stored"}},
    )
    model = train(config, quiet=True).denoiser
    start = torch.zeros(2, *model.sample_shape)
    assert sample(model, uniform(model, 3, "euler"), [0, 1], x=start).shape == start.shape


@pytest.mark.parametrize("prediction", ["velocity", "score", "epsilon"])
def test_interpolants(prediction: str, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        path={"name": "interpolant", "kind": "linear"},
        prediction=prediction,
        data={**DIGITS, "opposite": "digits"},
        objective={"name": "interpolant"},
    )
    result = train(config, quiet=True)
    again = pliant.load(result.model_folder)
    assert again.path.to_config()["name"] == "interpolant"
    if prediction == "velocity":
        flow, start = transport(again), torch.zeros(2, *again.sample_shape)
        assert sample(flow, uniform(flow, 3, "heun"), [0, 1], x=start).shape == start.shape
    with pytest.raises(ConfigError, match="needs pairs"):
        alone = {"path": {"name": "interpolant"}, "objective": {"name": "interpolant"}, "data": DIGITS}
        train(tiny_config(tmp_path / "one", **alone), quiet=True)


def test_optimal_transport(tmp_path: Path) -> None:
    coupling = {"name": "optimal-transport"}
    result = train(tiny_config(tmp_path, objective={"name": "flow_matching", "coupling": coupling}), quiet=True)
    assert result.loss > 0.0


def test_pairs_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_denoiser(in_channels=1, num_classes=10, patch_size=(4, 4))
    pliant.save(teacher, tmp_path / "teacher")
    for name, seed in (("a", 0), ("b", 100)):
        generate_pairs(tmp_path / name, teacher, uniform(teacher, 2, "euler"), Wanted(5, seed, 2))
    tree = {
        "model": {"from": str(tmp_path / "teacher")},
        "data": {"source": str(tmp_path / "a"), "more_pairs": [str(tmp_path / "b")], "flip": True},
        "objective": {"name": "flow_matching", "coupling": {"name": "stored"}, "metric": {"name": "huber"}},
    }
    assert train(tiny_config(tmp_path / "run", **tree), quiet=True).loss > 0.0
    with pytest.raises(ConfigError, match="more_pairs"):
        train(tiny_config(tmp_path / "x", data={**DIGITS, "more_pairs": [str(tmp_path / "b")]}), quiet=True)
    with pytest.raises(DataError, match="not the index"):
        PairSet(tmp_path)
    # Stores too large for memory are read row by row: the same rows.
    rows, flips = torch.tensor([4, 0, 3]), torch.tensor([True, False, False])
    whole = PairSet(tmp_path / "a")
    monkeypatch.setattr(pairs_module, "MEMORY_LIMIT", 0)
    lazy = PairSet(tmp_path / "a")
    assert lazy._images is None and whole._images is not None
    for read in ("samples", "sources"):
        one, other = (getattr(s, read)(rows, flips, Draws.single(3)) for s in (whole, lazy))
        assert torch.equal(one, other)


def test_processes_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other here, make the same store as one."""
    import accelerate

    teacher = tiny_denoiser(in_channels=1, num_classes=10, patch_size=(4, 4))
    plan, wanted = uniform(teacher, 2, "euler"), Wanted(9, 0, 2)
    generate_pairs(tmp_path / "one", teacher, plan, wanted)

    class Process:
        num_processes = 2
        process_index = 0

        @property
        def is_main_process(self) -> bool:
            return self.process_index == 0

        def wait_for_everyone(self) -> None:
            pass

    made = []
    for index in (0, 1):
        state = Process()
        state.process_index = index
        monkeypatch.setattr(accelerate, "PartialState", lambda state=state: state)
        generate_pairs(tmp_path / "two", teacher, plan, wanted)
        made.append(sorted(int(f.stem[-1]) for f in (tmp_path / "two").glob("*.safetensors")))
    assert made == [[0, 2, 4], [0, 1, 2, 3, 4]]
    one, two = PairSet(tmp_path / "one"), PairSet(tmp_path / "two")
    assert one._images is not None and two._images is not None
    torch.testing.assert_close(one._images, two._images, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.labels, two.labels)
