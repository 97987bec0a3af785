"""Vision encoders of transformers, with tiny random checkpoints that the tests write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pliant.errors import ConfigError, FormatError, PliantError
from pliant.evaluation import FeatureExtractor, digits, distance_name, evaluate_images, get_extractor, load_reference
from pliant.evaluation.images import ImageSet, from_uint8

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    processor = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**small, "image_size": 16, "patch_size": 8}, text_config=small, projection_dim=6
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_dinov2_features_are_the_pooled_class_token(dinov2: Path) -> None:
    extractor = get_extractor(str(dinov2))
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.name == "dinov2 (tiny-dino)" and extractor.dim == 16
    assert "28x28" in extractor.preprocessing and "0.5, 0.4, 0.3" in extractor.preprocessing
    x = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    network = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = network(pixel_values=(x - mean) / std).pooler_output
    torch.testing.assert_close(extractor(2 * x - 1), expected, rtol=1e-4, atol=1e-5)
    assert distance_name(extractor) == "Fréchet distance (dinov2 (tiny-dino))"
    assert get_extractor(str(dinov2)) is extractor


def test_clip_features_are_the_projected_embedding(clip: Path) -> None:
    extractor = get_extractor(f"hf:{clip}")
    assert extractor.dim == 6 and "16x16" in extractor.preprocessing  # no processor file: the model's own size
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    network = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = network.visual_projection(network.vision_model(pixel_values=(x - mean) / std).pooler_output)
    torch.testing.assert_close(extractor(2 * x - 1), expected, rtol=1e-4, atol=1e-5)


def test_fingerprints_tell_weights_apart(dinov2: Path, tmp_path: Path) -> None:
    network = transformers.Dinov2Model.from_pretrained(dinov2)
    with torch.no_grad():
        network.layernorm.weight += 1e-3
    network.save_pretrained(tmp_path / "other")
    a, b = get_extractor(str(dinov2)), get_extractor(str(tmp_path / "other"))
    assert len(a.fingerprint) == 64 and a.fingerprint != b.fingerprint


def test_a_whole_report_in_an_encoders_space(dinov2: Path) -> None:
    extractor = get_extractor(str(dinov2))
    reference = load_reference("digits:test", extractor)
    images = digits("train").images[:60]
    report = evaluate_images(ImageSet("some", images), reference, extractor)
    assert report.metric == "Fréchet distance (dinov2 (tiny-dino))"
    assert report.gaussian is not None and report.gaussian.mean >= 0
    assert report.score is None and report.spatial is None and report.class_accuracy is None
    assert extractor(from_uint8(images[:2])).shape == (2, 16)  # grey 8x8 is repeated and resized


def test_what_cannot_be_had_is_said_in_a_line(dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match="dinov2-large is not a vision encoder that transformers can load here"):
        get_extractor("dinov2")  # tests are offline
    with pytest.raises(ConfigError, match="did you mean 'dinov2'"):
        get_extractor("dinov3")
    text = tmp_path / "text"
    transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(text)
    with pytest.raises(FormatError, match="does not take images"):
        get_extractor(str(text))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(FormatError, match="bad is not a vision encoder"):
        get_extractor(str(tmp_path / "bad"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(PliantError, match="need transformers"):
        get_extractor(f"hf:{dinov2}")
