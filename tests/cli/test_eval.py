"""`pliant eval`: a number, its interval and its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pliant
from pliant.evaluation import evaluate_images, get_extractor, load_reference, read_npz
from support.cli import Run, refused
from support.training import in_two_processes

pytest.importorskip("sklearn")

FAST = ("--steps", 2, "--reference", "digits:test", "--num", 20)


def test_report(flexible: Path, run: Run) -> None:
    done = run("eval", flexible, "--budget", "80%", *FAST, "--seed", 5, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert report["metric"] == "Fréchet distance (digits-classifier)"
    assert report["interval"]["low"] <= report["distance"]["mean"] <= report["interval"]["high"]
    assert "bootstrap" in report["interval"]["how"]
    recipe = report["recipe"]
    assert recipe["NFE"] == 2 and recipe["network_calls"] == 2 and recipe["guidance"] == [1.0]
    assert len(recipe["extractor_sha256"]) == len(recipe["reference_sha256"]) == 64
    assert recipe["pliant"] == pliant.__version__
    assert recipe["class_sampling"] == "balanced (seed mod 3)"
    assert recipe["images"] == 20
    assert recipe["seeds"].startswith("5..24")
    assert recipe["reference"] == "digits (test)"
    assert recipe["steps"] == 2
    assert recipe["share_of_full_compute"] == report["cost"]["share"] <= 0.801
    assert len(recipe["weights_sha256"]) == 64


def test_samples_in_a_file_measure_like_the_model_that_made_them(flexible: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "samples.npz"
    assert run("sample", flexible, "--steps", 2, "--num", 20, "--seed", 5, "-o", file).code == 0
    done = run("eval", file, "--reference", "digits:test", "--json")
    assert done.code == 0, done.err
    images = read_npz(file)
    assert done.json["recipe"]["samples_sha256"] == images.fingerprint() and done.json["recipe"]["images"] == 20
    there = evaluate_images(images, load_reference("digits:test", get_extractor("digits-classifier")),
                            get_extractor("digits-classifier"))  # fmt: skip
    assert done.json["distance"] == there.distance.to_dict()
    assert "kernel distance" in run("eval", file, "--reference", "digits:test", "--repeats", 2).out
    refused(run("eval", file, "--reference", "digits:test", "--num", 20), "leave out --num")
    refused(run("eval", file, "--reference", "digits:test", "--steps", 2), "leave out --steps")
    refused(run("eval", file, "--reference", "digits:test", "--repeats", 3), "20 images do not make 3 equal repeats")
    refused(run("eval", tmp_path / "no.npz", "--reference", "digits:test"), "there is no file")
    file.write_bytes(b"no archive")
    refused(run("eval", file, "--reference", "digits:test"), "not a readable .npz")


def test_repeats_and_text(flexible: Path, run: Run) -> None:
    done = run("eval", flexible, *FAST, "--repeats", 2)
    assert done.code == 0, done.err
    for words in (
        "Fréchet distance (digits-classifier)",
        "recipe",
        "interval",
        "95%, Student, 2 repeats",
        "density",
        "Inception score",
        "spatial Fréchet distance",
        "NFE: 2",
        "guided_channels: none guided",
        "weights_sha256",
    ):
        assert words in done.out


def test_refusals(flexible: Path, latent: Path, run: Run) -> None:
    refused(run("eval", flexible, *FAST, "--extractor", "inceptoin"), "inceptoin", "inception-v3-pool3")
    refused(run("eval", flexible, "--reference", "nowhere"), "nowhere")
    refused(run("eval", latent, *FAST), "--decode")
    refused(run("eval", flexible, *FAST, "--num", 1), "--num")
    refused(run("eval", flexible, "--steps", 2, "--reference", "digits", "--budget", "1%"), "below the cheapest")


def test_guided_channels_and_drawn_classes_are_in_the_recipe(flexible: Path, run: Run) -> None:
    options = ("--guidance", 1.5, "--guided-channels", 1, "--random-classes", "--json")
    recipe = run("eval", flexible, *FAST, *options).json["recipe"]
    assert recipe["guidance"] == [1.5] and recipe["guided_channels"] == ["1"]
    assert recipe["network_calls"] == 4 and recipe["NFE"] == 2
    assert "hash of the seed" in recipe["class_sampling"]


def test_reference_statistics_kept_in_a_file_give_the_same_distance(flexible: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "digits.safetensors"
    first = run("eval", flexible, *FAST, "--save-reference", file, "--json").json
    again = run("eval", flexible, "--steps", 2, "--reference", file, "--num", 20, "--json").json
    assert again["distance"] == first["distance"]
    assert again["recipe"]["reference_sha256"] == first["recipe"]["reference_sha256"]
    assert again["kernel"] is None and first["kernel"] is not None
    refused(run("eval", flexible, *FAST, "--save-reference", tmp_path / "x.npz"), "Inception")
    refused(run("eval", flexible, *FAST, "--save-reference", tmp_path / "x.pt"), ".safetensors")


def test_two_processes_measure_like_one(flexible: Path, run: Run) -> None:
    arguments = [str(a) for a in ("eval", flexible, *FAST, "--repeats", 2, "--batch-size", 6, "--json")]
    done = in_two_processes(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads(done.stdout), run(*arguments).json
    assert two["recipe"] == one["recipe"]
    for name in ("distance", "spatial", "kernel", "gaussian", "density", "coverage", "precision", "recall", "score"):
        assert two[name]["values"] == pytest.approx(one[name]["values"], rel=1e-9), name
    assert two["class_accuracy"] == one["class_accuracy"]  # None: the model has 3 classes, the classifier 10
