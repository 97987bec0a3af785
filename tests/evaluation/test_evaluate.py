"""The whole way from a sampler to a report, with a sampler that replays real digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pliant.errors import ConfigError, DataError, FormatError, ShapeError
from pliant.evaluation import (
    FeatureStatistics,
    ImageSet,
    assigned_labels,
    digits,
    evaluate,
    evaluate_images,
    from_uint8,
    get_extractor,
    load_reference,
    read_npz,
    reference_of,
    save_reference,
    to_uint8,
    write_npz,
)
from pliant.evaluation import references as references_module

EXTRACTOR = get_extractor("digits-classifier")


def replay(labels: torch.Tensor, seeds: list[int], noise: float = 0.0) -> torch.Tensor:
    """A real training digit of each class, chosen and disturbed by the seed alone."""
    x, y = digits("train").tensors()
    out = []
    for label, seed in zip(labels.tolist(), seeds, strict=True):
        g = torch.Generator().manual_seed(seed)
        of_class = x[y == label]
        image = of_class[int(torch.randint(len(of_class), (1,), generator=g))]
        out.append(image + noise * torch.randn(image.shape, generator=g))
    return torch.stack(out)


def test_report_orders_samplers_and_counts_classes() -> None:
    reference = load_reference("digits", EXTRACTOR)
    good = evaluate(replay, reference, EXTRACTOR, 200, num_classes=10, repeats=2)
    poor = evaluate(lambda y, s: replay(y, s, 0.6), reference, EXTRACTOR, 200, num_classes=10, repeats=2)
    assert poor.distance.mean > 3 * good.distance.mean
    assert good.distance.std is not None and good.distance.std < poor.distance.mean
    assert good.class_accuracy is not None and good.class_accuracy.mean > 0.99
    assert poor.class_accuracy is not None and poor.class_accuracy.mean < good.class_accuracy.mean
    assert good.extrapolated is not None and good.extrapolated < good.distance.mean
    assert good.kernel is not None and poor.kernel is not None and poor.kernel.mean > good.kernel.mean
    assert good.precision is not None and good.precision.mean > 0.9
    # Asked for the wrong classes, the same images are the wrong answers.
    shifted = evaluate(lambda y, s: replay((y + 1) % 10, s), reference, EXTRACTOR, 50, num_classes=10)
    assert shifted.class_accuracy is not None and shifted.class_accuracy.mean < 0.05


def test_numbers_do_not_depend_on_the_batch() -> None:
    reference = load_reference("digits:test", EXTRACTOR)
    seen: list[tuple[int, int]] = []
    a = evaluate(replay, reference, EXTRACTOR, 40, batch=40, num_classes=10, progress=lambda i, n: seen.append((i, n)))
    b = evaluate(replay, reference, EXTRACTOR, 40, batch=7, num_classes=10)
    assert b.distance.mean == pytest.approx(a.distance.mean, rel=1e-4)
    assert seen == [(40, 40)]


def test_recipe_is_complete_and_serialisable() -> None:
    reference = load_reference("digits:train", EXTRACTOR)
    facts = {"solver": "dpmpp-2m", "nfe": 20, "guidance": "cfg 1.5", "plan_sha256": "ab12"}
    report = evaluate(
        replay,
        reference,
        EXTRACTOR,
        20,
        num_classes=10,
        class_sampling="random",
        first_seed=5,
        describe=facts,
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["metric"] == "Fréchet distance (digits-classifier)"
    recipe = data["recipe"]
    assert {k: recipe[k] for k in facts} == facts
    assert recipe["images"] == 20 and recipe["reference_images"] == 1437 and recipe["seeds"].startswith("5..24")
    assert recipe["reference_sha256"] == digits("train").fingerprint()
    assert "hash of the seed" in recipe["class_sampling"] and "8x8" in recipe["preprocessing"]
    text = str(report)
    for part in ("Fréchet distance (digits-classifier)", "dpmpp-2m", "ab12", recipe["reference_sha256"]):
        assert part in text
    assert "FID" not in text


def test_labels_depend_on_the_seed_alone() -> None:
    assert assigned_labels([3, 12, 20], 10).tolist() == [3, 2, 0]
    drawn = assigned_labels(range(5000), 10, "random")
    assert torch.equal(assigned_labels([4321], 10, "random"), drawn[4321:4322])
    assert drawn.bincount(minlength=10).min() > 400
    assert assigned_labels([1, 2], None).tolist() == [0, 0]
    with pytest.raises(ConfigError):
        assigned_labels([1], 10, "uniform")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        assigned_labels([1], 0)


def test_measuring_a_file_equals_measuring_the_sampler(tmp_path: Path) -> None:
    reference = reference_of(digits("test"), EXTRACTOR)
    direct = evaluate(replay, reference, EXTRACTOR, 30, num_classes=10)
    images = to_uint8(replay(torch.arange(30) % 10, list(range(30))))
    stored = evaluate_images(ImageSet("stored", images), reference, EXTRACTOR)
    assert stored.distance.mean == pytest.approx(direct.distance.mean, rel=1e-4)
    assert stored.class_accuracy is None and len(stored.recipe["samples_sha256"]) == 64
    write_npz(tmp_path / "s.npz", images)
    from_file = evaluate_images(read_npz(tmp_path / "s.npz"), reference, EXTRACTOR)
    assert from_file.distance == stored.distance


def test_reference_kinds(tmp_path: Path) -> None:
    cifar = get_extractor("cifar10-classifier")
    rgb = digits("test").images.expand(-1, 3, -1, -1).contiguous()
    direct = reference_of(ImageSet("rgb", rgb), cifar)
    write_npz(tmp_path / "r.npz", rgb)
    from_npz = load_reference(tmp_path / "r.npz", cifar)
    assert torch.allclose(from_npz.statistics.cov, direct.statistics.cov, atol=1e-6)
    direct.statistics.save(tmp_path / "r.safetensors")
    saved = load_reference(tmp_path / "r.safetensors", cifar)
    assert torch.equal(saved.statistics.mean, direct.statistics.mean)
    assert saved.name == "rgb" and saved.features is None
    report = evaluate_images(ImageSet("rgb", rgb), saved, cifar)
    assert report.distance.mean == pytest.approx(0, abs=1e-4) and report.kernel is None and report.spatial is None

    with pytest.raises(DataError, match="pick that extractor"):
        load_reference(tmp_path / "r.safetensors", EXTRACTOR)
    (tmp_path / "r.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind"):
        load_reference(tmp_path / "r.txt", cifar)
    with pytest.raises(DataError, match="does not exist"):
        load_reference(tmp_path / "none.npz", cifar)
    with pytest.raises(DataError, match="splits"):
        load_reference("digits:dev", EXTRACTOR)
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(FormatError):
        load_reference(tmp_path / "bad.npz", cifar)


def test_stored_inception_statistics_are_not_mistaken_for_others(tmp_path: Path) -> None:
    """ADM reference files hold images and mu/sigma; only Inception may use the latter."""
    import numpy as np

    rgb = digits("test").images[:40].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    np.savez(tmp_path / "adm.npz", arr_0=rgb, mu=np.zeros(2048), sigma=np.eye(2048))
    reference = load_reference(tmp_path / "adm.npz", get_extractor("cifar10-classifier"))
    assert reference.statistics.dim == 128 and reference.statistics.n == 40


def test_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reference_of(digits("test"), EXTRACTOR)
    monkeypatch.setattr(references_module, "_measured", lambda *_: pytest.fail("computed again"))
    reference_of(digits("test"), EXTRACTOR)


def test_bad_calls_are_refused() -> None:
    reference = load_reference("digits:test", EXTRACTOR)
    with pytest.raises(ConfigError):
        evaluate(replay, reference, EXTRACTOR, 1)
    with pytest.raises(ConfigError):
        evaluate(replay, reference, EXTRACTOR, 4, batch=0)
    with pytest.raises(ConfigError):
        evaluate(replay, reference, EXTRACTOR, 4, class_sampling="all", num_classes=3)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="for 4 seeds"):
        evaluate(lambda y, s: torch.zeros(1, 1, 8, 8), reference, EXTRACTOR, 4)
    with pytest.raises(DataError, match="diverged"):
        evaluate(lambda y, s: torch.full((len(s), 1, 8, 8), float("nan")), reference, EXTRACTOR, 4)
    with pytest.raises(DataError, match="equal repeats"):
        evaluate_images(digits("test"), reference, EXTRACTOR, repeats=7)
    foreign = references_module.Reference("x", FeatureStatistics.of(torch.randn(9, 32), {"extractor": "other"}))
    with pytest.raises(DataError, match="differ in extractor"):
        evaluate(replay, foreign, EXTRACTOR, 4)


class Pretender:
    """Something small that calls itself Inception."""

    name, dim, preprocessing, fingerprint = "inception-v3-pool3", 4, "none", "f" * 64
    spatial_name = "corners"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.both(images)[0]

    def both(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = images.flatten(1)
        return flat[:, 20:24], flat[:, :3]


def test_adm_reference_files(tmp_path: Path) -> None:
    """mu, sigma, mu_s and sigma_s as they are; the kernel distances and shares from arr_0."""
    import numpy as np

    rgb = digits("test").images[:40].expand(-1, 3, -1, -1)
    stored = {"mu": np.arange(4.0), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": 2 * np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=rgb.permute(0, 2, 3, 1).numpy(), **stored)
    reference = load_reference(tmp_path / "adm.npz", Pretender())
    assert reference.statistics.mean.tolist() == [0, 1, 2, 3] and reference.statistics.n is None
    assert reference.spatial is not None and torch.equal(reference.spatial.cov, 2 * torch.eye(3, dtype=torch.float64))
    assert reference.features is not None and reference.features.shape == (40, 4)
    assert len(reference.statistics.provenance["reference_sha256"]) == 64
    report = evaluate_images(ImageSet("rgb", rgb.contiguous()), reference, Pretender())
    assert report.spatial is not None and report.precision is not None and report.precision.mean == 1.0
    text = str(report)
    for name in ("FID (inception-v3-pool3)", "sFID (", "KID (", "reference_images: not stated"):
        assert name in text

    save_reference(tmp_path / "again.npz", reference)
    with np.load(tmp_path / "again.npz") as file:  # as another evaluator reads it
        assert {k: file[k].tolist() for k in file.files} == {k: v.tolist() for k, v in stored.items()}
    bare = load_reference(tmp_path / "again.npz", Pretender())
    assert torch.equal(bare.statistics.mean, reference.statistics.mean) and bare.features is None
    with pytest.raises(FormatError, match="its mu and sigma are Inception's"):
        load_reference(tmp_path / "again.npz", EXTRACTOR)


def test_large_references_keep_a_fixed_random_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders come class by class: the first ones would be of one class."""
    monkeypatch.setattr(references_module, "KEPT_FEATURES", 50)
    images = ImageSet("sorted", digits("test").images[digits("test").labels.argsort()])  # type: ignore[union-attr]
    whole = EXTRACTOR(from_uint8(images.images))
    parts = [reference_of(images, EXTRACTOR, batch).features for batch in (360, 77)]
    references_module._CACHE.clear()
    again = reference_of(images, EXTRACTOR, 100).features
    assert parts[0] is not None and again is not None
    assert parts[0].shape == (50, 32) and torch.allclose(parts[0], again, atol=1e-5)
    places = torch.cdist(again, whole).argmin(1)
    assert places.min() < 40 and places.max() > 320
