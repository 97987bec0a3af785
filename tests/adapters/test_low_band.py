"""The low-band operator (sheet H, sections 0 and 1): exact claims, tested to rounding in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant import Compute, Denoiser, flexify
from pliant.adapters.alignment import alignment
from pliant.adapters.low_band import (
    ScaleAlignment,
    coarse_config,
    coarse_network,
    expand,
    read_back,
    scale_alignment,
)
from pliant.adapters.low_band_denoiser import LowBandDenoiser, low_band
from pliant.compute.bands import (
    BANDS,
    Band,
    Size,
    coefficients,
    down,
    from_coefficients,
    missing_mask,
    power_in_band,
    up,
)
from pliant.compute.scale import LowBand
from pliant.compute.spectra import CoefficientSpectrum, PowerLaw
from pliant.errors import ConfigError, ShapeError
from pliant.evaluation.spectrum import coarse_steps, switch_time, switch_times
from pliant.paths import PREDICTION_TYPES, NetworkTime, Path, Preconditioning, get_path
from pliant.solvers import Eval, Output, compile_program, run
from support import speed
from support.networks import batch, tiny_denoiser, tiny_dit

LINEAR = get_path("linear")
PATHS = [get_path(name) for name in ("linear", "vp", "cosine", "gvp", "vp-discrete", "edm")]
Field = Callable[[Tensor, Tensor], Tensor]
CASES: list[tuple[Band, Size]] = [("haar", (4, 4)), ("haar", (2, 4)), ("dct", (4, 4)), ("dct", (5, 6)), ("dct", (2, 2))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def random_field(side: Size, seed: int) -> Field:
    """A smooth non-linear function of state and time, (B, 1, *side) -> the same."""
    n = side[0] * side[1]
    first, second = noise(n, n + 1, seed=seed) / math.sqrt(n), noise(n, n, seed=seed + 1) / math.sqrt(n)

    def field(x: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat([x.flatten(1), torch.as_tensor(t).expand(len(x), 1)], dim=1)
        return (torch.tanh(inputs @ first.T) @ second.T).view_as(x)

    return field


def lifted(x: Tensor, t: Tensor, low: Field, size: Size, band: Band, power: float | Tensor = 0.0) -> Tensor:
    """The weak velocity around anything that knows the coarse grid."""
    a = scale_alignment(LINEAR, "velocity", t, x.shape[-1] * x.shape[-2] / (size[0] * size[1]), power)
    px = down(x, size, band)
    return read_back(x, px, low(a.input_scale * px, a.time), a, band)


def euler(x: Tensor, times: Tensor, velocity: Field) -> Tensor:
    for t, after in pairwise(times):
        x = x + (after - t) * velocity(x, t)
    return x


# SPEED ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("band", "size"), CASES)
@pytest.mark.parametrize("switch", [0, 1, 9, 20])
def test_weak_steps_are_speed_on_the_aligned_grid(switch: int, band: Band, size: Size) -> None:
    """Sheet H, 0 (1): the published two-grid procedure, with random non-linear networks, to 1e-12."""
    low, full = random_field(size, seed=1), random_field((8, 8), seed=3)
    n, times = noise(3, 1, 8, 8), torch.linspace(1, 0, 21, dtype=torch.float64)
    x = euler(n, times[: switch + 1], lambda x, t: lifted(x, t, low, size, band))
    x = euler(x, times[switch:], full)

    def as_numpy(field: Field) -> speed.Velocity:
        return lambda x, t: field(torch.from_numpy(x), torch.tensor(t, dtype=torch.float64)).numpy()

    r = math.sqrt(64 / (size[0] * size[1]))
    tau = times / (r - (r - 1) * times)
    expected = speed.sample(
        n.numpy(), tau[: switch + 1].numpy(), times[switch + 1 :].numpy(), as_numpy(low), as_numpy(full), size, band
    )
    assert (x - torch.from_numpy(expected)).abs().max() <= 1e-12


@pytest.mark.parametrize("band", BANDS)
def test_levels_compose(band: Band) -> None:
    """Two levels of ratio 2 are one of ratio 4, so SPEED with several scales needs nothing new."""
    smallest, x = random_field((2, 2), seed=1), noise(3, 1, 8, 8)
    for value in (0.3, 0.8, 1.0):
        t = torch.tensor(value, dtype=torch.float64)
        once = lifted(x, t, smallest, (2, 2), band)
        twice = lifted(x, t, lambda y, tau: lifted(y, tau, smallest, (2, 2), band), (4, 4), band)
        close(once, twice, 1e-12)


@pytest.mark.parametrize(("band", "size"), CASES)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_expansion_gives_a_state_of_the_path(path: Path, band: Band, size: Size) -> None:
    """Sheet H, 1 (2): the low band holds alpha X0 + sigma N to 1e-12, the rest has standard deviation sigma (1 %)."""
    x0, n, details = noise(1000, 1, *size), noise(1000, 1, *size, seed=1), noise(1000, 1, 8, 8, seed=2)
    tau = 0.1 if path.name == "edm" else 0.4
    x, t = expand(path.mix(x0, n, tau), path, tau, details, band)
    here, k = path.alpha_sigma(t), math.sqrt(64 / (size[0] * size[1]))
    assert float(path.noise_ratio(t)) == pytest.approx(k * float(path.noise_ratio(tau)), rel=1e-9)
    c = coefficients(x, size, band)
    # A clean image's coefficients are k times those of its coarse version, unit noise is unit noise.
    clean, noisy = (coefficients(up(v, (8, 8), band), size, band)[..., : size[0], : size[1]] for v in (x0, n))
    expected = here.alpha * clean + here.sigma * noisy / k
    torch.testing.assert_close(c[..., : size[0], : size[1]], expected, rtol=1e-9, atol=1e-12)
    high = c[..., missing_mask((8, 8), size)]
    assert float(high.std()) == pytest.approx(float(here.sigma), rel=0.01)
    if path.name == "linear":
        assert t == pytest.approx(k * tau / (1 + (k - 1) * tau), abs=1e-12)


# Gaussian fields --------------------------------------------------------------------------------------------------


def gaussian_velocity(c: Tensor, t: Tensor, power: Tensor) -> Tensor:
    """The exact velocity of independent Gaussian coefficients c of this power (linear path)."""
    return c * (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2)


class GaussianField:
    """An image whose coefficients in a band's basis are independent Gaussians: every velocity is known."""

    def __init__(self, power: Tensor, low: Size, band: Band) -> None:
        self.power, self.low, self.band = power, low, band

    def full(self, x: Tensor, t: Tensor) -> Tensor:
        c = gaussian_velocity(coefficients(x, self.low, self.band), t, self.power)
        return from_coefficients(c, self.low, self.band)

    def coarse(self, y: Tensor, t: Tensor) -> Tensor:
        """The same for its low band as an image; coarse "haar" images are their own coefficients, over k."""
        h, w = self.low
        power = self.power[:h, :w] * (h * w / self.power.numel())
        if self.band == "haar":
            return gaussian_velocity(y, t, power)
        c = gaussian_velocity(coefficients(y, (1, 1), "dct"), t, power)
        return from_coefficients(c, (1, 1), "dct")

    def weak(self, x: Tensor, t: Tensor, missing: bool = True) -> Tensor:
        return lifted(x, t, self.coarse, self.low, self.band, self.power if missing else 0.0)


@pytest.mark.parametrize(("band", "size"), CASES)
def test_wiener_is_the_full_field_of_gaussian_data(band: Band, size: Size) -> None:
    field, x = GaussianField(noise(8, 8).square() * 2, size, band), noise(3, 1, 8, 8)
    for t in (0.0, 0.01, 0.3, 0.7, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        close(field.weak(x, time), field.full(x, time), 1e-10)
        if t > 0:  # hold is `x/t` in the missing band and right in the low one
            hold = coefficients(field.weak(x, time, missing=False), size, band)
            c, mask = coefficients(x, size, band), missing_mask((8, 8), size)
            close(hold[..., mask], c[..., mask] / t, 1e-9)
            close(hold[..., ~mask], coefficients(field.full(x, time), size, band)[..., ~mask], 1e-10)


def test_hold_neglects_what_is_below_the_switch_time() -> None:
    """Its error is that of guessing 0 for detail, `P q/(1+q) / t^2`: SPEED's criterion times (P/(1+P))/t^2."""
    power = 0.5
    t = torch.linspace(0.5, 1, 20, dtype=torch.float64)
    state = (1 - t) ** 2 * power + t**2
    error = (1 / t - (t - (1 - t) * power) / state).square() * state
    snr = (1 - t) ** 2 * power / t**2
    close(error, power * snr / (1 + snr) / t**2)
    at = switch_time(power, 0.05)
    assert at > 0.5
    assert bool((error[t > at] < 0.05 * power / (1 + power) / at**2).all())


@pytest.fixture(scope="module")
def flux() -> GaussianField:
    """The sheet's test field: 64x64 cosine coefficients of variance 203.6 omega^-1.915."""
    return GaussianField(PowerLaw(203.6, 1.915).power((64, 64)), (32, 32), "dct")


def shares(x: Tensor, field: GaussianField) -> tuple[float, float]:
    """Final over target variance, low and missing band, of a linear map started at coefficients 1."""
    variance = coefficients(x, field.low, field.band)[0, 0].square() / field.power
    mask = missing_mask((64, 64), field.low)
    return float(variance[~mask].mean()), float(variance[mask].mean())


def walked(field: GaussianField, steps: int, weak: int, missing: bool) -> tuple[float, float]:
    """The samplers here are linear and diagonal, so one run tells all variances exactly."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = from_coefficients(torch.ones(1, 1, 64, 64, dtype=torch.float64), field.low, field.band)
    x = euler(x, times[: weak + 1], lambda x, t: field.weak(x, t, missing))
    return shares(euler(x, times[weak:], field.full), field)


@pytest.mark.parametrize(
    ("delta", "official", "safe", "same"),
    [
        (0.01, (4, 0.937, 0.942), (2, 0.945, 0.944), (4, 0.945, 0.942)),
        (0.05, (7, 0.926, 0.939), (4, 0.945, 0.942), (7, 0.945, 0.936)),
        (0.1, (10, 0.912, 0.932), (6, 0.945, 0.938), (10, 0.945, 0.924)),
        (0.2, (13, 0.897, 0.921), (8, 0.945, 0.932), (13, 0.945, 0.904)),
        (0.5, (19, 0.867, 0.881), (12, 0.945, 0.912), (19, 0.945, 0.832)),
    ],
)
def test_table_of_the_sheet(
    flux: GaussianField, delta: float, official: tuple[float, ...], safe: tuple[float, ...], same: tuple[float, ...]
) -> None:
    """Sheet H, 0 (2): what SPEED's patched grid loses and alignment keeps, within 0.01; wiener loses nothing."""
    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    at = switch_times(PowerLaw(203.6, 1.915), (64, 64), [0.5], delta)
    assert coarse_steps(times, at)[0] == official[0] == same[0]
    assert coarse_steps(times, at, ratios=[2.0])[0] == safe[0]
    for k, low, high in (safe, same):
        assert walked(flux, 50, int(k), False) == pytest.approx((low, high), abs=0.01)
    full = walked(flux, 50, 0, False)
    assert full == pytest.approx((0.941, 0.945), abs=0.01)
    assert walked(flux, 50, int(same[0]), True) == pytest.approx(full, abs=1e-9)
    # Officially: the coarse run on the grid's own times, expansion, and one giant step to the grid's next time.
    k = int(official[0])
    y = from_coefficients(torch.ones(1, 1, 32, 32, dtype=torch.float64), (1, 1), "dct")
    y = euler(y, times[: k + 1], flux.coarse)
    fresh = from_coefficients(torch.ones(1, 1, 64, 64, dtype=torch.float64), (32, 32), "dct")
    x, start = expand(y, LINEAR, float(times[k]), fresh, "dct")
    x = euler(x, torch.cat([torch.tensor([start], dtype=torch.float64), times[k + 1 :]]), flux.full)
    assert shares(x, flux) == pytest.approx(official[1:], abs=0.01)


def test_many_steps_of_the_sheet(flux: GaussianField) -> None:
    """S = 400, delta = 0.2: 100 coarse steps keep the low band; the missing one pays for the late switch."""
    assert walked(flux, 400, 0, False) == pytest.approx((0.992, 0.993), abs=0.01)
    assert walked(flux, 400, 100, False) == pytest.approx((0.995, 0.951), abs=0.01)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun", "unipc-2", "flow-ab-2", "dpm-2s"])
def test_any_solver_on_one_grid(solver: str) -> None:
    """A low-band start with wiener is the full run for every solver; with hold it differs in the missing band only."""
    field, switch, steps = GaussianField(PowerLaw(30.0, 2.0).power((8, 8)), (4, 4), "dct"), 6, 16
    times = torch.linspace(0.99, 0.02, steps + 1, dtype=torch.float64)
    program = compile_program(LINEAR, times, solver, "velocity")
    start = noise(4, 1, 8, 8)

    def final(weak: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def evaluate(x: Tensor, ev: Eval) -> Output:
            t = torch.tensor(ev.node.t, dtype=torch.float64)
            return Output((weak if ev.step < switch else field.full)(x, t))

        for result in run(program, start, evaluate):
            last = result.x
        return last

    full = final(field.full)
    close(final(field.weak), full, 1e-9)
    hold = final(lambda x, t: field.weak(x, t, missing=False))
    mask = missing_mask((8, 8), (4, 4))
    a, b = (coefficients(v, (4, 4), "dct") for v in (hold, full))
    close(a[..., ~mask], b[..., ~mask], 1e-9)
    assert float(a[..., mask].square().mean()) < 0.9 * float(b[..., mask].square().mean())  # detail is lost


def test_wiener_on_haar_of_a_field_that_is_independent_in_cosines() -> None:
    """Only the diagonal is known there: still the best gain per coefficient, and better than hold; not exact."""
    power, size = PowerLaw(30.0, 2.0).power((8, 8)), (4, 4)
    diagonal = power_in_band(power, size, "haar")
    cosine = from_coefficients(torch.eye(64, dtype=torch.float64).view(64, 8, 8), size, "dct")
    basis = coefficients(cosine, size, "haar").view(64, 64)
    covariance = basis.T @ (power.flatten()[:, None] * basis)
    mask = missing_mask((8, 8), size).flatten()
    t = 0.6

    def error(gain: Tensor) -> float:
        """Mean square of E[x0|x] - gain x over the missing coefficients; x0 and noise as their covariances say."""
        g = torch.diag(gain)
        residual = torch.eye(64).double() - (1 - t) * g
        return float((residual @ covariance @ residual.T + t**2 * g @ g.T).diagonal()[mask].sum())

    wiener = ((1 - t) * diagonal / ((1 - t) ** 2 * diagonal + t**2)).flatten()
    exact = covariance - (1 - t) ** 2 * covariance @ torch.linalg.solve(
        (1 - t) ** 2 * covariance + t**2 * torch.eye(64).double(), covariance
    )
    bound = float(exact.diagonal()[mask].sum())
    assert bound * 1.0001 < error(wiener) < error(torch.zeros(64).double())
    for factor in (0.9, 1.1):
        assert error(wiener) < error(factor * wiener)


# Coefficients -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1.0, 20.0))
def test_closed_forms_on_the_linear_path(t: float, pixels: float) -> None:
    """`S = (1-t) + t/r`, `tau = t/(r - (r-1)t)`, `v = (x - U(P x/S - tau v_low))/t`."""
    r = math.sqrt(pixels)
    s, tau = (1 - t) + t / r, t / (r - (r - 1) * t)
    a = scale_alignment(LINEAR, "velocity", t, pixels)
    expected = [1 / s, tau, (1 - 1 / s) / t, tau / t, 1 / t]
    assert [float(v) for v in a] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("w", [0.0, 0.4])
def test_the_weak_patches_operator_is_this_one(path: Path, kind: str, w: float) -> None:
    """`adapters.alignment` says the same for a white missing band."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for preconditioning in (None, Preconditioning()) if kind == "sample" else (None,):
        old = alignment(path, kind, t, 4, w, preconditioning)  # type: ignore[arg-type]
        new = scale_alignment(path, kind, t, 4, w, preconditioning)  # type: ignore[arg-type]
        pairs = [
            (new.input_scale, old.input_scale),
            (new.time, old.time),
            (new.on_missing, old.on_state),
            (new.on_low - new.on_missing, old.on_coarse),
            (new.on_output, old.on_output),
        ]
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["velocity", "v_prediction", "sample"])
def test_finite_everywhere_with_wiener(kind: str) -> None:
    t = torch.tensor([0.0, 1e-9, 0.3, 1.0], dtype=torch.float64)
    a = scale_alignment(LINEAR, kind, t, 4, torch.full((4, 4), 0.2))  # type: ignore[arg-type]
    assert all(bool(torch.isfinite(v).all()) for v in a)
    assert a.time.tolist()[0] == 0.0
    assert a.time.tolist()[-1] == 1.0
    assert float(a.input_scale[0]) == 1.0
    for left, right in zip(a.at(0), a.at(1), strict=True):  # and continuous
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_any_path_and_kind_on_gaussian_data(path: Path, kind: str) -> None:
    """The exact coarse prediction, read back with wiener, is the exact full one."""
    power, size, x = noise(8, 8).square() + 0.1, (4, 6), noise(2, 1, 8, 8)
    k2 = 64 / 24

    def exact(state: Tensor, spectrum: Tensor, t: Tensor) -> Tensor:
        s = path.alpha_sigma(t)
        c = coefficients(state, (1, 1), "dct")
        total = s.alpha**2 * spectrum + s.sigma**2
        x0, eps = s.alpha * spectrum / total * c, s.sigma / total * c
        return from_coefficients(path.target(kind, x0, eps, t) if kind != "score" else -eps / s.sigma, (1, 1), "dct")

    for value in (0.05, 0.5, 0.9):
        t = torch.tensor(value, dtype=torch.float64)
        a = scale_alignment(path, kind, t, k2, power)  # type: ignore[arg-type]
        px = down(x, size, "dct")
        output = exact(a.input_scale * px, power[:4, :6] / k2, a.time)
        got, expected = read_back(x, px, output, a, "dct"), exact(x, power, t)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_read_back_of_a_constant_power_is_the_scalar_form() -> None:
    x, t = noise(3, 2, 8, 8), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    output = noise(3, 2, 4, 4, seed=2)
    for band in BANDS:
        px = down(x, (4, 4), band)
        one = read_back(x, px, output, scale_alignment(LINEAR, "velocity", t, 4, 0.3), band)
        a = scale_alignment(LINEAR, "velocity", t, 4, torch.full((8, 8), 0.3, dtype=torch.float64))
        assert a.on_missing.shape == (3, 8, 8)
        close(read_back(x, px, output, a, band), one, 1e-12)
        rows = [read_back(x[i : i + 1], px[i : i + 1], output[i : i + 1], a.at(i), band) for i in range(3)]
        close(torch.cat(rows), one, 1e-12)


def test_what_no_path_can_do() -> None:
    with pytest.raises(ConfigError, match="noisier than"):
        expand(noise(1, 1, 4, 4), get_path("edm"), 0.9, noise(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="drifts"):
        scale_alignment(get_path("mean-reverting"), "epsilon", 0.5, 4)


# Networks ---------------------------------------------------------------------------------------------------------


def test_the_coarse_network_shares_everything() -> None:
    """Same modules, same answers as a small model with these weights and its own positions."""
    dit = tiny_dit()
    small = coarse_network(dit, LowBand.of(2, positions="own"))
    separate = type(dit)(replace(dit.config, input_size=(4, 4)))
    separate.load_state_dict(dit.state_dict())
    x, t, y = noise(2, 2, 4, 4).float(), torch.tensor([100.0, 900.0]), torch.tensor([0, 2])
    torch.testing.assert_close(small(x, t, y), separate(x, t, y), rtol=0, atol=0)
    assert [id(p) for p in small.parameters()] == [id(p) for p in dit.parameters()]
    assert not small.positions.is_meta
    small(x, t, y).sum().backward()
    assert dit.blocks[0].qkv.weight.grad is not None
    assert dit.config.input_size == (8, 8)


def test_positions_of_the_coarse_grid() -> None:
    """"own": 0, 1; "center": 0.5, 2.5 of the trained grid's 0..3; ratio 1 keeps the table."""
    dit = tiny_dit()
    own = coarse_network(dit, LowBand.of(2, positions="own")).positions
    close(own, dit.positions.view(4, 4, -1)[:2, :2].reshape(4, -1), 0.0)
    close(coarse_network(dit, LowBand.of(2)).positions, own, 0.0)
    stretched = coarse_network(dit, LowBand.of(2, positions="center")).positions.view(2, 2, -1)
    first = stretched[0, 0, :8].double()  # sines of the column's coordinate
    omega = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    close(first, torch.sin(0.5 * omega), 1e-6)
    close(stretched[0, 1, :8].double(), torch.sin(2.5 * omega), 1e-6)
    close(coarse_network(dit, LowBand.of(1)).positions, dit.positions, 0.0)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("missing", ["hold", "wiener"])
@pytest.mark.parametrize("time", [NetworkTime(scale=1000.0), NetworkTime.sit(), NetworkTime.timesteps()])
def test_the_denoiser_is_the_formula(band: Band, missing: str, time: NetworkTime) -> None:
    """`v = (x - U x0_low - guess)/t` around the small model, told tau; one time per sample; variance code carried."""
    base = Denoiser(tiny_dit(learn_sigma=True), LINEAR, "velocity", time)
    spectrum = PowerLaw(3.0, 2.0)
    weak = low_band(base, 2, band, missing, spectrum)  # type: ignore[arg-type]
    x, _, y = batch(tiny_dit())
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    got = weak(x, t, y)
    tt = t.view(3, 1, 1, 1)
    s, tau = (1 - tt) + tt / 2, tt / (2 - tt)
    low = down(x.double(), (4, 4), band)
    raw = weak.coarse.network((low / s).float(), time.encode(tau.flatten()).float(), y)
    velocity, code = raw.chunk(2, dim=1)
    x0 = up(low / s - tau * time.sign * velocity.double(), (8, 8), band)
    if missing == "wiener":
        p = power_in_band(spectrum.power((8, 8)), (4, 4), band)
        gain = (1 - tt) * p / ((1 - tt) ** 2 * p + tt**2) * missing_mask((8, 8), (4, 4))
        x0 = x0 + from_coefficients(gain * coefficients(x.double(), (4, 4), band), (4, 4), band)
    torch.testing.assert_close(got.value.double(), (x.double() - x0) / tt, rtol=1e-4, atol=1e-4)
    assert got.variance is not None
    torch.testing.assert_close(got.variance, up(code, (8, 8), band), rtol=1e-4, atol=1e-4)
    for i in range(3):
        one = weak(x[i : i + 1], float(t[i]), y[i : i + 1])
        torch.testing.assert_close(one.value, got.value[i : i + 1], rtol=1e-4, atol=1e-4)


def test_ratio_one_is_the_plain_network_bit_for_bit() -> None:
    base = tiny_denoiser()
    x, _, y = batch(tiny_dit())
    for band in BANDS:
        assert torch.equal(low_band(base, 1, band)(x, 0.4, y).value, base(x, 0.4, y).value)


def test_a_fresh_weak_patch_is_this_mode() -> None:
    """One operator: FlexiDiT's noise-aligned initialisation is the Haar band with a white missing band."""
    base = tiny_denoiser()
    base.network.double()
    x, t, y = noise(3, 2, 8, 8), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.tensor([0, 1, 2])
    for w, options in ((0.0, {}), (0.25, {"missing": "wiener", "spectrum": PowerLaw(0.25, 0.0)})):
        flexible = flexify(base, [4], rank=2, missing_power=w, position="own")
        expected = flexible(x, t, y, Compute.of(patch=4)).value
        torch.testing.assert_close(low_band(base, 2, **options)(x, t, y).value, expected, rtol=0, atol=1e-6)
    # And a flexible model's low band is its base's.
    close(low_band(flexible, 2)(x, t, y).value, low_band(base, 2)(x, t, y).value, 1e-12)


@pytest.mark.parametrize("patch", [(4, 4), (2, 4)])
def test_pyramidal_patchification_starts_as_average_and_repeat(patch: Size) -> None:
    """Sheet H, 2 (1), PPFlow: the bare coarse network is `repeat(model(average(x)))`, told t and not tau."""
    base = tiny_denoiser()
    base.network.double()
    network = flexify(base, [patch], rank=2, position="own").network
    ratio = (patch[0] / 2, patch[1] / 2)
    small = coarse_network(base.network, LowBand(ratio))
    x, t, y = noise(2, 2, 8, 8), torch.tensor([300.0, 800.0]), torch.tensor([0, 1])
    size = small.config.input_size
    expected = up(small(down(x, size, "haar"), t, y), (8, 8), "haar")
    close(network(x, t, y, patch), expected, 1e-10)


@pytest.mark.parametrize("band", BANDS)
def test_on_another_path(band: Band) -> None:
    """Used on a path it was not trained on, the weak mode says the same about the same states."""
    base = tiny_denoiser()
    base.network.double()
    other = base.on_path(get_path("vp"), "epsilon")
    options = {"missing": "wiener", "spectrum": PowerLaw(3.0, 2.0)}
    here = low_band(base, 2, band, **options)  # type: ignore[arg-type]
    there = low_band(other, 2, band, **options)  # type: ignore[arg-type]
    x, t, y = noise(2, 2, 8, 8), torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([0, 1])
    found = other.match(t)
    assert found is not None
    got = there(x, t, y)
    expected = here(found.scale.view(2, 1, 1, 1) * x, found.time, y)
    torch.testing.assert_close(got.to("sample"), expected.to("sample"), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.to("epsilon"), expected.to("epsilon"), rtol=0, atol=1e-6)


def test_preconditioned_networks() -> None:
    base = Denoiser(tiny_dit(), get_path("edm"), "sample", preconditioning=Preconditioning())
    base.network.double()
    weak = low_band(base, 2, "haar")
    x, y = 3 * noise(2, 2, 8, 8), torch.tensor([0, 1])
    t = base.path.time_of_noise_ratio(torch.tensor(3.0, dtype=torch.float64))
    small = replace(base, network=weak.coarse.network)
    # P x has noise 1.5 and is a state of EDM's path (alpha = 1) as it is.
    expected = up(small(down(x, (4, 4), "haar"), base.path.time_of_noise_ratio(1.5), y).value, (8, 8), "haar")
    torch.testing.assert_close(weak(x, t, y).value, expected, rtol=0, atol=1e-5)


def test_it_is_cheaper_and_differentiable() -> None:
    base = tiny_denoiser()
    weak = low_band(base, 2, "dct", "wiener", PowerLaw(3.0, 2.0))
    assert weak.flops() < base.flops() / 2
    x, _, y = batch(tiny_dit())
    leaf = x.clone().requires_grad_()
    weak(leaf, 0.5, y).value.square().sum().backward()
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())
    assert base.network.blocks[0].qkv.weight.grad is not None


# Settings ---------------------------------------------------------------------------------------------------------


def test_settings_round_trip() -> None:
    for low in (
        LowBand(),
        LowBand.of((2, 1.5), band="dct", positions="center"),
        LowBand.of(4, missing="wiener", spectrum=CoefficientSpectrum(((1.0, 0.5), (0.5, 0.1)))),
    ):
        assert LowBand.from_config(low.to_config()) == low
        assert hash(low) == hash(LowBand.from_config(low.to_config()))
    assert coarse_config(tiny_dit().config, LowBand()).input_size == (4, 4)
    assert isinstance(scale_alignment(LINEAR, "velocity", 0.5, 4), ScaleAlignment)
    assert isinstance(low_band(tiny_denoiser()), LowBandDenoiser)


def test_refusals() -> None:
    for options, words in (
        ({"band": "harr"}, "did you mean 'haar'"),
        ({"missing": "wienr", "spectrum": PowerLaw(1, 0)}, "did you mean 'wiener'"),
        ({"missing": "wiener"}, "needs the data's spectrum"),
        ({"ratio": 0.5}, "at least 1"),
        ({"ratio": (2, 2, 2)}, "one number or"),
        ({"positions": "centre"}, "unknown rule for coarse positions"),
    ):
        with pytest.raises(ConfigError, match=words):
            LowBand.of(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown spectrum"):
        LowBand.from_config({"spectrum": {"kind": "pink"}})
    with pytest.raises(ConfigError, match="ratoi"):
        LowBand.from_config({"ratoi": 2})
    with pytest.raises(ConfigError, match="no whole number"):
        low_band(tiny_denoiser(), 3)
    with pytest.raises(ShapeError):
        low_band(tiny_denoiser(), 8)  # patch 2 does not fit on one pixel
    x, _, y = batch(tiny_dit())
    with pytest.raises(ConfigError, match="not both"):
        low_band(tiny_denoiser())(x, 0.5, y, Compute.of(patch=4))
    with pytest.raises(ShapeError):
        low_band(tiny_denoiser())(x[..., :4], 0.5, y)
    with pytest.raises(ShapeError, match="measured at"):
        low_band(tiny_denoiser(), missing="wiener", spectrum=CoefficientSpectrum(((1.0,),)))(x, 0.5, y)
