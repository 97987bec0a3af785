"""Noise alignment (sheet H, section 0): a weak mode is a coarse sampler in other coordinates.

The claims are exact, so they are tested to rounding error in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant import Compute, Denoiser, flexify
from pliant.adapters.alignment import aligned_time, alignment, coarse
from pliant.models import DiT, DiTConfig
from pliant.paths import PREDICTION_TYPES, NetworkTime, Path, conversion, get_path
from support.networks import batch, randomize, tiny_denoiser, tiny_dit

LINEAR = get_path("linear")
PATHS = [get_path(name) for name in ("linear", "vp", "cosine", "gvp", "vp-discrete")]
Field = Callable[[Tensor, Tensor], Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeat(x: Tensor, ratio: tuple[int, int]) -> Tensor:
    """U: the right inverse of block averaging."""
    return x.repeat_interleave(ratio[0], -2).repeat_interleave(ratio[1], -1)


def random_field(side: tuple[int, int], seed: int) -> Field:
    """A smooth non-linear function of state and time, (B, 1, *side) -> the same."""
    n = side[0] * side[1]
    first, second = noise(n, n + 1, seed=seed) / math.sqrt(n), noise(n, n, seed=seed + 1) / math.sqrt(n)

    def field(x: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat([x.flatten(1), t.expand(len(x), 1)], dim=1)
        return (torch.tanh(inputs @ first.T) @ second.T).view_as(x)

    return field


# The theorem ------------------------------------------------------------------------------------------------------


def lifted(x: Tensor, t: Tensor, low: Field, ratio: tuple[int, int]) -> Tensor:
    """The aligned weak velocity around a network that only knows small images."""
    a = alignment(LINEAR, "velocity", t, ratio[0] * ratio[1])
    answer = low(F.avg_pool2d(a.input_scale * x, ratio), a.time)
    return a.on_state * x + a.on_coarse * coarse(x, ratio) + a.on_output * repeat(answer, ratio)


def euler(x: Tensor, times: Tensor, velocity: Field) -> Tensor:
    for t, after in pairwise(times):
        x = x + (after - t) * velocity(x, t)
    return x


def speed(n: Tensor, times: Tensor, switch: int, low: Field, full: Field, ratio: tuple[int, int]) -> Tensor:
    """SPEED with the Haar basis (arXiv 2605.18736), on the aligned coarse grid, written without Pliant's formulas.

    Start from coarse unit noise, walk the coarse grid, expand orthonormally with the initial noise's missing bands at
    the level tau, rescale by kappa, go on at full resolution from `kappa * tau`.
    """
    r = math.sqrt(ratio[0] * ratio[1])
    tau = times / (r - (r - 1) * times)
    y = euler(r * F.avg_pool2d(n, ratio), tau[: switch + 1], low)
    at = tau[switch]
    details = n - repeat(F.avg_pool2d(n, ratio), ratio)
    kappa = r / (1 + (r - 1) * at)
    x = kappa * (repeat(y, ratio) / r + at * details)
    torch.testing.assert_close(kappa * at, times[switch], rtol=0, atol=1e-14)
    return euler(x, times[switch:], full)


@pytest.mark.parametrize("ratio", [(2, 2), (1, 2), (4, 4)])
@pytest.mark.parametrize("switch", [0, 1, 9, 20])
def test_weak_steps_are_a_coarse_sampler(switch: int, ratio: tuple[int, int]) -> None:
    """Same image as the two-grid procedure for random non-linear networks, 20 steps, at every switch."""
    low, full = random_field((8 // ratio[0], 8 // ratio[1]), seed=1), random_field((8, 8), seed=3)
    n = noise(4, 1, 8, 8)
    times = torch.linspace(1, 0, 21, dtype=torch.float64)
    x = euler(n, times[: switch + 1], lambda x, t: lifted(x, t, low, ratio))
    x = euler(x, times[switch:], full)
    expected = speed(n, times, switch, low, full, ratio)
    assert (x - expected).abs().max() <= 1e-12
    plain = euler(n, times[: switch + 1], lambda x, t: repeat(low(F.avg_pool2d(x, ratio), t), ratio))
    plain = euler(plain, times[switch:], full)  # the paper's "average and repeat" is something else
    assert switch == 0 or (plain - expected).abs().max() > 1e-2


def test_a_fresh_flexible_model_is_that_sampler() -> None:
    """The same through `flexify` and `Denoiser`: the pre-trained network on small images, positions its own."""
    base = tiny_denoiser()
    base.network.double()
    flexible = flexify(base, [4], position="own", rank=2, missing_power=0.0)
    small = DiT(DiTConfig.from_dict({**base.config.to_dict(), "input_size": [4, 4]})).double()
    small.load_state_dict(base.network.state_dict())
    y, n = torch.tensor([0, 2]), noise(2, 2, 8, 8)
    times = torch.linspace(1, 0.1, 10, dtype=torch.float64)

    def low(x: Tensor, t: Tensor) -> Tensor:
        return small(x, (1000 * t).float().expand(2), y)

    with torch.no_grad():
        weak = euler(n, times[:6], lambda x, t: flexible(x, t, y, Compute.of(patch=4)).value)
        full = euler(weak, times[5:], lambda x, t: flexible(x, t, y).value)
        expected = speed(n, times, 5, low, lambda x, t: base(x, t, y).value, (2, 2))
    assert (full - expected).abs().max() <= 1e-6  # tables of positions are float32


# Coefficients -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1.0), st.sampled_from([2, 4, 8, 16]))
def test_closed_forms_on_the_linear_path(t: float, pixels: int) -> None:
    """`S_t = (1-t) + t/r`, `tau = t/(r-(r-1)t)`, `v = (x - U(P x/S - tau v_low))/t`."""
    r = math.sqrt(pixels)
    s, tau = (1 - t) + t / r, t / (r - (r - 1) * t)
    a = alignment(LINEAR, "velocity", t, pixels)
    got = [float(v) for v in a]
    assert got == pytest.approx([1 / s, tau, 1 / t, -1 / (s * t), tau / t], rel=1e-9)


def test_values_of_the_sheet() -> None:
    assert float(aligned_time(LINEAR, 0.92067, 4)) == pytest.approx(0.8530, abs=5e-5)
    assert aligned_time(LINEAR, torch.tensor([0.0, 1.0]), 4).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("pixels", [2, 4, 16])
def test_aligned_time_is_monotone_and_can_be_undone(path: Path, pixels: int) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    tau = aligned_time(path, t, pixels)
    assert bool((tau <= t).all())
    assert bool((tau.diff() > 0).all())
    torch.testing.assert_close(path.noise_ratio(tau) * math.sqrt(pixels), path.noise_ratio(t), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        path.time_of_noise_ratio(path.noise_ratio(tau) * math.sqrt(pixels)), t, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_the_scaled_average_is_a_state_of_the_same_path(path: Path) -> None:
    """Coarse data keeps alpha_tau, coarse noise has std sigma_tau."""
    for t in (0.1, 0.5, 0.9):
        a = alignment(path, "sample", t, 4)
        here, there = path.alpha_sigma(t), path.alpha_sigma(a.time)
        torch.testing.assert_close(a.input_scale * here.alpha, there.alpha, rtol=1e-9, atol=0)
        torch.testing.assert_close(a.input_scale * here.sigma / 2, there.sigma, rtol=1e-9, atol=0)


def test_averaged_noise_has_half_the_deviation() -> None:
    n = noise(64, 1, 64, 64)
    assert float(F.avg_pool2d(n, 2).std()) == pytest.approx(0.5, rel=0.01)
    assert float(coarse(n, (2, 4)).std()) == pytest.approx(1 / math.sqrt(8), rel=0.01)


def test_coarse_is_a_projection() -> None:
    x = noise(2, 3, 8, 8)
    once = coarse(x, (2, 4))
    torch.testing.assert_close(coarse(once, (2, 4)), once, rtol=0, atol=1e-15)
    torch.testing.assert_close((once * (x - once)).sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(coarse(x, (1, 1)), x)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_exact_for_data_that_is_constant_on_blocks(path: Path, kind: str) -> None:
    """x0 = U z, z ~ N(0, s^2): an exact coarse denoiser, aligned, is the exact fine one; its high band of x0 is 0."""
    s2, ratio = 0.7, (2, 2)
    x = noise(3, 1, 4, 4)
    for t in (0.05, 0.3, 0.6, 0.95):
        a = alignment(path, kind, t, 4)  # type: ignore[arg-type]
        there, here = path.alpha_sigma(a.time), path.alpha_sigma(t)
        y = F.avg_pool2d(a.input_scale * x, ratio)
        z = there.alpha * s2 / (there.alpha**2 * s2 + there.sigma**2) * y  # E[z | y]
        p, q = conversion("sample", kind, there)
        prediction = a.on_state * x + a.on_coarse * coarse(x, ratio) + a.on_output * repeat(p * y + q * z, ratio)
        # The block mean of x is sufficient, with noise variance sigma^2/4.
        optimal = here.alpha * s2 / (here.alpha**2 * s2 + here.sigma**2 / 4) * coarse(x, ratio)
        x0 = path.convert(prediction, x, t, kind, "sample")
        torch.testing.assert_close(x0, optimal, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_exact_for_blocks_with_white_detail(path: Path, kind: str) -> None:
    """x0 = U z + detail of variance w per pixel: with `missing_power` w the missing band is optimal too."""
    w, x = 0.3, noise(3, 1, 4, 4)
    for t in (0.05, 0.3, 0.6, 0.95):
        here, detail = path.alpha_sigma(t), x - coarse(x, (2, 2))
        optimal = here.alpha * w / (here.alpha**2 * w + here.sigma**2) * detail
        a = alignment(path, kind, t, 4, missing_power=w)  # type: ignore[arg-type]
        # The network's answer is a block constant: the detail of the prediction depends on the state alone.
        high = path.convert(a.on_state * detail, detail, t, kind, "sample")
        torch.testing.assert_close(high, optimal, rtol=1e-7, atol=1e-9)
        low = alignment(path, kind, t, 4)  # type: ignore[arg-type]
        torch.testing.assert_close(a.on_state + a.on_coarse, low.on_state + low.on_coarse, rtol=1e-7, atol=1e-7)
        assert torch.equal(a.on_output, low.on_output)


def test_velocities_stay_bounded_towards_the_data() -> None:
    t = torch.logspace(-4, 0, 50, dtype=torch.float64)
    assert float(alignment(LINEAR, "velocity", t, 4).on_state.max()) > 1e3
    assert float(alignment(LINEAR, "velocity", t, 4, missing_power=0.1).on_state.abs().max()) < 2


def test_one_pixel_needs_no_alignment() -> None:
    for path in PATHS:
        a = alignment(path, "epsilon", 0.4, 1)
        assert [float(a.input_scale), float(a.time)] == pytest.approx([1.0, 0.4], abs=1e-9)
        assert [float(a.on_state + a.on_coarse), float(a.on_output)] == pytest.approx([0.0, 1.0], abs=1e-9)


# In the denoiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_the_original_size_is_never_aligned(recipe: str) -> None:
    """Check (5): at ratio 1 the call is the bare network's, bit for bit."""
    denoiser = flexify(tiny_denoiser(), [4], recipe=recipe, rank=2)
    x, _, y = batch(tiny_dit())
    for patch in (None, (2, 2)):
        compute = Compute(patch=patch)
        assert denoiser.align(compute, torch.tensor(0.4)) is None
        out = denoiser.network(x, torch.full((3,), 400.0), y, patch)
        assert torch.equal(denoiser(x, 0.4, y, compute).value, out)
    assert denoiser.align(Compute.of(patch=4), torch.tensor(0.4)) is not None
    plain = flexify(tiny_denoiser(), [4], recipe=recipe, rank=2, initialisation="average")
    assert plain.align(Compute.of(patch=4), torch.tensor(0.4)) is None
    out = plain.network(x, torch.full((3,), 400.0), y, (4, 4))
    assert torch.equal(plain(x, 0.4, y, Compute.of(patch=4)).value, out)


@pytest.mark.parametrize("time", [NetworkTime(scale=1000.0), NetworkTime.sit(), NetworkTime.timesteps()])
def test_what_the_network_is_given_and_how_its_answer_is_read(time: NetworkTime) -> None:
    """Scaled input, aligned time in the network's own convention, recombined output; one time per sample."""
    base = Denoiser(tiny_dit(learn_sigma=True), LINEAR, "velocity", time)
    denoiser = flexify(base, [(4, 8)], rank=2, missing_power=0.0)
    randomize(denoiser.network, seed=4)
    x, _, y = batch(tiny_dit())
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    r = math.sqrt(8)
    s, tau = ((1 - t) + t / r).view(3, 1, 1, 1), (t / (r - (r - 1) * t))
    raw = denoiser.network((x / s).float(), time.encode(tau).float(), y, (4, 8))
    velocity, variance = raw.chunk(2, dim=1)
    x0_low = coarse(x, (2, 4)) / s - tau.view(3, 1, 1, 1) * time.sign * velocity
    expected = (x - x0_low) / t.view(3, 1, 1, 1)
    got = denoiser(x, t, y, Compute(patch=(4, 8)))
    torch.testing.assert_close(got.value.double(), expected, rtol=1e-4, atol=1e-4)
    assert got.variance is not None
    torch.testing.assert_close(got.variance, variance, rtol=1e-4, atol=1e-4)
    for i in range(3):
        one = denoiser(x[i : i + 1], float(t[i]), y[i : i + 1], Compute(patch=(4, 8)))
        torch.testing.assert_close(one.value, got.value[i : i + 1], rtol=1e-4, atol=1e-4)
