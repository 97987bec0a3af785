"""Flow matching against closed forms, and label dropout."""

import dataclasses

import pytest
import torch

from pliant.errors import ConfigError
from pliant.paths import get_path, get_time_density
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, FlowMatching, drop_labels
from support.training import formula_denoiser


def constant_batch(n: int, value: float = 0.5) -> Batch:
    return Batch(torch.full((n, 1, 8, 8), value), torch.arange(n) % 10)


def test_exact_velocity_has_no_loss() -> None:
    """All data at one point m: the velocity at x is (x - m)/t on the linear path."""
    denoiser = formula_denoiser(lambda x, t, y: (x - 0.5) / t[:, None, None, None])
    loss = FlowMatching(get_time_density("uniform", low=0.05))(denoiser, constant_batch(32), Draws.single(32))
    assert float(loss.loss) < 1e-10


def test_zero_network_on_the_linear_path() -> None:
    """Target eps - x0 with x0 = m: the expected loss is 1 + m^2."""
    denoiser = formula_denoiser(lambda x, t, y: torch.zeros_like(x))
    loss = FlowMatching()(denoiser, constant_batch(512), Draws.single(512))
    assert float(loss.loss) == pytest.approx(1.25, abs=5 * (2 / (512 * 64)) ** 0.5)


def test_zero_network_on_the_trigonometric_path() -> None:
    """Target (pi/2)(cos(pi t/2) eps - sin(pi t/2) m); at a fixed t the loss has mean (pi/2)^2 (cos^2 + m^2 sin^2)."""
    denoiser = formula_denoiser(lambda x, t, y: torch.zeros_like(x), path="gvp")
    objective = FlowMatching(get_time_density("uniform", low=0.5, high=0.5))
    loss = objective(denoiser, constant_batch(512), Draws.single(512)).loss
    assert float(loss) == pytest.approx((torch.pi / 2) ** 2 * 0.5 * 1.25, rel=0.03)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_other_predictions_are_converted(prediction: str) -> None:
    """The exact x0 = m as x0-, eps- and v-prediction gives the exact velocity."""

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None, None]
        eps, x0 = (x - (1 - t) * 0.5) / t, torch.full_like(x, 0.5)
        return {"sample": x0, "epsilon": eps, "v_prediction": (1 - t) * eps - t * x0}[prediction]

    denoiser = formula_denoiser(network, prediction=prediction)  # type: ignore[arg-type]
    objective = FlowMatching(get_time_density("uniform", low=0.1, high=0.9))
    assert float(objective(denoiser, constant_batch(32), Draws.single(32)).loss) < 1e-8


def test_the_network_sees_states_times_and_labels_of_the_path() -> None:
    seen = {}

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, t=t, y=y)
        return torch.zeros_like(x)

    FlowMatching(class_dropout=1.0)(formula_denoiser(network), constant_batch(2000), Draws.single(2000))
    assert bool((seen["y"] == 10).all())
    # Var[x_t] = t^2 around (1-t) m, per sample over 64 pixels.
    spread = ((seen["x"] - (1 - seen["t"][:, None, None, None]) * 0.5) / seen["t"][:, None, None, None]).square()
    assert float(spread.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(seen["t"].mean()) == pytest.approx(0.5, abs=0.03)


def test_label_dropout_rate() -> None:
    denoiser, n = formula_denoiser(lambda x, t, y: x), 20000
    batch = Batch(torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64))
    dropped = drop_labels(batch, denoiser, 0.1, Draws.single(n)) == 10
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=5 * (0.09 / n) ** 0.5)
    assert not bool((drop_labels(batch, denoiser, 0.0, Draws.single(n)) == 10).any())


def test_dropout_probability_does_not_move_other_draws() -> None:
    denoiser = formula_denoiser(lambda x, t, y: 0.3 * x)
    losses = [FlowMatching(class_dropout=p)(denoiser, constant_batch(8), Draws.single(8)).loss for p in (0.0, 0.5)]
    assert torch.equal(*losses)


def test_dropping_labels_of_a_network_without_null_label_is_refused() -> None:
    from dataclasses import replace

    denoiser = formula_denoiser(lambda x, t, y: x)
    denoiser.network.config = replace(denoiser.network.config, class_dropout=0.0)
    batch = constant_batch(4)
    assert torch.isfinite(FlowMatching(class_dropout=0.0)(denoiser, batch, Draws.single(4)).loss)
    with pytest.raises(ConfigError, match="label"):
        FlowMatching(class_dropout=0.1)(denoiser, batch, Draws.single(4))


@pytest.mark.parametrize("dimensions", [4, 2048])
def test_pfgmpp_trains_on_its_own_noise(dimensions: int) -> None:
    """|eps|^2 / N of its law is F(N, D) distributed: heavy tails for few augmented dimensions."""
    stats = pytest.importorskip("scipy.stats")
    seen = {}

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    path = get_path("pfgmpp", dimensions=dimensions)
    denoiser = dataclasses.replace(formula_denoiser(network, prediction="sample"), path=path)
    FlowMatching(get_time_density("uniform", low=0.1))(denoiser, constant_batch(2000), Draws.single(2000, seed=1))
    eps = (seen["x"] - 0.5) / path.alpha_sigma(seen["t"]).sigma[:, None, None, None].float()
    squares = eps.double().square().mean((1, 2, 3)).numpy()
    assert stats.kstest(squares, stats.f(64, dimensions).cdf).pvalue > 0.01
    assert stats.kstest(squares, stats.chi2(64, scale=1 / 64).cdf).pvalue < (1e-6 if dimensions == 4 else 2.0)
