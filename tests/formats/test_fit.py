"""Official FiT files: names, shapes to config, options, both directions, and damaged ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pliant
from parity.reference_fit import FiTSizes, random_fit_state
from pliant.errors import ConfigError, FormatError
from pliant.formats.fit import from_official, read_config, to_official
from pliant.formats.state_files import StateFile
from pliant.models.fit import FiT, FiTConfig
from pliant.paths import NetworkTime, VPDiscrete, get_path
from support.cli import run_here

SIZES = [FiTSizes(version=1), FiTSizes(version=2)]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ending", ["bin", "pt", "safetensors"])
@pytest.mark.parametrize("sizes", SIZES, ids=["v1", "v2"])
def test_files_come_back_bit_for_bit(sizes: FiTSizes, ending: str, tmp_path: Path) -> None:
    state, file = random_fit_state(sizes), tmp_path / f"FiT.{ending}"
    save_file(state, file) if ending == "safetensors" else torch.save(state, file)
    model = pliant.load(file, heads=2)
    assert model.metadata["format"] == "fit"
    assert model.config.learn_sigma == (sizes.version == 1)
    again = tmp_path / f"again.{ending}"
    pliant.save(model, again, format="fit")
    back = pliant.load(again, **({} if ending == "safetensors" else {"heads": 2}))
    assert back.fingerprint() == model.fingerprint()
    network = model.network
    assert isinstance(network, FiT)
    assert equal(back.network.state_dict(), network.state_dict())
    assert equal(to_official(network.state_dict(), network.config), state)
    assert equal(from_official(state, network.config), network.state_dict())


@pytest.mark.parametrize("name", ["FiT-B/2", "FiT-XL/2", "FiTv2-B/2", "FiTv2-XL/2", "FiTv2-3B/2"])
def test_released_sizes_are_inferred(name: str) -> None:
    config = FiTConfig.named(name)
    with torch.device("meta"):
        tensors = to_official(FiT(config).state_dict(), config)
    assert read_config(StateFile(Path("model.bin"), tensors, {}), {}) == (config, [])
    tuned, notes = read_config(StateFile(Path("FiTv2_XL_HRFT.safetensors"), tensors, {}), {})
    assert tuned == replace(config, extrapolation="vision-ntk", train_tokens=1024, input_size=(64, 64))
    assert "file's name" in notes[0]
    assert read_config(StateFile(Path("three.bin"), tensors, {}), {}) == (config, [])  # "hr" inside a word is none


def test_meaning_is_translated(tmp_path: Path) -> None:
    for sizes in SIZES:
        torch.save(random_fit_state(sizes), tmp_path / "FiT.pt")
        model = pliant.load(tmp_path / "FiT.pt", heads=2)
        if sizes.version == 1:
            assert (model.path, model.prediction, model.network_time) == (
                VPDiscrete(), "epsilon", NetworkTime.timesteps()
            )  # fmt: skip
        else:
            assert (model.path, model.prediction) == (get_path("linear"), "velocity")
            assert model.network_time == NetworkTime.sit()


def test_options_fill_what_the_file_does_not_say(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(random_fit_state(SIZES[1]), file)
    with pytest.raises(ConfigError, match="how many heads"):
        pliant.load(file)
    with pytest.raises(ConfigError, match="no multiple of a patch"):
        pliant.load(file, heads=2, patch_size=3)
    with pytest.raises(ConfigError, match="num_classes=9 cannot be"):
        pliant.load(file, heads=2, num_classes=9)
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        pliant.load(file, head=2)
    with pytest.raises(ConfigError, match="vision-yarn"):
        pliant.load(file, heads=2, extrapolation="vision-yran")
    model = pliant.load(file, heads=2, extrapolation="vision-yarn", train_tokens=64, qk_norm=False, input_size=(8, 12))
    network = model.network
    assert isinstance(network, FiT)
    assert (network.config.extrapolation, network.config.train_tokens, network.config.qk_norm) == (
        "vision-yarn", 64, False
    )  # fmt: skip
    assert model.sample_shape == (4, 8, 12)


def test_info_names_the_architecture(tmp_path: Path) -> None:
    torch.save(random_fit_state(SIZES[1]), tmp_path / "weights.pt")
    text = run_here("info", tmp_path / "weights.pt", "--option", "heads=2").out
    assert "FiTv2 of width 48, depth 2, 2 heads, patch 2" in text
    assert "path linear, predicts velocity" in text


def damaged(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"}
    if how == "extra":
        return {**state, "pos_embed": torch.zeros(3)}
    if how == "shape":
        return {**state, "blocks.1.attn.proj.weight": torch.zeros(3, 3)}
    if how == "integers":
        return {**state, "blocks.1.attn.proj.bias": torch.zeros(48, dtype=torch.int64)}
    if how == "final":
        return {**state, "final_layer.linear.weight": torch.zeros(40, 48)}
    return {**state, "x_embedder.proj.weight": torch.zeros(48, 4, 2, 2)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "lacks the tensor 'blocks.1.mlp.fc2.bias'"),
        ("extra", "'pos_embed'"),
        ("shape", r"'blocks.1.attn.proj.weight' has shape \(3, 3\)"),
        ("integers", "expected floating point"),
        ("final", "2.5 times the input's features"),
        ("kernel", "expected 2 axes"),
    ],
)
def test_damaged_files(how: str, message: str, tmp_path: Path) -> None:
    torch.save(damaged(random_fit_state(SIZES[1]), how), tmp_path / "weights.pt")
    with pytest.raises(FormatError, match=message) as caught:
        pliant.load(tmp_path / "weights.pt", heads=2)
    assert "\n" not in str(caught.value)


def test_truncated_file(tmp_path: Path) -> None:
    save_file(random_fit_state(SIZES[1]), tmp_path / "weights.safetensors")
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="truncated or damaged"):
        pliant.load(tmp_path / "weights.safetensors", heads=2)


def test_what_the_layout_cannot_say(tmp_path: Path) -> None:
    from support.networks import tiny_denoiser

    torch.save(random_fit_state(SIZES[1]), tmp_path / "weights.pt")
    model = pliant.load(tmp_path / "weights.pt", heads=2)
    for changed, word in (
        (replace(model, path=get_path("gvp")), "FiTv2's is 'linear'"),
        (replace(model, network_time=NetworkTime()), "0 = noise to 1 = data"),
        (replace(model, prediction="epsilon"), "predicts epsilon"),
    ):
        with pytest.raises(FormatError, match=word):
            pliant.save(changed, tmp_path / "out.pt", format="fit")
    with pytest.raises(FormatError, match="dit network"):
        pliant.save(tiny_denoiser(), tmp_path / "out.pt", format="fit")
    with pytest.raises(FormatError, match="only format 'pliant' can hold"):
        pliant.save(model, tmp_path / "out.pt", format="official-dit")
