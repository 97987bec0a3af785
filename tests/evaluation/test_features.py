"""Shipped extractors do what their cards say; the Inception border behaves with or without its package."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pliant.errors import ConfigError, FormatError, PliantError, ShapeError
from pliant.evaluation import (
    Classifier,
    FeatureExtractor,
    available_extractors,
    digits,
    distance_name,
    extract,
    from_uint8,
    get_extractor,
    images_from_parquet,
)
from pliant.evaluation.features import ASSETS, ClassifierExtractor
from pliant.evaluation.inception import InceptionPool3

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SHIPPED = {"digits-classifier": (32, 1, 8), "cifar10-classifier": (128, 3, 32)}


@pytest.mark.parametrize("name", SHIPPED)
def test_assets_load_and_are_small(name: str) -> None:
    dim, channels, size = SHIPPED[name]
    extractor = get_extractor(name)
    assert isinstance(extractor, FeatureExtractor) and isinstance(extractor, Classifier)
    assert extractor.dim == dim
    assert (ASSETS / name / "model.safetensors").stat().st_size < 1_500_000
    card = (ASSETS / name / "README.md").read_text(encoding="utf-8")
    accuracy = json.loads((ASSETS / name / "config.json").read_text())["test_accuracy"]
    assert f"{100 * accuracy:.2f} %" in card and "scripts/train_extractor.py" in card
    features = extractor(torch.zeros(2, channels, size, size))
    assert features.shape == (2, dim) and features.dtype == torch.float32 and not features.requires_grad


def test_digits_reach_the_accuracy_of_the_card() -> None:
    extractor, held_out = get_extractor("digits-classifier"), digits("test")
    assert isinstance(extractor, ClassifierExtractor) and held_out.labels is not None
    predicted = extractor.classify(extract(extractor, held_out.batches(128)))
    accuracy = float((predicted == held_out.labels).double().mean())
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(extractor.test_accuracy, abs=1e-4)


def test_cifar_reaches_the_accuracy_of_the_card() -> None:
    path = SHARED / "cifar10-test.parquet"
    if not path.exists():
        pytest.skip(f"CIFAR-10 is not part of the repository: {path} is missing")
    pytest.importorskip("pyarrow")
    extractor, images = get_extractor("cifar10-classifier"), images_from_parquet(path)
    assert isinstance(extractor, ClassifierExtractor) and images.labels is not None
    predicted = extractor.classify(extract(extractor, [images.images[:1000]]))
    accuracy = float((predicted == images.labels[:1000]).double().mean())
    assert accuracy == pytest.approx(extractor.test_accuracy, abs=0.035)  # 3 standard errors of 1000 images


def test_features_do_not_depend_on_the_batch() -> None:
    extractor, images = get_extractor("digits-classifier"), digits("test")
    whole = extract(extractor, images.batches(360))
    for size in (1, 7, 100):
        assert torch.allclose(extract(extractor, images.batches(size)), whole, atol=1e-5)


def test_grey_and_other_sizes_are_adapted_and_wrong_channels_refused() -> None:
    cifar, small = get_extractor("cifar10-classifier"), get_extractor("digits-classifier")
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(cifar(grey), cifar(grey.expand(-1, 3, -1, -1)))
    assert cifar(torch.zeros(1, 3, 48, 20)).shape == (1, 128)
    x = from_uint8(digits("test").images[:200])
    larger = torch.nn.functional.interpolate(x, scale_factor=4.0, mode="nearest")
    assert isinstance(small, ClassifierExtractor)
    agree = small.classify(small(larger)) == small.classify(small(x))
    assert agree.double().mean() > 0.95
    rgb = x.expand(-1, 3, -1, -1)  # grey digits as an ADM .npz stores them
    assert torch.equal(small(rgb), small(x))
    for bad in (torch.rand(2, 3, 8, 8), torch.zeros(8, 8)):
        with pytest.raises(ShapeError):
            small(bad)


def test_names_say_what_was_measured() -> None:
    assert distance_name(get_extractor("digits-classifier")) == "Fréchet distance (digits-classifier)"
    assert "inception-v3-pool3" in available_extractors()
    with pytest.raises(ConfigError, match="did you mean 'digits-classifier'"):
        get_extractor("digit-classifier")
    with pytest.raises(ConfigError):
        get_extractor("../extractors/digits-classifier")


def test_damaged_assets_are_refused(tmp_path: Path) -> None:
    def damaged(file: str, content: bytes) -> None:
        shutil.copytree(ASSETS / "digits-classifier", tmp_path / "e", dirs_exist_ok=True)
        (tmp_path / "e" / file).write_bytes(content)
        with pytest.raises(FormatError):
            ClassifierExtractor.load(tmp_path / "e")

    damaged("model.safetensors", b"\x00" * 64)
    damaged("config.json", b"{")
    damaged("config.json", b"{}")
    damaged("config.json", b'{"name": "x", "test_accuracy": 1, "network": {"width": 3}}')
    with pytest.raises(FormatError):
        ClassifierExtractor.load(tmp_path / "missing")


def test_import_stays_light() -> None:
    code = (
        "import sys, pliant.evaluation;"
        "heavy = {'scipy', 'sklearn', 'pandas', 'pyarrow', 'datasets', 'torchvision', 'torch_fidelity'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


FAKE = """
import torch
URL_INCEPTION_V3 = "https://example.invalid/weights-fake.pth"
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.w = torch.load(feature_extractor_weights_path, weights_only=False)["w"]
        self.fc = torch.nn.Linear(2048, 1008)
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 192, 1)
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        self.Mixed_6d.branch1x1(x.float())
        return (x.float().mean(dim=(1, 2, 3))[:, None] * self.w,)
"""


@pytest.fixture
def fake_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A torch_fidelity whose package import fails as the real one does beside a mismatched torchvision."""
    package = tmp_path / "site" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (package / "feature_extractor_inceptionv3.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [m for m in sys.modules if m.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path


def test_inception_loads_without_torchvision_and_is_the_only_fid(fake_fidelity: Path) -> None:
    weights = fake_fidelity / "weights.pth"
    torch.save({"w": torch.ones(2048)}, weights)
    extractor = InceptionPool3.load(weights)
    assert isinstance(extractor, FeatureExtractor)
    assert extractor(torch.zeros(2, 1, 8, 8)).shape == (2, 2048)
    assert extractor.fingerprint == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert distance_name(extractor) == "FID (inception-v3-pool3)"
    assert "torch_fidelity" not in sys.modules


def test_inception_refuses_weights_that_run_code(fake_fidelity: Path) -> None:
    marker = fake_fidelity / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (marker,)  # type: ignore[return-value]

    torch.save({"w": Evil()}, fake_fidelity / "evil.pth")
    with pytest.raises(FormatError, match=r"evil\.pth"):
        InceptionPool3.load(fake_fidelity / "evil.pth")
    assert not marker.exists()
    with pytest.raises(FormatError):
        InceptionPool3.load(fake_fidelity / "missing.pth")


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PliantError, match=r"pliant\[metrics\]"):
        InceptionPool3.load()
