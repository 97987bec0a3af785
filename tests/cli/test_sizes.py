"""`pliant sample --size`, `info` and recipes of models for any size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pliant
from pliant import Denoiser, imaging
from pliant.models.flexible import FlexibleConfig, FlexibleTransformer
from pliant.models.tiny_autoencoder import TinyAutoencoder, TinyConfig
from pliant.paths import NetworkTime, get_path
from pliant.training import load_config
from support.cli import Run


def save_model(folder: Path, channels: int) -> Path:
    config = FlexibleConfig(
        input_size=(4, 4), in_channels=channels, width=32, depth=1, heads=2, num_classes=3,
        train_sides=(2, 4), train_pixels=(8, 16),
    )  # fmt: skip
    torch.manual_seed(0)
    network = FlexibleTransformer(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    pliant.save(Denoiser(network, get_path("linear"), "velocity", NetworkTime(scale=1000.0)), folder)
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random flexible model of RGB images."""
    return save_model(tmp_path_factory.mktemp("sized") / "pixels", 3)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny autoencoder of 4 channels: two files in a folder."""
    folder = tmp_path_factory.mktemp("sized") / "tiny"
    folder.mkdir()
    torch.manual_seed(1)
    model = TinyAutoencoder(TinyConfig(4, middle_norm=False))
    torch.save(model.encoder.state_dict(), folder / "tiny_encoder.pth")
    torch.save(model.decoder.state_dict(), folder / "tiny_decoder.pth")
    return folder


def test_a_size_and_its_replay(run: Run, pixels: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.png"
    options = ("--size", "2x4", "--grid", "resolution", "--steps", "2", "--solver", "euler", "--zoom=1", "--num=1")
    done = run("sample", str(pixels), "-o", str(out), *options)
    assert done.code == 0 and "outside" not in done.err
    picture, recipe = imaging.read_png(out)
    assert tuple(picture.shape[1:]) == (2, 4) and recipe is not None
    assert recipe["size"] == [2, 4]
    replayed = run("sample", "--replay", str(out), "-o", str(tmp_path / "again.png"), "--json")
    assert replayed.json["identical"]
    times = [step["t"] for step in recipe["plan"]["steps"]]
    shift = (8 / 16) ** 0.5  # half the pixels of training
    assert times == pytest.approx([1.0, shift * 0.5 / (1 + (shift - 1) * 0.5)])


def test_sizes_outside_training_warn_and_extrapolate(run: Run, pixels: Path, tmp_path: Path) -> None:
    base = ("sample", str(pixels), "--size", "6x8", "--steps", "2", "--solver", "euler", "--num", "1", "--zoom", "1")
    plain, stretched = tmp_path / "plain.png", tmp_path / "stretched.png"
    done = run(*base, "-o", str(plain))
    assert done.code == 0 and "6x8 is outside what this model was trained on" in done.err
    done = run(*base, "--extrapolation", "vision-ntk", "-o", str(stretched))
    assert done.code == 0 and "with position extrapolation 'vision-ntk'" in done.err
    assert not torch.equal(imaging.read_png(plain)[0], imaging.read_png(stretched)[0])


def test_sizes_of_pictures_go_through_the_autoencoder(run: Run, autoencoder: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "latents", 4)
    options = ("--steps", "1", "--solver", "euler", "--num", "1", "--zoom", "1", "--decode", str(autoencoder))
    out = tmp_path / "out.png"
    assert run("sample", str(model), "--size", "16x32", "-o", str(out), *options).code == 0
    assert tuple(imaging.read_png(out)[0].shape[1:]) == (16, 32)
    done = run("sample", str(model), "--size", "20x32", "-o", str(out), *options)
    assert done.code == 2 and "multiples of 16x16 (patch x autoencoder factor 8); the nearest is 16x32" in done.err
    done = run("sample", str(model), "--size", "4x32", "-o", str(out), *options)  # smaller than a patch
    assert done.code == 2 and "the nearest is 16x32" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "3x4"), "the nearest that is: 4x4"),
        (("--size", "4"), "have 2 sides"),
        (("--size", "wide"), "write height and width, as in 160x320"),
        (("--size", "2x200"), "64 times as long as wide"),
        (("--extrapolation", "yarm"), "did you mean 'yarn'"),
    ],
)
def test_bad_sizes(run: Run, pixels: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = run("sample", str(pixels), *options, "-o", str(tmp_path / "x.png"))
    assert done.code == 2 and words in done.err and done.err.count("\n") <= 2


def test_other_models_have_one_size(run: Run, plain: Path, tmp_path: Path) -> None:
    done = run("sample", str(plain), "--size", "16x16", "-o", str(tmp_path / "x.png"))
    assert done.code == 2 and "takes states of size 8x8 only" in done.err


def test_info(run: Run, pixels: Path) -> None:
    done = run("info", str(pixels), "--sites")
    assert done.code == 0
    assert "flexible network of width 32, depth 1, patch 1x1" in done.out
    assert "also runs at patch size 2x2, and at other sizes" in done.out and "mlp" in done.out
    calls = run("info", str(pixels), "--json").json["calls"]
    assert [call["tokens"] for call in calls] == [16, 4] and calls[1]["share"] < 0.4


def test_flexify_adds_patch_sizes_to_a_native_network(run: Run, pixels: Path, tmp_path: Path) -> None:
    done = run("flexify", str(pixels), str(tmp_path / "more"), "--patch", "4", "--json")
    assert done.code == 0 and [call["patch"] for call in json.loads(done.out)["calls"]][-1] == "4x4"
    settings = load_config(tmp_path / "more-finetune.yaml", ["data.source=digits"])
    assert settings.objective.name == "any_size" and settings.tokens is not None
