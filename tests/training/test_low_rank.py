"""Low-rank training: nothing changes at the start, only the change trains, and merging leaves a plain network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pliant
from pliant.training import train
from pliant.training.low_rank import add_low_rank, low_rank_layers, merge_low_rank
from support.networks import batch, tiny_dit
from support.training import tiny_config


def test_adding_and_merging_change_nothing_until_it_trains() -> None:
    network = tiny_dit()
    x, t, y = batch(network)
    names, before = set(network.state_dict()), network(x, t, y)
    add_low_rank(network, 2)
    assert torch.equal(network(x, t, y), before)
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trainable and all("parametrizations.weight.0" in name for name in trainable)
    assert len(trainable) == 2 * len(low_rank_layers(network))
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("up"):
                p.normal_(std=0.3)
    changed = network(x, t, y)
    assert not torch.allclose(changed, before, atol=1e-3)
    merge_low_rank(network)
    assert set(network.state_dict()) == names
    torch.testing.assert_close(network(x, t, y), changed, rtol=1e-5, atol=1e-5)
    merge_low_rank(network)  # nothing left to merge


def test_the_rank_of_what_training_changes(tmp_path: Path) -> None:
    base = train(tiny_config(tmp_path / "base"), quiet=True)
    model = {"from": str(base.model_folder), "trainable": "lora", "lora_rank": 1}
    tuned = train(tiny_config(tmp_path / "tuned", model=model, steps=4), quiet=True)
    again = train(tiny_config(tmp_path / "again", model=model, steps=2), quiet=True)
    again = train(tiny_config(tmp_path / "again", model=model, steps=4, resume="latest"), quiet=True)
    one, two = (load_file(r.model_folder / "model.safetensors") for r in (base, tuned))
    assert one.keys() == two.keys()
    changed = {k for k in one if not torch.equal(one[k], two[k])}
    assert changed and all(k.startswith("blocks.") and k.endswith("weight") for k in changed)
    for k in changed:
        values = torch.linalg.svdvals((two[k] - one[k]).double())
        assert float(values[1]) < 1e-3 * float(values[0])
    resumed = load_file(again.model_folder / "model.safetensors")
    assert all(torch.equal(two[k], resumed[k]) for k in two)
    assert pliant.load(tuned.model_folder).fingerprint() == pliant.load(base.model_folder).fingerprint()


def test_all_weights_of_a_flexible_model(tmp_path: Path) -> None:
    from pliant.adapters.flexify import flexify
    from support.networks import tiny_denoiser

    folder = tmp_path / "flexible"
    pliant.save(flexify(tiny_denoiser(in_channels=1, num_classes=10, patch_size=(2, 2)), [4], rank=2), folder)
    objective = {"name": "shared", "own": {"name": "flow_matching"}}
    result = train(
        tiny_config(tmp_path / "run", model={"from": str(folder), "trainable": "all"}, objective=objective), quiet=True
    )
    one, two = (load_file(f / "model.safetensors") for f in (folder, result.model_folder))
    changed = {k for k in one if not torch.equal(one[k], two[k])}
    assert any(k.startswith("base.") for k in changed) and any(k.startswith("modes.") for k in changed)
    assert result.denoiser.patch_sizes == ((2, 2), (4, 4))


def test_unknown_choice(tmp_path: Path) -> None:
    with pytest.raises(pliant.PliantError, match=r"model\.trainable"):
        tiny_config(tmp_path, model={"from": "digits", "trainable": "most"})
