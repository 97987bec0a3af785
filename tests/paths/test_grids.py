"""Time grids: the values of sheet D, 13.5, the installed diffusers, inverses, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pliant.errors import PlanError
from pliant.paths import (
    GRIDS,
    PFGMpp,
    default_times,
    dynamic_shift,
    flux_mu,
    get_grid,
    get_path,
    make_grid,
    resolution_shift,
    shifted_times,
    uniform_times,
)
from pliant.paths import levels as lv
from pliant.paths.beta import beta_cdf, beta_quantile
from pliant.paths.spacings import align_your_steps_levels, spaced_timesteps

SD = get_path("vp-discrete", betas="scaled-linear")
DDPM, LINEAR, EDM_PATH = get_path("vp-discrete"), get_path("linear"), get_path("edm")
NEEDS_TABLE = {"linspace", "leading", "trailing", "respaced"}
NEEDS_LOG_SNR = {"log-snr", "noise-ratio", "karras", "exponential", "polyexponential", "beta", "align-your-steps"}
counts = st.integers(1, 60)


def options_of(name: str) -> dict[str, Any]:
    return {"name": name, **({"tokens": 1024} if name == "dynamic" else {})}


# All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("path", [SD, LINEAR, EDM_PATH, get_path("vp"), get_path("cosine"), get_path("sub-vp")])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_every_grid_decreases_to_data(name: str, path: Any, steps: int) -> None:
    if name in NEEDS_TABLE and path is not SD:
        with pytest.raises(PlanError, match=r"entries of a table.*use 'uniform'"):
            make_grid(path, steps, options_of(name))
        return
    times = make_grid(path, steps, options_of(name))
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert bool((times.diff() < 0).all())
    assert times[-1] == 0
    assert float(times[0]) <= 1.0
    starts_elsewhere = {"align-your-steps", "leading", "respaced", "default", "linspace"}
    if name not in starts_elsewhere:
        assert float(times[0]) == pytest.approx(1.0, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(counts, st.sampled_from(sorted(set(GRIDS) - NEEDS_TABLE)))
def test_any_number_of_steps(steps: int, name: str) -> None:
    times = make_grid(LINEAR, steps, options_of(name))
    assert len(times) == steps + 1
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("name", sorted(NEEDS_LOG_SNR))
def test_grids_of_noise_ratios_need_one(name: str) -> None:
    with pytest.raises(PlanError, match=r"path 'interpolant' has none: its source is not Gaussian. Use 'uniform'"):
        make_grid(get_path("interpolant"), 5, name)
    assert len(make_grid(get_path("interpolant"), 5, "sigmoid")) == 6


def test_any_table_is_a_table() -> None:
    """A path given by a table of levels has the grids of the named tables."""
    path = get_path("vp-table", alphas_cumprod=tuple(SD.alphas_cumprod.tolist()))
    for name in ("default", "karras", "trailing", "simple", "respaced"):
        torch.testing.assert_close(make_grid(path, 7, name), make_grid(SD, 7, name))
    zero_snr = get_path("vp-table", alphas_cumprod=(0.9, 0.5, 0.2, 0.0))
    assert make_grid(zero_snr, 4, "default").tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    for name in ("karras", "log-snr", "exponential"):
        times = make_grid(zero_snr, 3, name)
        assert float(times[0]) == 1.0
        assert float(times[-2]) == pytest.approx(0.25)


def test_default_grids() -> None:
    assert torch.equal(default_times(DDPM, 9), make_grid(DDPM, 9, "respaced"))
    assert torch.equal(default_times(LINEAR, 9), uniform_times(9))
    for path in (EDM_PATH, PFGMpp(dimensions=64)):
        assert torch.equal(default_times(path, 9), make_grid(path, 9, "karras"))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("karas", "did you mean 'karras'"),
        ({}, "unknown time grid ''"),
        ({"name": "karras", "roh": 5}, "no option 'roh': did you mean 'rho'"),
        ({"name": "karras", "rho": 0}, "rho > 0"),
        ({"name": "karras", "sigma_max": 1e-4}, "0 < sigma_min < sigma_max"),
        ({"name": "respaced", "shift": 1}, "It takes none"),
        ({"name": "exponential", "power": 0}, "power > 0"),
        ({"name": "beta", "a": 0}, "a > 0"),
        ({"name": "beta", "on": "t"}, "'sigma' or 'time'"),
        ({"name": "quadratic", "power": -1}, "power > 0"),
        ({"name": "sigmoid", "steepness": 0}, "steepness > 0"),
        ({"name": "shifted", "shift": 0}, "must be positive"),
        ({"name": "shifted", "terminal": 1.5}, r"lies in \[0, 1\)"),
        ({"name": "dynamic"}, "either tokens"),
        ({"name": "dynamic", "mu": 1.0, "kappa": 0.0}, "kappa > 0"),
        ({"name": "dynamic", "mu": 1.0, "kind": "log"}, "'exponential' or 'linear'"),
        ({"name": "dynamic", "mu": -1.0, "kind": "linear"}, "needs mu > 0"),
        ({"name": "flow-match", "style": "ddim"}, "unknown style 'ddim'"),
        ({"name": "linspace", "points": "half"}, "unknown choice of points"),
        ({"name": "linspace", "final": "last"}, "'clean' data or"),
        ({"name": "align-your-steps", "model": "sd3"}, "no Align Your Steps table for 'sd3'"),
        ({"name": "align-your-steps", "by": "lambda"}, "'sigma' or 'timestep'"),
        ({"name": "align-your-steps", "model": "svd"}, "repeats times"),
        ({"name": "uniform", "start": 0.0, "end": 1.0}, "repeats times or leaves"),
    ],
)
def test_refusals(grid: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_grid(SD, 5, grid)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_no_steps(name: str) -> None:
    with pytest.raises(PlanError, match=r"at least 1 step|gives 1 to"):
        make_grid(SD, 0, options_of(name))


def test_get_grid() -> None:
    assert torch.equal(get_grid("uniform")(LINEAR, 3), uniform_times(3))
    with pytest.raises(PlanError, match="1 to 1000 steps, not 1001"):
        make_grid(SD, 1001, "linspace")


# The values of the sheet ------------------------------------------------------------------------------------------


def timesteps(grid: Any, steps: int = 5, path: Any = SD) -> list[float]:
    times = make_grid(path, steps, grid)
    return [round(v, 6) for v in (times[:-1] * 1000 - 1).tolist()]


def test_spacings_of_the_sheet() -> None:
    assert timesteps({"name": "linspace", "points": "open"}) == [999, 799, 599, 400, 200]
    assert timesteps("linspace")[0] == 999
    assert timesteps("linspace")[-1] == 0
    assert timesteps({"name": "leading", "offset": 1}) == [801, 601, 401, 201, 1]
    assert timesteps("trailing") == [999, 799, 599, 399, 199]
    assert float(make_grid(SD, 5, {"name": "leading", "offset": 1, "final": "first"})[-1]) == 0.001
    with pytest.raises(PlanError, match="no 100 steps"):
        make_grid(SD, 100, {"name": "trailing", "least_log_snr": -1.0})


def test_karras_of_edm() -> None:
    """Sheet C, 13, check (2)."""
    sigmas = EDM_PATH.noise_ratio(make_grid(EDM_PATH, 10, "karras"))
    assert float(sigmas[0]) == pytest.approx(80, rel=1e-12)
    assert float(sigmas[-2]) == pytest.approx(0.002, rel=1e-12)
    assert float(sigmas[-1]) == 0
    assert bool((sigmas[:-1].diff().diff() > 0).all())
    expected = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    assert sigmas[:-1].tolist() == pytest.approx(expected, rel=1e-9)


def test_range_of_stable_diffusion() -> None:
    for name in ("karras", "exponential", "beta"):
        ratios = SD.noise_ratio(make_grid(SD, 8, name))
        assert [float(ratios[0]), float(ratios[-2])] == pytest.approx([14.6146, 0.029167], rel=2e-5)


def test_flow_match_of_the_sheet() -> None:
    times = make_grid(LINEAR, 5, {"name": "flow-match", "shift": 3.0})
    assert times.tolist() == pytest.approx([1, 0.90036, 0.75112, 0.50299, 0.0089286, 0], abs=5e-6)
    dpm = make_grid(LINEAR, 5, {"name": "flow-match", "shift": 3.0, "style": "dpm"})
    assert float(dpm[0]) == pytest.approx(0.99967, abs=5e-6)
    assert float(make_grid(LINEAR, 5, {"name": "flow-match", "style": "unipc"})[0]) == 1 - 1e-6


def test_align_your_steps_of_the_sheet() -> None:
    levels = align_your_steps_levels(10)
    assert levels.tolist() == pytest.approx([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152])
    twenty = align_your_steps_levels(20)
    torch.testing.assert_close(twenty[::2], levels)
    torch.testing.assert_close(twenty[1::2][:-1], torch.sqrt(levels[1:] * levels[:-1]))  # log-linear
    by_timestep = {"name": "align-your-steps", "by": "timestep", "model": "sdxl"}
    assert timesteps(by_timestep, 10) == [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    video = make_grid(get_path("edm", sigma_max=700.0), 10, {"name": "align-your-steps", "model": "svd"})
    assert (700 * video).tolist() == pytest.approx(
        [700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0], rel=1e-9
    )


def test_simple() -> None:
    """sigma_i = table[-(1 + floor(i L/N))]."""
    table = [(k + 1) / 1000 for k in range(1000)]
    for n in (1, 3, 7, 999):
        expected = [table[-(1 + i * 1000 // n)] for i in range(n)] + [0.0]
        assert make_grid(SD, n, "simple").tolist() == pytest.approx(expected)
    shifted = make_grid(LINEAR, 3, {"name": "simple", "shift": 3.0})
    torch.testing.assert_close(shifted, shifted_times(make_grid(LINEAR, 3, "simple"), 3.0))


def test_polyexponential() -> None:
    """ramp = linspace(1, 0, N)^rho between the logs; power 1 is exponential."""
    n = SD.noise_ratio(make_grid(SD, 6, {"name": "polyexponential", "power": 3.0}))[:-1]
    low, high = math.log(float(n[-1])), math.log(float(n[0]))
    expected = [math.exp((1 - i / 5) ** 3 * (high - low) + low) for i in range(6)]
    assert n.tolist() == pytest.approx(expected, rel=1e-9)
    one = make_grid(SD, 6, {"name": "polyexponential", "power": 1.0})
    torch.testing.assert_close(one, make_grid(SD, 6, "exponential"), rtol=0, atol=0)
    torch.testing.assert_close(one, make_grid(SD, 6, "log-snr"), rtol=1e-6, atol=1e-9)


def test_noise_ratio_grid() -> None:
    n = SD.noise_ratio(make_grid(SD, 7, "noise-ratio"))
    torch.testing.assert_close(n.diff(), n.diff()[:1].expand(7), rtol=1e-9, atol=1e-9)
    assert torch.allclose(make_grid(EDM_PATH, 7, "noise-ratio"), uniform_times(7))


def test_quadratic_and_sigmoid() -> None:
    assert make_grid(LINEAR, 2, "quadratic").tolist() == [1.0, 0.25, 0.0]
    ddim = [(k / 9 * math.sqrt(800)) ** 2 for k in range(10)][::-1]  # DDIM's code: linspace(0, sqrt(0.8 M))^2
    found = make_grid(LINEAR, 9, {"name": "quadratic", "start": 0.8})
    assert (found * 1000).tolist() == pytest.approx(ddim, abs=1e-9)
    times = make_grid(LINEAR, 30, "sigmoid")
    torch.testing.assert_close(times + times.flip(0), torch.ones(31, dtype=torch.float64))
    gaps = -times.diff()
    assert float(gaps[0]) < 0.3 * float(gaps[15])


def test_shift_of_resolutions() -> None:
    assert resolution_shift(4096, 1024) == 2.0
    assert [flux_mu(256), flux_mu(4096), flux_mu(2176)] == pytest.approx([0.5, 1.15, 0.825])
    grid = make_grid(LINEAR, 6, {"name": "dynamic", "tokens": 4096})
    torch.testing.assert_close(grid, shifted_times(uniform_times(6), math.exp(1.15)))
    with pytest.raises(PlanError, match="at least 1 token"):
        resolution_shift(0, 4)


def test_terminal() -> None:
    times = make_grid(LINEAR, 8, {"name": "shifted", "shift": 2.0, "terminal": 0.1})
    assert [float(times[0]), float(times[-2]), float(times[-1])] == pytest.approx([1.0, 0.1, 0.0], abs=1e-12)


# The installed diffusers ------------------------------------------------------------------------------------------

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler(name: str, steps: int, **options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, name)(**options)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("steps", [1, 5, 13, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_of_diffusers(spacing: str, steps: int) -> None:
    closed = scheduler("DDIMScheduler", steps, **VP, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False)
    ours = timesteps({"name": spacing, "offset": 1}, steps)
    if steps > 1 or spacing != "linspace":
        assert ours == [float(v) for v in closed.timesteps]
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        opened = scheduler(name, steps, **VP, timestep_spacing=spacing, steps_offset=1)
        ours = timesteps({"name": spacing, "points": "open", "offset": 1}, steps)
        assert ours == [float(v) for v in opened.timesteps], name


def test_clipped_entries_of_diffusers() -> None:
    """DPM-Solver on the cosine table leaves out what is below log-SNR -5.1."""
    theirs = scheduler("DPMSolverMultistepScheduler", 10, **VP, lambda_min_clipped=-2.0)
    assert timesteps({"name": "linspace", "points": "open", "least_log_snr": -2.0}, 10) == theirs.timesteps.tolist()
    assert spaced_timesteps(1000, 3, "linspace", used=500) == [499.0, 250.0, 0.0]


@pytest.mark.parametrize("steps", [2, 5, 13, 50])
@pytest.mark.parametrize(
    ("flag", "name"),
    [("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential"), ("use_beta_sigmas", "beta")],
)
def test_sigmas_of_diffusers(flag: str, name: str, steps: int) -> None:
    for kind in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        theirs = scheduler(kind, steps, **VP, **{flag: True}).sigmas.double()
        if kind == "HeunDiscreteScheduler":  # every inner level twice
            theirs = torch.cat([theirs[:1], theirs[1:-1:2], theirs[-1:]])
        ours = SD.noise_ratio(make_grid(SD, steps, name))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_edm_of_diffusers(schedule: str) -> None:
    theirs = scheduler("EDMEulerScheduler", 18, sigma_schedule=schedule).sigmas.double()
    torch.testing.assert_close(EDM_PATH.noise_ratio(make_grid(EDM_PATH, 18, schedule)), theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 5, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grids_of_diffusers(steps: int, shift: float) -> None:
    if steps > 1:
        euler = scheduler("FlowMatchEulerDiscreteScheduler", steps, shift=shift).sigmas.double()
        ours = make_grid(LINEAR, steps, {"name": "flow-match", "shift": shift})
        torch.testing.assert_close(ours, euler, rtol=1e-5, atol=1e-6)
        terminal = scheduler("FlowMatchEulerDiscreteScheduler", steps, shift=shift, shift_terminal=0.1).sigmas.double()
        ours = make_grid(LINEAR, steps, {"name": "flow-match", "shift": shift, "terminal": 0.1})
        torch.testing.assert_close(ours, terminal, rtol=1e-5, atol=1e-6)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    for style, name in (("dpm", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")):
        theirs = scheduler(name, steps, **flow).sigmas.double()
        ours = make_grid(LINEAR, steps, {"name": "flow-match", "shift": shift, "style": style})
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flux_of_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    theirs.set_timesteps(sigmas=[1 - i / 9 for i in range(9)], mu=flux_mu(1000))
    ours = make_grid(LINEAR, 9, {"name": "dynamic", "tokens": 1000, "kind": kind})
    torch.testing.assert_close(ours, theirs.sigmas.double(), rtol=1e-6, atol=1e-6)


def test_align_your_steps_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers.schedulers import AysSchedules

    for model, name in (("sd", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        levels = align_your_steps_levels(10, model).tolist()
        assert levels == pytest.approx(AysSchedules[f"{name}Sigmas"][:-1], rel=1e-12)
        if model != "svd":
            found = timesteps({"name": "align-your-steps", "by": "timestep", "model": model}, 10)
            assert found == AysSchedules[f"{name}Timesteps"]


# Inverses ---------------------------------------------------------------------------------------------------------

unit = st.floats(0.0, 1.0)
rough = st.floats(0.3, 8.0)


@settings(deadline=None)
@given(u=unit, rho=rough, low=st.floats(1e-3, 0.5), span=st.floats(1.5, 1e4))
def test_levels_and_positions(u: float, rho: float, low: float, span: float) -> None:
    high, position = low * span, torch.tensor(u, dtype=torch.float64)
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (lv.karras_level, lv.karras_position),
        (lv.exponential_level, lv.exponential_position),
    ]
    for level, inverse in pairs:
        value = level(position, low, high, rho)
        assert low * (1 - 1e-9) <= float(value) <= high * (1 + 1e-9)
        # The curve may be flat at one end, where the position is not determined; the level always is.
        again = level(inverse(value, low, high, rho).clamp(0, 1), low, high, rho)
        assert float(again) == pytest.approx(float(value), rel=1e-7)
    if 0.01 < u < 0.99:
        assert float(lv.karras_position(lv.karras_level(position, low, high), low, high)) == pytest.approx(u, abs=1e-7)
        mid = lv.exponential_position(lv.exponential_level(position, low, high), low, high)
        assert float(mid) == pytest.approx(u, abs=1e-7)


@settings(deadline=None)
@given(u=st.floats(0.0, 1.0), power=rough, steepness=st.floats(0.1, 12.0), start=st.floats(0.6, 1.0))
def test_curves_and_positions(u: float, power: float, steepness: float, start: float) -> None:
    position, end = torch.tensor(u, dtype=torch.float64), 0.05
    t = lv.power_time(position, power, start, end)
    assert end - 1e-12 <= float(t) <= start + 1e-12
    assert float(lv.power_position(t, power, start, end)) == pytest.approx(u, abs=1e-7)
    t = lv.sigmoid_time(position, steepness, start, end)
    assert end - 1e-9 <= float(t) <= start + 1e-9
    assert float(lv.sigmoid_position(t, steepness, start, end)) == pytest.approx(u, abs=1e-6)


@settings(deadline=None)
@given(t=unit, mu=st.floats(0.1, 2.0), kappa=st.floats(0.5, 2.0), kind=st.sampled_from(["exponential", "linear"]))
def test_shifts_and_inverses(t: float, mu: float, kappa: float, kind: str) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    assert float(lv.dynamic_shift_inverse(dynamic_shift(time, mu, kappa, kind), mu, kappa, kind)) == pytest.approx(
        t, abs=1e-9
    )
    torch.testing.assert_close(dynamic_shift(time, mu), shifted_times(time, math.exp(mu)))
    if 1e-9 < t < 1 - 1e-6:  # nearer the end `1 / t - 1` has no digits left, in the definition written so
        definition = math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** kappa)
        assert float(dynamic_shift(time, mu, kappa)) == pytest.approx(definition, abs=1e-9)
    assert float(shifted_times(shifted_times(time, mu), 1 / mu)) == pytest.approx(t, abs=1e-12)
    there = lv.stretched_times(time, 0.1, 0.3)
    assert float(lv.stretched_times(there, 0.3, 0.1)) == pytest.approx(t, abs=1e-12)


@settings(deadline=None)
@given(p=st.floats(0.001, 0.999), a=st.floats(0.3, 6.0), b=st.floats(0.3, 6.0))
def test_beta_distribution(p: float, a: float, b: float) -> None:
    x = beta_quantile(p, a, b)
    assert x == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-9)
    if x < 0.999:  # closer to 1, an ulp of x is more than that
        assert beta_cdf(x, a, b) == pytest.approx(p, abs=1e-11)
    assert beta_cdf(p, a, b) == pytest.approx(stats.beta.cdf(p, a, b), abs=1e-12)


def test_beta_ends_and_positions() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    level = lv.beta_level(u, 0.03, 14.6)
    assert [float(level[0]), float(level[-1])] == pytest.approx([14.6, 0.03])
    torch.testing.assert_close(lv.beta_position(level, 0.03, 14.6), u)
    assert [beta_quantile(0.0, 2, 3), beta_quantile(1.0, 2, 3), beta_cdf(-1, 2, 3), beta_cdf(2, 2, 3)] == [0, 1, 0, 1]
    on_time = make_grid(LINEAR, 4, {"name": "beta", "on": "time"})
    assert on_time.tolist() == pytest.approx([stats.beta.ppf(1 - i / 4, 0.6, 0.6) for i in range(5)], abs=1e-12)
