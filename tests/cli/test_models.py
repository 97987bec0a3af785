"""`pliant info`, `convert`, `flexify`, and files that are no models."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import pliant
from pliant.compute import Compute
from pliant.training import load_config
from support.cli import Run, refused

# info --------------------------------------------------------------------------------------------------------------


def test_info_of_a_model(flexible: Path, run: Run) -> None:
    report = run("info", flexible, "--json").json
    model = pliant.load(flexible)
    assert report["format"] == "pliant"
    assert report["path"] == {"name": "linear"}
    assert report["prediction"] == "velocity"
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    calls = {c["patch"]: c for c in report["calls"]}
    assert calls["2x2"]["flops"] == model.flops()
    assert calls["4x4"]["flops"] == model.flops(Compute.of(4))
    assert calls["4x4"]["tokens"] == 4
    text = run("info", flexible).out
    assert "2x2" in text
    assert f"{report['parameters']:,} parameters" in text


def test_info_of_a_plan(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    run("plan", flexible, "--budget", "60%", "--steps", 10, "-o", file)
    assert run("info", file, "--json").json["plan"]["version"] == 1
    assert "patch 4x4" in run("info", file).out


def test_info_of_a_picture(flexible: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "x.png"
    run("sample", flexible, "--steps", 2, "--seed", 5, "-o", file)
    assert run("info", file, "--json").json["recipe"]["seeds"] == [5, 6, 7]
    text = run("info", file).out
    assert "class 1 (golden retriever), seed 6" in text
    assert f"pliant sample --replay {file}" in text
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    refused(run("info", tmp_path / "bare.png"), "no recipe")


# convert -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "target"), [("official-dit", "x.pt"), ("pliant", "x")])
def test_convert_there_and_back(name: str, target: str, ddpm: Path, tmp_path: Path, run: Run) -> None:
    there, back = tmp_path / target, tmp_path / "back"
    assert run("convert", ddpm, there, "--to", name).code == 0
    options = ("--format", "official-dit", "--option", "heads=4") if name == "official-dit" else ()
    done = run("convert", there, back, *options, "--json")
    assert done.json["target"]["format"] == "pliant"
    old, new = (pliant.load(f).network.state_dict() for f in (ddpm, back))
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_convert_in_half_the_size(plain: Path, tmp_path: Path, run: Run) -> None:
    from safetensors import safe_open

    assert run("convert", plain, tmp_path / "half", "--dtype", "bf16").code == 0
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as handle:
        assert {handle.get_tensor(k).dtype for k in handle.keys()} == {torch.bfloat16}  # noqa: SIM118 - not a dict


def test_convert_refuses_what_cannot_be_said(plain: Path, ddpm: Path, tmp_path: Path, run: Run) -> None:
    refused(run("convert", ddpm, tmp_path / "d", "--to", "diffusers"), "127")
    refused(run("convert", plain, tmp_path / "x", "--to", "difusers"), "'diffusers'")
    refused(run("convert", plain, tmp_path / "x", "--dtype", "int4"), "int4")
    refused(run("convert", plain, tmp_path / "x", "--option", "heads"), "key=value")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused(run("convert", plain, tmp_path / "full"), "thesis.tex")


# flexify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_flexify_and_what_to_do_next(recipe: str, plain: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "flexible"
    done = run("flexify", plain, out, "--patch", 4, "--patch", "2x4", "--recipe", recipe, "--rank", 2, "--json")
    report = done.json
    assert [c["patch"] for c in report["calls"]] == ["2x2", "2x4", "4x4"]
    assert report["new_parameters"] > 0
    model = pliant.load(out)
    assert set(model.patch_sizes) == {(2, 2), (2, 4), (4, 4)}
    config = load_config(report["finetune_config"])
    assert config.objective.name == ("distill" if recipe == "lora" else "shared")
    assert config.model.from_ == str(out)
    assert report["next"] == f"pliant train {out}-finetune.yaml data.source=folder/of/images"


def test_flexify_keeps_the_original_bit_by_bit(plain: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "flexible"
    text = run("flexify", plain, out, "--patch", 4, "--init", "average").out
    assert f"pliant train {out}-finetune.yaml" in text
    images = []
    for model in (plain, out):
        file = tmp_path / f"{model.name}.png"
        assert run("sample", model, "--steps", 2, "-o", file).code == 0
        with Image.open(file) as picture:
            images.append(picture.tobytes())
    assert images[0] == images[1]


def test_flexify_writes_an_adapter_alone(plain: Path, tmp_path: Path, run: Run) -> None:
    assert run("flexify", plain, tmp_path / "a", "--patch", 4, "--adapter-only").code == 0
    assert [f.name for f in sorted((tmp_path / "a").iterdir())] == ["adapter.safetensors", "config.json"]
    refused(run("sample", tmp_path / "a"), "adapter")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--patch", "3"], ["3x3", "does not divide", "8x8"]),
        (["--patch", "2"], ["2x2", "own"]),
        (["--patch", "4by4"], ["4by4"]),
        (["--patch", "4", "--recipe", "loar"], ["'lora'"]),
        (["--patch", "4", "--init", "aligned"], ["noise-aligned"]),
        (["--patch", "4", "--rank", "0"], ["rank"]),
        ([], ["--patch"]),
    ],
)
def test_flexify_refuses(options: list[str], words: list[str], plain: Path, tmp_path: Path, run: Run) -> None:
    refused(run("flexify", plain, tmp_path / "x", *options), *words)


def test_flexify_twice(flexible: Path, tmp_path: Path, run: Run) -> None:
    refused(run("flexify", flexible, tmp_path / "x", "--patch", 8), "flexible already")


# Files that are no models --------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("i-was-run"),))


def damaged(kind: str, plain: Path, folder: Path) -> Path:
    """A file that is not a usable model."""
    if kind == "truncated folder":
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((plain / name).read_bytes())
        (folder / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:5000])
        return folder
    file = folder / "model.pt"
    if kind == "truncated":
        torch.save({"a": torch.zeros(10_000)}, file)
        file.write_bytes(file.read_bytes()[:20_000])
    elif kind == "code":
        torch.save({"model": Evil()}, file)
    elif kind == "bare pickle":
        file.write_bytes(pickle.dumps(Evil()))
    elif kind == "other network":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, file)
    elif kind == "text":
        file.write_text("hello")
    elif kind == "empty":
        file.touch()
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["no file or folder"]),
        ("truncated folder", ["model.safetensors"]),
        ("truncated", []),
        ("code", []),
        ("bare pickle", []),
        ("other network", ["no DiT, SiT or FiT"]),
        ("text", []),
        ("empty", []),
    ],
)
@pytest.mark.parametrize("verb", ["info", "sample", "flexify", "convert"])
def test_files_that_are_no_models(
    kind: str, words: list[str], verb: str, plain: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    file = damaged(kind, plain, folder)
    more = {"flexify": ["out", "--patch", "4"], "convert": ["out"]}.get(verb, [])
    if kind == "truncated folder" and verb == "info":
        words = []
    refused(run(verb, file, *more), "model", *words)
    assert not Path("i-was-run").exists()


def test_config_of_finetuning_is_plain_yaml(plain: Path, tmp_path: Path, run: Run) -> None:
    run("flexify", plain, tmp_path / "f", "--patch", 4)
    assert yaml.safe_load((tmp_path / "f-finetune.yaml").read_text())["steps"] > 0


def test_info_lists_the_sites_and_what_they_cost(run: Run) -> None:
    sites = run("info", "digits", "--sites", "--json").json["sites"]
    assert [s["site"] for s in sites] == list(range(len(sites)))
    assert [s["kind"] for s in sites[:4]] == ["attention", "mlp", "attention", "mlp"]
    assert all(0 < s["share"] < 0.2 for s in sites) and 0.8 < sum(s["share"] for s in sites) < 1
    assert "attention" in run("info", "digits", "--sites").out
