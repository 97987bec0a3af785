"""Metrics of errors, the densities of training times that came with them, and annealed noise (sheet C, 3 and 4)."""

from __future__ import annotations

import math

import pytest
import torch

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.paths import EDM, Linear, NetworkTime, Preconditioning, get_path, get_time_density
from pliant.training.couplings import Annealed, anneal, blended
from pliant.training.draws import Draws
from pliant.training.flow_config import CouplingConfig, MetricConfig
from pliant.training.losses import (
    Compared,
    ElementHuber,
    PerceptualHuber,
    PseudoHuber,
    SquaredError,
    Sum,
    pseudo_huber,
)
from pliant.training.objectives import Batch, FlowMatching
from pliant.training.perceptual import ClassifierFeatures, get_perceptual
from support.training import formula_denoiser


def compared(error: torch.Tensor, t: float = 0.5) -> Compared:
    """Only the error matters: the target is 0."""
    zero = torch.zeros_like(error)
    return Compared(error, zero, torch.full((len(error),), t, dtype=torch.float64), lambda: error, zero)


def test_u_shaped_times() -> None:
    """Sheet C, 3 (1): the closed CDF, symmetry, and the mass at the ends."""
    t = get_time_density("u-shaped").sample(200_000, torch.Generator().manual_seed(0))
    cdf = 0.5 + torch.sinh(4.0 * (t.sort()[0] - 0.5)) / (2.0 * math.sinh(2.0))
    rank = (torch.arange(len(t), dtype=torch.float64) + 0.5) / len(t)
    assert float((cdf - rank).abs().max()) < 0.004
    assert float(t.mean()) == pytest.approx(0.5, abs=0.002)
    assert float(((t < 0.2) | (t > 0.8)).double().mean()) == pytest.approx(0.584, abs=0.005)
    variance = 0.25 + 2.0 / 16.0 - 1.0 / (4.0 * math.tanh(2.0))
    assert float((t - 0.5).square().mean()) == pytest.approx(variance, abs=1e-3)
    assert float(t.min()) >= 1e-5 and float(t.max()) <= 1.0 - 1e-5
    assert get_time_density("u-shaped", a=4.0, eps=0.0).to_config() == {"name": "u-shaped", "a": 4.0, "eps": 0.0}
    with pytest.raises(ConfigError, match="a > 0"):
        get_time_density("u-shaped", a=0.0)


def test_discrete_times() -> None:
    t = get_time_density("discrete", times=[1.0, 0.5]).sample(1000, torch.Generator().manual_seed(0))
    assert set(t.tolist()) == {1.0, 0.5} and 400 < int((t == 1.0).sum()) < 600
    with pytest.raises(ConfigError, match="times in"):
        get_time_density("discrete", times=[1.5])


def test_huber_limits() -> None:
    """Sheet C, 3 (4): quadratic for small errors, linear for large ones; c grows with the dimension."""
    direction = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, d = direction.flatten(1).norm(dim=1), 192
    c = 0.00054 * d
    small, large = pseudo_huber(1e-4 * direction, 0.00054), pseudo_huber(1e5 * direction, 0.00054)
    torch.testing.assert_close(small, (1e-4 * norm) ** 2 / (2.0 * c * d), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(large, 1e5 * norm / d, rtol=1e-3, atol=0.0)
    exact = ((direction.flatten(1).square().sum(1) + c * c).sqrt() - c) / d
    torch.testing.assert_close(pseudo_huber(direction, 0.00054), exact)
    with pytest.raises(ConfigError, match="positive"):
        PseudoHuber(0.0)


def test_element_huber() -> None:
    error = torch.tensor([[3.0, 0.0], [0.004, 0.004]])
    found = ElementHuber(0.001)(compared(error))
    expected = [(math.sqrt(9.0 + 1e-6) - 1e-3) / 2.0, math.sqrt(17e-6) - 1e-3]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_perceptual_huber_weights() -> None:
    """(1-t) huber + seen/t, or + seen."""
    error = torch.tensor([[3.0, 4.0]])
    seen = lambda a, b: torch.full((len(a),), 2.0)  # noqa: E731
    huber = float(pseudo_huber(error, 0.00054))
    assert float(PerceptualHuber(seen)(compared(error, 0.25))) == pytest.approx(0.75 * huber + 8.0)
    assert float(PerceptualHuber(seen, weight="1")(compared(error, 0.25))) == pytest.approx(0.75 * huber + 2.0)
    both = Sum((SquaredError(), SquaredError()))(compared(error))
    assert float(both) == pytest.approx(25.0)


def test_features_of_our_classifier_are_a_perceptual_distance() -> None:
    distance = get_perceptual("classifier:digits-classifier")
    assert isinstance(distance, ClassifierFeatures) and distance.name == "features of digits-classifier"
    from pliant.training.data import digits

    images = digits(1, (8, 8)).pixels[:40]
    a = images[:20].clone().requires_grad_(True)
    assert float(distance(a, images[:20]).detach().abs().max()) < 1e-6
    small, large = distance(a, images[:20] + 0.1), distance(a, images[20:])
    assert bool((small < large).all())
    assert float(torch.autograd.grad(large.sum(), a)[0].abs().sum()) > 0.0
    with pytest.raises(ConfigError, match="did you mean 'digits-classifier'"):
        get_perceptual("classifier:digit-classifier")
    with pytest.raises(ConfigError, match="write 'lpips'"):
        get_perceptual("vgg")


def test_absent_packages_are_named() -> None:
    import importlib.util

    from pliant.training.couplings import assignment

    x = torch.zeros(2, 1, 8, 8)
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(ConfigError, match="pip install lpips"):
            get_perceptual("lpips")(x, x)
    if importlib.util.find_spec("ot") is None:
        with pytest.raises(ConfigError, match="pip install POT"):
            assignment(x, x, "pot")


def test_metrics_by_name() -> None:
    assert isinstance(MetricConfig(name="huber").build(), PseudoHuber)
    assert MetricConfig(name="element-huber", c=0.5).build() == ElementHuber(0.5)
    perceptual = MetricConfig(name="perceptual-huber", perceptual="classifier:digits-classifier", weight="1").build()
    assert isinstance(perceptual, PerceptualHuber) and perceptual.weight == "1"
    assert CouplingConfig(name="annealed", steps=7).build() == Annealed(7)


def test_an_edm_denoiser_as_velocity_network() -> None:
    """Sheet C, 3 (2): rfpp's wrapper around EDM's exact denoiser of N(mu, sd^2)."""
    mu, sd, sigma_data = 0.3, 0.7, 0.5
    pre = Preconditioning("edm", sigma_data)
    base = formula_denoiser(lambda x, t, y: x)

    def network(x: torch.Tensor, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The F of that denoiser, from its input c_in * state."""
        sigma = torch.exp(4.0 * noise.double())[:, None, None, None]
        c = pre.coefficients(sigma)
        state = x.double() / c.inp
        clean = (sd**2 * state + sigma**2 * mu) / (sd**2 + sigma**2)
        return ((clean - c.skip * state) / c.out).to(x)

    base.network.function = network  # type: ignore[union-attr]
    edm = Denoiser(base.network, EDM(), "sample", NetworkTime(), preconditioning=pre)
    velocity = edm.on_path(Linear(), "velocity")
    t = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.98], dtype=torch.float64)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = velocity(x, t, torch.zeros(5, dtype=torch.int64)).to("velocity").double()
    w = t[:, None, None, None]
    exact = -mu + (w - (1.0 - w) * sd**2) / ((1.0 - w) ** 2 * sd**2 + w**2) * (x.double() - (1.0 - w) * mu)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- SlimFlow


@pytest.mark.parametrize("b", [0.0, 0.3, 0.7, 1.0])
def test_blended_noise_keeps_its_variance(b: float) -> None:
    """Sheet C, 4 (1)."""
    g = torch.Generator().manual_seed(0)
    z, fresh = torch.randn(100_000, generator=g), torch.randn(100_000, generator=g)
    mixed = blended(z, fresh, b)
    assert float(mixed.var()) == pytest.approx(1.0, abs=0.02)
    assert float((mixed * z).mean()) == pytest.approx(math.sqrt(1.0 - b * b), abs=0.01)


def test_annealing_schedules() -> None:
    """Sheet C, 4 (2)."""
    assert [anneal(k, 1000) for k in (0, 500, 1000, 2000)] == [1.0, 0.5, 0.0, 0.0]
    assert [anneal(k, 1000, "cosine") for k in (0, 500, 1000, 2000)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert anneal(1000, 1000, "exponential") == pytest.approx(math.exp(-1.0))
    with pytest.raises(ConfigError, match="at least 1 step"):
        Annealed(0)


def test_annealing_goes_from_fresh_noise_to_the_pairs_own() -> None:
    stored = torch.full((4, 1, 1, 1), 9.0)
    batch = Batch(torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64), sources=stored)
    path, coupling = get_path("linear"), Annealed(10)
    assert float((coupling(batch, path, Draws.single(4, step=0)).x1 - stored).abs().min()) > 1.0
    assert torch.equal(coupling(batch, path, Draws.single(4, step=10)).x1, stored)


# ------------------------------------------------------------------------------------------------------- objectives


def test_stored_pairs_are_regressed_on_their_chord() -> None:
    """With x0 = 2 z - 1 the velocity of the pair at (x, t) is known; a network that says it has no loss."""
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(2.0 * noise - 1.0, torch.zeros(6, dtype=torch.int64), sources=noise)

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w = t[:, None, None, None]
        z = (x + (1.0 - w)) / (2.0 * (1.0 - w) + w)
        return z - (2.0 * z - 1.0)

    from pliant.training.couplings import Stored

    exact = FlowMatching(class_dropout=0.0, coupling=Stored())
    assert float(exact(formula_denoiser(velocity), batch, Draws.single(6)).loss) < 1e-10
    independent = FlowMatching(class_dropout=0.0)
    assert float(independent(formula_denoiser(velocity), batch, Draws.single(6)).loss) > 0.5
    for space in ("sample", "epsilon"):
        assert float(
            FlowMatching(class_dropout=0.0, coupling=Stored(), space=space)(  # type: ignore[arg-type]
                formula_denoiser(velocity), batch, Draws.single(6)
            ).loss
        ) < 1e-10  # fmt: skip
    with pytest.raises(ConfigError, match="needs pairs"):
        exact(formula_denoiser(velocity), Batch(batch.images, batch.labels), Draws.single(6))
