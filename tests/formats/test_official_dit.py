"""Official files: names, shapes to config, options, both directions."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pliant
from pliant import Denoiser, DiT, DiTConfig
from pliant.errors import ConfigError, FormatError
from pliant.formats.diffusers import from_diffusers, to_diffusers
from pliant.formats.official_dit import from_official, to_official
from pliant.paths import NetworkTime, VPDiscrete, get_path
from support.networks import randomize, tiny_denoiser, tiny_dit


def dit(**options: Any) -> Denoiser:
    """A random model with DiT's meaning."""
    return Denoiser(tiny_dit(**options), VPDiscrete(), "epsilon", NetworkTime.timesteps())


def sit(path: str = "linear", **options: Any) -> Denoiser:
    return Denoiser(tiny_dit(**options), get_path(path), "velocity", NetworkTime.sit())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"learn_sigma": True, "depth": 3}, {"class_dropout": 0.0}], ids=str)
def test_keys_round_trip_bitwise_through_both_foreign_layouts(options: dict[str, Any]) -> None:
    network = tiny_dit(**options)
    state, depth = network.state_dict(), network.config.depth
    official = to_official(state, network.positions)
    assert equal(from_official(official, depth), state)
    theirs = to_diffusers(from_official(official, depth))
    assert equal(from_diffusers(theirs, depth, "here"), state)
    assert equal(to_official(from_diffusers(theirs, depth, "here"), network.positions), official)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_save_and_load(ending: str, tmp_path: Path) -> None:
    model = dit(learn_sigma=True)
    file = tmp_path / f"DiT.{ending}"
    pliant.save(model, file, format="official-dit")
    options = {"heads": 4} if ending == "pt" else {}  # a safetensors file of ours says it
    back = pliant.load(file, **options)
    assert back.fingerprint() == model.fingerprint()
    assert equal(back.network.state_dict(), model.network.state_dict())
    assert torch.equal(back.network.positions, model.network.positions)
    assert not back.network.training
    assert back.metadata["source"] == str(file)
    stored = torch.load(file, weights_only=True) if ending == "pt" else load_file(file)
    assert torch.equal(stored["pos_embed"][0], model.network.positions)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_sit_file_that_says_what_it_is(path: str, tmp_path: Path) -> None:
    model = sit(path)
    pliant.save(model, tmp_path / "model.safetensors", format="sit")
    assert pliant.load(tmp_path / "model.safetensors").fingerprint() == model.fingerprint()
    pliant.save(model, tmp_path / "model.pt", format="sit")
    back = pliant.load(tmp_path / "model.pt", format="sit", path=path, heads=4)
    assert back.fingerprint() == model.fingerprint()


def arguments(**extra: Any) -> argparse.Namespace:
    return argparse.Namespace(image_size=64, results_dir="results", global_seed=0, data_path=None, **extra)


@pytest.mark.parametrize("legacy", [False, True])
def test_training_checkpoint_of_sit_says_everything(legacy: bool, tmp_path: Path) -> None:
    """train.py's arguments tell the model, the path and the prediction; the EMA is what is read."""
    model = tiny_dit(width=384, heads=6, depth=1)
    ema = to_official(model.state_dict(), model.positions)
    other = {name: torch.zeros_like(value) for name, value in ema.items()}
    args = arguments(model="SiT-S/2", path_type="GVP", prediction="noise")
    content = {"model": other, "ema": ema, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "args": args}
    torch.save(content, tmp_path / "0050000.pt", _use_new_zipfile_serialization=not legacy)
    back = pliant.load(tmp_path / "0050000.pt")
    assert back.config.heads == 6
    assert (back.path.name, back.prediction, back.network_time) == ("gvp", "epsilon", NetworkTime.sit())
    assert equal(back.network.state_dict(), model.state_dict())
    assert "'ema'" in " ".join(back.metadata["notes"])
    assert pliant.load(tmp_path / "0050000.pt", path="vp").path.name == "vp"  # what the caller says, counts more


def test_prefixes_of_wrappers_are_removed(tmp_path: Path) -> None:
    network = tiny_dit()
    state = to_official(network.state_dict(), network.positions)
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, tmp_path / "DiT.pt")
    torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, tmp_path / "DiT2.pt")
    for name in ("DiT.pt", "DiT2.pt"):
        assert equal(pliant.load(tmp_path / name, heads=4).network.state_dict(), network.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model = dit()
    pliant.save(model, tmp_path / "dit.safetensors", format="official-dit", dtype=dtype)
    back = pliant.load(tmp_path / "dit.safetensors")
    expected = {name: value.to(dtype).float() for name, value in model.network.state_dict().items()}
    assert equal(back.network.state_dict(), expected)
    assert torch.equal(back.network.positions, model.network.positions)  # recomputed, not rounded


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/4", "DiT-L/2", "DiT-XL/2"])
def test_official_sizes_are_inferred(name: str) -> None:
    """Width, depth, heads, patch, channels, classes and size from shapes alone, on storage-free tensors."""
    from pliant.formats.official_dit import read_config
    from pliant.formats.state_files import StateFile

    config = DiTConfig.named(name, input_size=64)
    with torch.device("meta"):
        network = DiT(config)
    state = StateFile(Path("DiT.pt"), to_official(network.state_dict(), network.positions), {})
    assert read_config(state, {}) == config


def test_options_fill_what_the_file_does_not_say(tmp_path: Path) -> None:
    network = tiny_dit(input_size=(4, 12), class_dropout=0.0)
    torch.save(to_official(network.state_dict(), network.positions), tmp_path / "DiT.pt")
    with pytest.raises(FormatError, match=r"12 tokens, no square; say .* input_size"):
        pliant.load(tmp_path / "DiT.pt", heads=4)
    with pytest.raises(ConfigError, match="how many heads"):
        pliant.load(tmp_path / "DiT.pt", input_size=(4, 12))
    with pytest.raises(ConfigError, match="num_classes=7 cannot be"):
        pliant.load(tmp_path / "DiT.pt", input_size=(4, 12), heads=4, num_classes=7)
    with pytest.raises(FormatError, match="positions are not"):
        pliant.load(tmp_path / "DiT.pt", input_size=(12, 4), heads=4, num_classes=3)
    back = pliant.load(tmp_path / "DiT.pt", input_size=(4, 12), heads=4, num_classes=3)
    assert back.config == network.config
    assert equal(back.network.state_dict(), network.state_dict())
    with pytest.raises(ConfigError, match=r"no option 'head': did you mean 'heads'"):
        pliant.load(tmp_path / "DiT.pt", head=4)


def test_other_meaning_can_be_given(tmp_path: Path) -> None:
    pliant.save(dit(), tmp_path / "dit.pt", format="official-dit")
    back = pliant.load(tmp_path / "dit.pt", heads=4, path="cosine", prediction="v_prediction")
    assert (back.path.name, back.prediction) == ("cosine", "v_prediction")
    with pytest.raises(ConfigError, match="unknown path"):
        pliant.load(tmp_path / "dit.pt", heads=4, path="cosin")


def test_unusual_mlp_ratio_survives(tmp_path: Path) -> None:
    model = dit(mlp_ratio=2.5)
    pliant.save(model, tmp_path / "dit.safetensors", format="official-dit")
    assert pliant.load(tmp_path / "dit.safetensors").config == model.config


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    model = dit()
    cases = [
        (replace(model, prediction="velocity"), "official-dit", "predicts velocity"),
        (replace(model, path=get_path("linear")), "official-dit", "its path is 'linear'"),
        (replace(model, network_time=NetworkTime()), "official-dit", "does not count time"),
        (model, "sit", "its path is 'vp-discrete'"),
        (replace(sit(), network_time=NetworkTime(scale=1000.0)), "sit", "from 0 = noise"),
        (dit(frequency_divisor=127, norm2_eps=1e-5), "official-dit", "divides by 127.*add 1e-05"),
        (sit(frequency_divisor=127), "sit", "divides by 127"),
        (dit(input_size=(4, 8)), "official-dit", "square"),
        (pliant.flexify(model, [4]), "official-dit", "flexible"),
    ]
    for bad, format, words in cases:
        with pytest.raises(FormatError, match=words):
            pliant.save(bad, tmp_path / "x.pt", format=format)
    assert not list(tmp_path.iterdir())


def test_inexact_only_on_request(tmp_path: Path) -> None:
    model = tiny_denoiser()
    with pytest.warns(UserWarning, match="although its path is 'linear'"):
        pliant.save(model, tmp_path / "x.pt", format="official-dit", allow_inexact=True)
    assert equal(
        pliant.load(tmp_path / "x.pt", format="official-dit", heads=4).network.state_dict(), model.network.state_dict()
    )


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dit.pt"
    pliant.save(dit(), file, format="official-dit")
    before = file.read_bytes()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        pliant.save(dit(), file, format="official-dit")
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """Nothing stays mapped: overwriting the file in place changes no loaded weight."""
    for ending in ("pt", "safetensors"):
        file = tmp_path / f"dit.{ending}"
        network = tiny_dit()
        state = {k: v.clone() for k, v in to_official(network.state_dict(), network.positions).items()}
        torch.save(state, file) if ending == "pt" else save_file(state, file)
        back = pliant.load(file, heads=4)
        with file.open("r+b") as handle:
            handle.seek(2000)
            handle.write(b"\xff" * (file.stat().st_size - 2000))
        assert equal(back.network.state_dict(), network.state_dict())


def test_loaded_networks_train(tmp_path: Path) -> None:
    pliant.save(dit(), tmp_path / "dit.pt", format="official-dit")
    model = pliant.load(tmp_path / "dit.pt", heads=4)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    randomize(model.network)  # in place: the weights are ordinary tensors
    flexible = pliant.flexify(model, [4])
    assert flexible.patch_sizes == ((2, 2), (4, 4))
