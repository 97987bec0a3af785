"""`pliant sample`: files, recipes inside them, and replays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import pliant
from pliant import imaging
from pliant.plans import Plan
from support.cli import Run, refused

FAST = ("--steps", 3, "--solver", "euler")


def test_a_sheet_holds_its_full_recipe(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "out.png"
    done = run("sample", flexible, "--budget", "75%", *FAST, "--guidance", 2, "--seed", 7, "-o", file, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["images"] == 3
    assert report["files"] == [str(file)]
    with Image.open(file) as picture:
        assert picture.size == (3 * 64 + 2 * imaging.GAP, 64)
        recipe = json.loads(picture.text["pliant"])  # type: ignore[attr-defined]
    assert recipe["classes"] == [0, 1, 2]
    assert recipe["seeds"] == [7, 8, 9]
    assert recipe["model"]["fingerprint"] == pliant.load(flexible).fingerprint()
    assert len(recipe["model"]["weights_sha256"]) == 64
    assert recipe["software"]["pliant"] == pliant.__version__
    plan = Plan.from_dict(recipe["plan"])
    assert {s.compute.precision for s in plan.steps} == {"fp32"}
    assert report["cost"]["share"] <= 0.751


def test_pixels_are_what_python_gives(flexible: Path, tmp_path: Path, run: Run) -> None:
    assert run("sample", flexible, *FAST, "--num", 4, "--columns", 2, "--zoom", 1, "-o", tmp_path / "x.png").code == 0
    model = pliant.load(flexible)
    images = pliant.sample(model, Plan.uniform(model, 3, "euler"), [0, 1, 2, 0], [0, 1, 2, 3])
    pixels, _ = imaging.read_png(tmp_path / "x.png")
    assert torch.equal(pixels, imaging.grid(imaging.to_pixels(images), 2))


def test_replay_gives_the_same_bytes(flexible: Path, tmp_path: Path, run: Run) -> None:
    file, again = tmp_path / "out.png", tmp_path / "again.png"
    plan = tmp_path / "plan.json"
    assert run("plan", flexible, "--weak-steps", 2, "--steps", 4, "-o", plan).code == 0
    assert run("sample", flexible, "--plan", plan, "--class", "zebra", "--num", 3, "-o", file).code == 0
    done = run("sample", "--replay", file, "-o", again, "--json")
    assert done.code == 0
    assert done.json["identical"] is True
    assert done.json["identical_bytes"] is True
    assert file.read_bytes() == again.read_bytes()
    assert "the same picture" in run("sample", "--replay", file, "-o", again).out


def test_replay_of_one_file_of_a_folder(flexible: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "many"
    assert run("sample", flexible, *FAST, "--num", 7, "--batch-size", 3, "-o", folder).code == 0
    files = sorted(folder.iterdir())
    assert [f.name for f in files][:2] == ["00000-tabby--tabby-cat-seed0.png", "00001-golden-retriever-seed1.png"]
    assert len(files) == 7
    with Image.open(files[0]) as picture:
        assert picture.size == (8, 8)  # as computed, for other programs
    for file in files[4:6]:
        again = tmp_path / "again.png"
        assert run("sample", "--replay", file, "-o", again).code == 0
        assert again.read_bytes() == file.read_bytes()


def test_replay_finds_that_a_picture_was_changed(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "out.png"
    run("sample", flexible, *FAST, "-o", file)
    pixels, recipe = imaging.read_png(file)
    pixels[0, 0, 0] ^= 16
    file.write_bytes(imaging.encode_png(pixels, recipe))
    report = run("sample", "--replay", file, "--json").json
    assert report["identical"] is False
    assert report["largest_difference"] == 16
    assert report["out"] == str(tmp_path / "out-replay.png")


def test_replay_refuses_other_weights(flexible: Path, plain: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "out.png"
    run("sample", flexible, *FAST, "-o", file)
    refused(run("sample", plain, "--replay", file), "weights differ", "sha256")


def test_replay_needs_a_recipe(tmp_path: Path, run: Run) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "bare.png")
    refused(run("sample", "--replay", tmp_path / "bare.png"), "bare.png", "no recipe")
    (tmp_path / "text.png").write_text("no picture")
    refused(run("sample", "--replay", tmp_path / "text.png"), "not a readable PNG")
    refused(run("sample", "--replay", tmp_path / "none.png"), "does not exist")
    refused(run("sample", "--replay", tmp_path / "bare.png", "--budget", "60%"), "--budget")
    recipe = {"format": "pliant-recipe", "version": 99}
    (tmp_path / "new.png").write_bytes(imaging.encode_png(torch.zeros(1, 4, 4, dtype=torch.uint8), recipe))
    refused(run("sample", "--replay", tmp_path / "new.png"), "version 99")


def test_samples_for_evaluators(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "out.npz"
    assert run("sample", flexible, *FAST, "--num", 5, "-o", file).code == 0
    with np.load(file) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1]
    assert json.loads((tmp_path / "out.json").read_text())["seeds"] == [0, 1, 2, 3, 4]


def test_latents(latent: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("sample", latent, *FAST, "-o", tmp_path / "x.png"), "4 channels", "--decode", "latents.safetensors")
    monkeypatch.chdir(tmp_path)
    assert run("sample", latent, *FAST).code == 0
    with safe_open(tmp_path / "samples.safetensors", "pt") as handle:
        assert handle.get_tensor("samples").shape == (3, 4, 8, 8)
        assert json.loads(handle.metadata()["pliant"])["classes"] == [0, 1, 2]
    assert run("sample", latent, *FAST, "-o", "x.npz").code == 0
    with np.load("x.npz") as arrays:
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((3, 4, 8, 8), np.float32)


def test_latents_through_an_autoencoder(latent: Path, tmp_path: Path, run: Run) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "ae")
    file = tmp_path / "x.png"
    assert run("sample", latent, *FAST, "--decode", tmp_path / "ae", "--zoom", 1, "-o", file).code == 0
    with Image.open(file) as picture:
        assert (picture.size, picture.mode) == ((3 * 16 + 2 * imaging.GAP, 16), "RGB")
    assert run("sample", "--replay", file, "-o", tmp_path / "y.png").code == 0
    assert file.read_bytes() == (tmp_path / "y.png").read_bytes()
    refused(run("sample", latent, *FAST, "--decode", latent), "not a diffusers autoencoder")


@pytest.mark.parametrize("name", ["golden retriever", "1", "Golden Retriever"])
def test_classes_by_id_and_name(name: str, flexible: Path, tmp_path: Path, run: Run) -> None:
    done = run("sample", flexible, *FAST, "--class", name, "--class", "tabby cat", "-o", tmp_path / "x.png", "--json")
    assert [s["class"] for s in done.json["samples"]] == [1, 0]
    assert done.json["samples"][0]["name"] == "golden retriever"


def test_the_unconditional_class(flexible: Path, tmp_path: Path, run: Run) -> None:
    done = run("sample", flexible, *FAST, "--class", "null", "-o", tmp_path / "x.png", "--json")
    assert done.json["samples"] == [{"class": 3, "name": "null", "seed": 0}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "3"], ["class 3", "0 to 2"]),
        (["--class", "-1"], ["class -1", "0 to 2"]),
        (["--class", "retriever"], ["'golden retriever' (1)"]),
        (["--class", "zebar"], ["'zebra' (2)"]),
        (["--class", "0", "--class", "1", "--num", "1"], ["--num 1"]),
        (["--budget", "0.01%"], ["0.01%", "cheapest", "%"]),
        (["--budget", "60"], ["60%"]),
        (["--budget", "cheap"], ["'cheap'"]),
        (["--budget", "60%", "--weak-steps", "2"], ["--budget", "--weak-steps"]),
        (["--weak-last"], ["--weak-last"]),
        (["--weak", "3"], ["patch sizes 2x2, 4x4"]),
        (["--weak", "big"], ["'big'", "2x4"]),
        (["--solver", "eulr"], ["'euler'"]),
        (["--solver", "ddim:etta=1"], ["'eta'"]),
        (["--precision", "fp8"], ["fp8"]),
        (["--device", "tpu9"], ["tpu9"]),
        (["-o", "x.gif"], [".gif"]),
        (["--plan", "missing.json"], ["missing.json", "does not exist"]),
    ],
)
def test_bad_requests(arguments: list[str], words: list[str], flexible: Path, run: Run) -> None:
    refused(run("sample", flexible, *arguments), *words)


def test_unwritable_target(flexible: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    refused(run("sample", flexible, *FAST, "-o", tmp_path / "file" / "x.png"), "cannot create")


def test_a_model_must_be_named(run: Run) -> None:
    refused(run("sample"), "name a model")
