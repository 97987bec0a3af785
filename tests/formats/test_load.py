"""Telling formats apart, and one clear line for everything that is no model."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pliant
from pliant import Denoiser
from pliant.errors import ConfigError, FormatError
from pliant.formats import describe_source, locate
from pliant.formats.official_dit import to_official
from pliant.paths import NetworkTime, VPDiscrete
from support.networks import tiny_denoiser, tiny_dit


def official(**options: Any) -> dict[str, torch.Tensor]:
    network = tiny_dit(**options)
    return {k: v.clone() for k, v in to_official(network.state_dict(), network.positions).items()}


def dit(**options: Any) -> Denoiser:
    return Denoiser(tiny_dit(**options), VPDiscrete(), "epsilon", NetworkTime.timesteps())


def message(source: Any, **options: Any) -> str:
    """The one line that `load` says about a bad source."""
    with pytest.raises(FormatError) as error:
        pliant.load(source, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 420
    assert Path(str(source)).name in text
    return text


# What is recognised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("DiT-XL-2-256x256.pt", "official-dit"),
        ("SiT-XL-2-256x256.pt", "sit"),
        ("my_sit.pt", "sit"),
        ("sit2.pth", "sit"),
    ],
)
def test_official_files_by_name(name: str, format: str, tmp_path: Path) -> None:
    torch.save(official(), tmp_path / name)
    model = pliant.load(tmp_path / name, heads=4)
    assert model.metadata["format"] == format
    assert "because of the file's name" in " ".join(model.metadata["notes"])
    assert model.prediction == ("velocity" if format == "sit" else "epsilon")


@pytest.mark.parametrize("name", ["0050000.pt", "website.pt", "transit.pt"])
def test_a_guess_is_said_aloud(name: str, tmp_path: Path) -> None:
    torch.save(official(), tmp_path / name)
    with pytest.warns(UserWarning, match="taken for DiT.*format='sit'"):
        assert pliant.load(tmp_path / name, heads=4).prediction == "epsilon"


def test_all_formats_round_trip(tmp_path: Path) -> None:
    cases = {
        "pliant": (tiny_denoiser(), "model"),
        "diffusers": (dit(frequency_divisor=127, norm2_eps=1e-5), "model"),
        "official-dit": (dit(), "DiT.safetensors"),
        "sit": (Denoiser(tiny_dit(), pliant.get_path("gvp"), "velocity", NetworkTime.sit()), "SiT.safetensors"),
    }
    for format, (model, name) in cases.items():
        place = tmp_path / format / name
        pliant.save(model, place, format=format)
        for back in (pliant.load(place), pliant.load(str(place), format=format)):
            assert back.fingerprint() == model.fingerprint()
            state = back.network.state_dict()
            assert all(torch.equal(state[k], v) for k, v in model.network.state_dict().items())


def test_flexible_models_and_adapters(tmp_path: Path) -> None:
    base = tiny_denoiser()
    model = pliant.flexify(base, [4], rank=2)
    pliant.save(model, tmp_path / "whole")
    assert pliant.load(tmp_path / "whole").patch_sizes == ((2, 2), (4, 4))
    pliant.save_adapter(model, tmp_path / "adapter")
    assert pliant.load_adapter(base, tmp_path / "adapter").patch_sizes == ((2, 2), (4, 4))
    assert "only an adapter" in message(tmp_path / "adapter")
    assert "only an adapter" in describe_source(tmp_path / "adapter").describe()
    with pytest.raises(FormatError, match="no file or folder"):
        pliant.load_adapter(base, tmp_path / "nothing")


def test_path_to_the_config_means_its_folder(tmp_path: Path) -> None:
    model = tiny_denoiser()
    pliant.save(model, tmp_path / "model")
    assert pliant.load(tmp_path / "model" / "config.json").fingerprint() == model.fingerprint()


def test_folder_with_one_file_of_weights(tmp_path: Path) -> None:
    """As some repositories on the Hub are: a README and a .pt."""
    torch.save(official(), tmp_path / "DiT.pt")
    (tmp_path / "README.md").write_text("hello")
    assert pliant.load(tmp_path, heads=4).metadata["format"] == "official-dit"


def test_description_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pliant.save(tiny_denoiser(), tmp_path / "a")
    pliant.save(pliant.flexify(tiny_denoiser(), [4]), tmp_path / "flexible")
    torch.save(official(), tmp_path / "DiT.pt")
    pliant.save(dit(frequency_divisor=127), tmp_path / "theirs", format="diffusers")
    count = sum(p.numel() for p in tiny_dit().parameters())
    for name, format, options in (
        ("a", "pliant", {}),
        ("flexible", "pliant", {}),
        ("DiT.pt", "official-dit", {"heads": 4}),
        ("theirs", "diffusers", {}),
    ):
        found = describe_source(tmp_path / name, **options)
        assert found.format == format
        assert found.parameters == count if name != "flexible" else found.parameters > count
        assert found.architecture == "DiT of width 32, depth 2, 4 heads, patch 2"
        assert json.loads(json.dumps(found.to_dict()))["parameters"] == found.parameters
        assert f"{found.parameters:,}" in found.describe()
        assert found.load().config == found.config
    assert "also runs at patch size 4x4" in describe_source(tmp_path / "flexible").describe()


def test_description_names_published_models(tmp_path: Path) -> None:
    torch.save(official(width=384, depth=12, heads=6), tmp_path / "SiT.pt")
    assert describe_source(tmp_path / "SiT.pt").architecture == "SiT-S/2"


# Where models come from ------------------------------------------------------------------------------------------


def test_bundled_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_denoiser()
    pliant.save(model, tmp_path / "assets" / "digits")
    monkeypatch.setattr(locate, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of that name does not hide the model
    assert pliant.load("digits").fingerprint() == model.fingerprint()
    assert "empty folder" in message("./digits")
    assert "did you mean 'digits'" in message("digit")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and safetensors are asked for first; pickled weights only if there are none."""
    import huggingface_hub

    asked = []

    def snapshot(hub_id: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((hub_id, revision, allow_patterns))
        assert "vae/*" in ignore_patterns
        if "*.pt" in allow_patterns:
            torch.save(official(), tmp_path / "DiT.pt")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = pliant.load("someone/DiT-tiny", revision="v1", heads=4)
    assert model.metadata["source"] == "someone/DiT-tiny"
    assert [a[:2] for a in asked] == [("someone/DiT-tiny", "v1")] * 2
    assert "*.safetensors" in asked[0][2]
    assert not any("pt" in pattern for pattern in asked[0][2])


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "Hugging Face Hub did not give a model" in message("nobody/nothing-of-that-name")


def test_files_that_do_not_exist(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", "nothing.pt", "folder/nothing.pt", "a/b/c", ""):
        assert "no file or folder" in message(source)


# What is refused, by content -------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)

    def __init__(self, target: Path) -> None:
        self.target = target


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["DiT.pt", "diffusion_pytorch_model.bin"])
def test_pickled_code_is_never_run(legacy: bool, name: str, tmp_path: Path) -> None:
    pliant.save(dit(frequency_divisor=127), tmp_path / "theirs", format="diffusers")
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
    file = tmp_path / "theirs" / name
    torch.save({**official(), "extra": RunsCode(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not legacy)
    text = message(file if name == "DiT.pt" else tmp_path / "theirs")
    assert "could run code" in text or "theirs" in text
    with pytest.raises(FormatError, match=r"\(posix\.system\).*not opened"):
        pliant.load(file if name == "DiT.pt" else tmp_path / "theirs")
    assert not (tmp_path / "ran").exists()


def test_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    assert "holds Python objects (torch.nn.modules.linear.Linear)" in message(tmp_path / "whole.pt")
    with (tmp_path / "plain.pkl").open("wb") as handle:
        pickle.dump({"weights": [1.0, 2.0]}, handle)
    message(tmp_path / "plain.pkl")


@pytest.mark.parametrize("ending", ["pt", "legacy.pt", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(part: float, ending: str, tmp_path: Path) -> None:
    whole = tmp_path / f"DiT.{ending}"
    if ending == "safetensors":
        save_file(official(), whole)
    else:
        torch.save(official(), whole, _use_new_zipfile_serialization=ending == "pt")
    data = whole.read_bytes()
    whole.write_bytes(data[: int(part * len(data))])
    text = message(whole)
    assert "empty" in text if part == 0.0 else "truncated" in text


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """A damaged header, pickle or directory gives an error of ours; damaged weights cannot be noticed."""
    for ending in ("pt", "safetensors"):
        file = tmp_path / f"DiT.{ending}"
        torch.save(official(), file) if ending == "pt" else save_file(official(), file)
        data = bytearray(file.read_bytes())
        for place in [*range(0, 600, 7), *range(len(data) - 300, len(data), 11)]:
            broken = bytearray(data)
            broken[place] ^= 0x5A
            file.write_bytes(broken)
            try:
                pliant.load(file, heads=4)
            except pliant.PliantError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello, this is text\n", "a text file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "89 50 4e 47"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "truncated or damaged"),
    ],
)
def test_other_content(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    assert words in message(tmp_path / "weights.pt")


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photos/a.png", b"...")
    assert "zip archive of something else (photos/a.png)" in message(tmp_path / "photos.zip")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:  # what torch.jit.save writes
        archive.writestr("program/data.pkl", b"...")
        archive.writestr("program/constants.pkl", b"...")
    assert "TorchScript" in message(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"layer1.0.conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)}, "looks like a ResNet"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2)}, "looks like a diffusers UNet"),
        ({"input_blocks.0.0.weight": torch.ones(2)}, "looks like a UNet"),
        ({"transformer_blocks.0.norm1.linear.weight": torch.ones(2)}, "pass its folder"),
        ({"foo": torch.ones(2), "bar": torch.ones(2)}, "2 tensors (foo, bar, ...) are of no architecture"),
        ({"epoch": 3, "loss": 0.5}, "no tensors by name (found: epoch, loss)"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "found: nothing"),
        ({"ema": {"decay": 0.9}}, "found: decay"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_state_dicts(state: Any, words: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "DiT.pt")
    assert words in message(tmp_path / "DiT.pt")


def test_weights_of_ours_without_their_folder(tmp_path: Path) -> None:
    pliant.save(tiny_denoiser(), tmp_path / "model")
    assert "pass their folder" in message(tmp_path / "model" / "model.safetensors")


def test_incomplete_and_foreign_variants(tmp_path: Path) -> None:
    file = tmp_path / "DiT.pt"

    def saying(**changes: Any) -> str:
        state = {**official(), **changes}
        torch.save({k: v for k, v in state.items() if v is not None}, file)
        return message(file, heads=4)

    bias, norm = "blocks.1.mlp.fc1.bias", "blocks.0.norm1.weight"
    assert f"lacks the tensor '{bias}'" in saying(**{bias: None})
    assert f"has the tensor '{norm}', which a plain DiT does not have" in saying(**{norm: torch.ones(32)})
    assert f"{bias!r} has shape (3,), expected (128,)" in saying(**{bias: torch.ones(3)})
    assert "expected floating point" in saying(**{bias: torch.ones(128, dtype=torch.int64)})
    assert "lacks the tensor 'y_embedder" in saying(**{"y_embedder.embedding_table.weight": None})
    assert "expected 4 axes" in saying(**{"x_embedder.proj.weight": torch.ones(32, 8)})
    assert "3 times the input's channels" in saying(**{"final_layer.linear.weight": torch.ones(24, 32)})
    assert "positions are not DiT's" in saying(pos_embed=torch.randn(1, 16, 32))
    assert "lacks the tensor 'blocks.0.mlp.fc1.weight'" in saying(**{"blocks.0.mlp.fc1.weight": None})


# Folders ---------------------------------------------------------------------------------------------------------


def test_other_folders(tmp_path: Path) -> None:
    assert "empty folder" in message(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    assert "holds no config.json" in message(tmp_path)
    assert "a.png" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "describes: bert" in message(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not readable JSON" in message(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "expected a JSON object" in message(tmp_path)


def test_damaged_folders_of_ours(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pliant.save(tiny_denoiser(), folder)
    config = json.loads((folder / "config.json").read_text())

    def saying(**changes: Any) -> str:
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None})
        )
        text = message(folder)
        with pytest.raises(FormatError):
            describe_source(folder)
        return text

    assert "lacks the field 'path'" in saying(path=None)
    assert "config version 99" in saying(version=99)
    assert "unknown path 'liner': did you mean 'linear'" in saying(path={"name": "liner"})
    assert "wrong type" in saying(network=[])
    bad = {**config["network"]["dit"], "depht": 3}
    assert "unknown DiT field 'depht': did you mean 'depth'" in saying(network={"dit": bad})
    (folder / "config.json").write_text(json.dumps(config))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "damaged" in message(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors does not exist" in message(folder)


def test_damaged_diffusers_folders(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    pliant.save(dit(frequency_divisor=127), folder, format="diffusers")
    config = json.loads((folder / "config.json").read_text())

    def saying(**changes: Any) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return message(folder)

    assert "describes a UNet2DConditionModel" in saying(_class_name="UNet2DConditionModel")
    assert "norm_type is 'layer_norm'" in saying(norm_type="layer_norm")
    assert "out_channels is 3" in saying(out_channels=3)
    assert "num_layers is 'two', expected a positive integer" in saying(num_layers="two")
    assert "lacks the tensor 'transformer_blocks.2" in saying(num_layers=3)
    assert "does not divide" in saying(patch_size=3)
    assert saying(num_embeds_ada_norm=7).endswith("expected (8, 32)")
    (folder / "config.json").write_text(json.dumps(config))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    table = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**table, "beta_schedule": "squaredcos_cap_v2"}))
    with pytest.raises(FormatError, match=r"betas 'squaredcos_cap_v2'.*pass path="):
        pliant.load(folder)
    assert pliant.load(folder, path="cosine").path.name == "cosine"
    scheduler.write_text("{")
    with pytest.raises(FormatError, match=r"scheduler_config\.json is not readable JSON"):
        pliant.load(folder)
    scheduler.unlink()
    assert "assumed DiT's linear betas" in " ".join(pliant.load(folder).metadata["notes"])
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "weights.safetensors")
    assert "holds no diffusion_pytorch_model.safetensors" in message(folder)


def test_old_diffusers_configs_and_pipelines(tmp_path: Path) -> None:
    """facebook/DiT-XL-2-256 names the class Transformer2DModel, with fields DiT does not use, and has class names."""
    model = dit(frequency_divisor=127, norm2_eps=1e-5)
    pliant.save(model, tmp_path / "transformer", format="diffusers")
    (tmp_path / "transformer" / "scheduler").rename(tmp_path / "scheduler")
    file = tmp_path / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "cross_attention_dim": None}
    del config["norm_eps"]
    file.write_text(json.dumps(config))
    labels = {"0": "ant, emmet", "1": "bee", "2": "cow"}
    index = {"_class_name": "DiTPipeline", "id2label": labels, "transformer": ["diffusers", "Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    back = pliant.load(tmp_path)
    assert back.fingerprint() == model.fingerprint()
    assert back.class_names == ["ant, emmet", "bee", "cow"]
    assert pliant.load(tmp_path / "transformer").fingerprint() == model.fingerprint()
    assert not any("assumed" in note for note in pliant.load(tmp_path / "transformer").metadata["notes"])
    (tmp_path / "transformer" / "config.json").unlink()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "StableDiffusionPipeline without a transformer" in message(tmp_path)


def test_diffusers_blocks_that_differ(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pliant.save(dit(frequency_divisor=127), tmp_path / "a", format="diffusers")
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1.0
    save_file(tensors, file)
    assert "block 1 has another 'norm1.emb.class_embedder.embedding_table.weight' than block 0" in message(
        tmp_path / "a"
    )


def test_diffusers_shards(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "a"
    model = dit(frequency_divisor=127)
    pliant.save(model, folder, format="diffusers")
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    places = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole.unlink()
    state = pliant.load(folder).network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.network.state_dict().items())
    one = next(iter(places.values()))
    index.write_text(json.dumps({"weight_map": {"x": f"../{one}"}}))
    assert "outside its folder" in message(folder)
    index.write_text(json.dumps({"weight_map": places}))
    (folder / one).unlink()
    with pytest.raises(FormatError, match=f"{one}.*missing"):
        pliant.load(folder)
    index.write_text("{}")
    assert "no 'weight_map'" in message(folder)


# Arguments -------------------------------------------------------------------------------------------------------


def test_formats_and_places_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_denoiser()
    pliant.save(model, tmp_path / "model")
    torch.save(official(), tmp_path / "DiT.pt")
    with pytest.raises(ConfigError, match=r"unknown format 'dit': .*official-dit"):
        pliant.load(tmp_path / "DiT.pt", format="dit")
    with pytest.raises(FormatError, match=r"'sit' is a file, .*model is a folder"):
        pliant.load(tmp_path / "model", format="sit")
    with pytest.raises(FormatError, match="'diffusers' is a folder"):
        pliant.load(tmp_path / "DiT.pt", format="diffusers")
    with pytest.raises(ConfigError, match="format 'pliant' has no option 'heads'"):
        pliant.load(tmp_path / "model", heads=4)
    with pytest.raises(FormatError, match="is not a Pliant config"):
        pliant.save(dit(frequency_divisor=127), tmp_path / "theirs", format="diffusers")
        pliant.load(tmp_path / "theirs", format="pliant")


def test_saving_never_deletes_what_is_not_a_model(tmp_path: Path) -> None:
    model = tiny_denoiser()
    for format in ("pliant", "diffusers"):
        work = tmp_path / format
        work.mkdir()
        (work / "thesis.txt").write_text("years of work")
        with pytest.raises(FormatError, match=r"holds 'thesis\.txt', which saving there would delete"):
            pliant.save(model, work, format=format)
        assert (work / "thesis.txt").read_text() == "years of work"
        with pytest.raises(FormatError, match="is a file"):
            pliant.save(model, work / "thesis.txt", format=format)
        with pytest.raises(FormatError, match="names a file"):
            pliant.save(model, work / "model.pt", format=format)
    with pytest.raises(FormatError, match="is a file"):
        pliant.save(dit(), tmp_path, format="official-dit")
    with pytest.raises(ConfigError, match="did you mean 'pliant'"):
        pliant.save(model, tmp_path / "x", format="plaint")
    pliant.save(model, tmp_path / "x")
    pliant.save(tiny_denoiser(seed=1), tmp_path / "x")  # a model may replace a model
    assert sorted(f.name for f in tmp_path.iterdir()) == ["diffusers", "pliant", "x"]
