"""Measures against scipy, scikit-learn, torchmetrics and torch-fidelity, where they are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pliant.evaluation import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    gaussian_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from pliant.evaluation.inception import InceptionPool3
from support.peers import fidelity, torchmetrics


def drawn(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = drawn(220, 12, 0) * 1.3 + 0.2, drawn(180, 12, 1)


def test_frechet_distance_of_torchmetrics() -> None:
    compute = torchmetrics("image.fid")._compute_fid
    a, b = FeatureStatistics.of(X), FeatureStatistics.of(Y)
    assert frechet_distance(a, b) == pytest.approx(float(compute(a.mean, a.cov, b.mean, b.cov)), rel=1e-9)


def test_kernel_distance_of_torchmetrics() -> None:
    """Theirs is the mean over random subsets of equal size; one subset that is everything is ours."""
    n = len(Y)
    theirs = torchmetrics("image.kid").poly_mmd(X[:n], Y)
    assert kernel_distance(X[:n], Y) == pytest.approx(float(theirs), rel=1e-9)


def test_everything_of_torch_fidelity() -> None:
    logits = 2 * drawn(100, 7, 3)
    with fidelity("metric_fid", "metric_kid", "metric_isc", "metric_prc") as (fid, kid, isc, prc):
        stats = [fid.fid_features_to_statistics(v) for v in (X, Y)]
        found = fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        assert frechet_distance(FeatureStatistics.of(X), FeatureStatistics.of(Y)) == pytest.approx(found, rel=1e-8)
        n = len(Y)
        options = {"kid_subsets": 1, "kid_subset_size": n, "verbose": False}
        found = kid.kid_features_to_metric(X[:n], Y, **options)["kernel_inception_distance_mean"]
        assert kernel_distance(X[:n], Y) == pytest.approx(found, rel=1e-8)
        found = isc.isc_features_to_metric(logits, splits=4, shuffle=False)
        parts = torch.tensor(inception_score(logits, 4), dtype=torch.float64)
        assert float(parts.mean()) == pytest.approx(found["inception_score_mean"], rel=1e-9)
        assert float(parts.std(correction=0)) == pytest.approx(found["inception_score_std"], rel=1e-9)
        found = prc.prc_features_to_metric(X, Y, prc_neighborhood=3, verbose=False)
        ours = precision_recall(Y, X, 3)
        assert (ours.precision, ours.recall) == pytest.approx((found["precision"], found["recall"]), rel=1e-6)


def test_inception_network_of_torch_fidelity(tmp_path: Path) -> None:
    """With random weights: features, unbiased logits and the spatial features are those of the network itself."""
    with fidelity("feature_extractor_inceptionv3") as (module,):
        torch.manual_seed(0)
        original = torch.load
        blank = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
        states: dict[str, Tensor] = {}

        def keep(self: torch.nn.Module, state: object, *args: object) -> None:
            states.update(torch.nn.Module.state_dict(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", keep)
            patch.setattr(torch, "load", lambda *_, **__: {})
            blank.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
        assert torch.load is original
        torch.save(states, tmp_path / "weights.pth")
        names = ["2048", "logits_unbiased"]
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", names, feature_extractor_weights_path=str(tmp_path / "weights.pth")
        )
        x = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
        features, logits = network(x)
        maps: list[Tensor] = []
        network.Mixed_6d.register_forward_hook(lambda _, __, output: maps.append(output))
        network(x)
    extractor = InceptionPool3.load(tmp_path / "weights.pth")
    ours, spatial = extractor.both(x.float() / 127.5 - 1)
    torch.testing.assert_close(ours, features)
    torch.testing.assert_close(extractor.logits(ours), logits)
    assert spatial.shape == (2, 2023)
    # ADM takes the first seven channels of TensorFlow's (N, 17, 17, C), flattened.
    torch.testing.assert_close(spatial, maps[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1))


def test_statistics_of_numpy() -> None:
    s = FeatureStatistics.of(X)
    assert np.allclose(s.cov.numpy(), np.cov(X.numpy(), rowvar=False), rtol=1e-12)


def test_kernels_of_scikit_learn() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = X.numpy(), Y.numpy()
    n, m, d = len(x), len(y), x.shape[1]
    kxx, kyy, kxy = (
        pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / d, coef0=1) for a, b in ((x, x), (y, y), (x, y))
    )
    expected = (kxx.sum() - kxx.trace()) / (n * (n - 1)) + (kyy.sum() - kyy.trace()) / (m * (m - 1)) - 2 * kxy.mean()
    assert kernel_distance(X, Y) == pytest.approx(expected, rel=1e-9)
    u, v = (w / np.linalg.norm(w, axis=1, keepdims=True) for w in (x, y))
    gxx, gyy, gxy = (pairwise.rbf_kernel(a, b, gamma=1 / 200) for a, b in ((u, u), (v, v), (u, v)))
    assert gaussian_distance(X, Y) == pytest.approx(1000 * (gxx.mean() + gyy.mean() - 2 * gxy.mean()), rel=1e-6)


def test_neighbours_of_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    real, fake, k = Y.numpy(), X.numpy(), 5

    def radii(points: np.ndarray) -> np.ndarray:
        return neighbors.NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, -1]

    distance = np.linalg.norm(fake[:, None] - real[None], axis=2)
    inside = distance <= radii(real)
    found = density_coverage(Y, X, k)
    assert found.density == pytest.approx(inside.sum() / (k * len(fake)), rel=1e-9)
    assert found.coverage == pytest.approx(inside.any(0).mean(), rel=1e-9)
    shares = precision_recall(Y, X, k)
    assert shares.precision == pytest.approx(inside.any(1).mean(), rel=1e-9)
    assert shares.recall == pytest.approx((radii(fake) >= distance.T).any(1).mean(), rel=1e-9)
