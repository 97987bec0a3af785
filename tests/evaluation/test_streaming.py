"""Measuring a stream: the same numbers as from everything at once, in memory that does not grow."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from pliant.evaluation import (
    FeatureStatistics,
    Predictions,
    digits,
    evaluate,
    extract,
    from_uint8,
    get_extractor,
    load_reference,
)
from pliant.evaluation.streaming import Measured

EXTRACTOR = get_extractor("digits-classifier")
IMAGES = digits("test").images


def measured(sizes: list[int], cap: int) -> Measured:
    found, place = Measured(), 0
    for part in IMAGES[: sum(sizes)].split(sizes):
        found.add(EXTRACTOR, part, place, digits("test").labels[place : place + len(part)], cap)  # type: ignore[index]
        place += len(part)
    return found


def test_stream_equals_the_whole() -> None:
    found = measured([7, 100, 1, 52], cap=110)
    features = extract(EXTRACTOR, [IMAGES[:160]])
    whole = FeatureStatistics.of(features)
    torch.testing.assert_close(found.moments.statistics().cov, whole.cov, rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.features, features[:110], atol=1e-5)
    assert found.asked == 160 and found.right >= 155
    assert found.predictions is not None
    score = Predictions.of(EXTRACTOR.logits(features)).score  # type: ignore[attr-defined]
    assert found.predictions.score == pytest.approx(score, rel=1e-5)
    spatial = EXTRACTOR.both(from_uint8(IMAGES[:160]))[1]  # type: ignore[attr-defined]
    assert spatial.shape == (160, 7 * 4 * 4)
    assert found.spatial is not None
    torch.testing.assert_close(found.spatial.statistics().cov, FeatureStatistics.of(spatial).cov, rtol=1e-5, atol=1e-8)


def test_parts_of_several_processes_join() -> None:
    """Batches dealt out in turn and merged are those of one process, features in order."""
    whole, hands = measured([40] * 4, cap=100), [Measured(), Measured()]
    for number, part in enumerate(IMAGES[:160].split(40)):
        labels = digits("test").labels[40 * number : 40 * number + 40]  # type: ignore[index]
        hands[number % 2].add(EXTRACTOR, part, 40 * number, labels, 100)
    hands[0].merge(hands[1])
    assert torch.equal(hands[0].features, whole.features)
    assert (hands[0].right, hands[0].asked) == (whole.right, whole.asked)
    torch.testing.assert_close(hands[0].moments.scatter, whole.moments.scatter, rtol=1e-12, atol=1e-12)


class Counting:
    """An extractor that knows how many of its results are still alive."""

    name, dim, preprocessing, fingerprint = "counting", 3, "none", "0" * 64

    def __init__(self) -> None:
        self.rows: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __call__(self, images: Tensor) -> Tensor:
        features = images.flatten(1)[:, :3].clone()
        self.rows.add(features)
        self.most = max(self.most, sum(len(r) for r in self.rows))
        return features


def test_no_more_than_the_cap_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """2000 images, a cap of 100: neither images nor features pile up."""
    import importlib

    module = importlib.import_module("pliant.evaluation.streaming")
    monkeypatch.setattr(Measured.add, "__defaults__", (None, 100))
    monkeypatch.setattr(importlib.import_module("pliant.evaluation.evaluate"), "KEPT_FEATURES", 100)
    extractor, alive, most = Counting(), weakref.WeakSet(), 0
    reference = load_reference("digits:test", extractor)
    extractor.most = 0

    def sampler(labels: Tensor, seeds: list[int]) -> Tensor:
        nonlocal most
        images = torch.rand(len(seeds), 1, 8, 8, generator=torch.Generator().manual_seed(seeds[0])) * 2 - 1
        alive.add(images)
        most = max(most, sum(len(i) for i in alive))
        return images

    report = evaluate(sampler, reference, extractor, 2000, batch=50)
    assert report.recipe["images"] == 2000 and report.recipe["sample_features"] == 100
    assert report.extrapolated is None and report.interval is None and report.density is not None
    assert most <= 100  # the batch at hand and the one before
    assert extractor.most <= 200  # 100 kept, two batches at hand
    assert module.KEPT_FEATURES == 10_000
