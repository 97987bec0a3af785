"""Time grids by name: `get_grid(name)(path, steps, **options)` gives steps+1 house times, float64, strictly decreasing.

Formulas are in `levels.py` and `spacings.py`; here they meet a path. Grids of noise ratios run between the levels the
path's networks know (`Path.trained_times`) and end at clean data, t = 0; where a path's noise is infinite at t = 1 they
are spaced from t = 0.999 but still begin at 1, unless `sigma_max` says otherwise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.errors import PlanError, suggest
from pliant.paths import levels, spacings
from pliant.paths.edm import EDM
from pliant.paths.families import VPDiscrete
from pliant.paths.path import Path
from pliant.paths.table import VPTable
from pliant.paths.times import log_snr_times, needs_log_snr, respaced_times, uniform_times

Grid: TypeAlias = Callable[..., Tensor]
_MARGIN = 1e-3  # how far from an end with infinite log-SNR grids are spaced


def default_times(path: Path, steps: int) -> Tensor:
    """The grid users get when they name only a number of steps.

    DiT's respacing on tables, Karras's on EDM's path and its kin, uniform in t elsewhere.
    """
    return get_grid(_default_name(path))(path, _steps(steps))


def _default_name(path: Path) -> str:
    if isinstance(path, VPDiscrete | VPTable):
        return "respaced"
    return "karras" if isinstance(path, EDM) else "uniform"


# Uniform in something ---------------------------------------------------------------------------------------------


def uniform(path: Path, steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Uniform in t."""
    return uniform_times(steps, start, end)


def log_snr(path: Path, steps: int, start: float = 1.0, end: float = 0.0, last: float | None = None) -> Tensor:
    """Uniform in log-SNR from `start` to `last`, then `end`: DPM-Solver's grid for small images.

    last: by default the cleanest time that networks of this path are trained on, or 0.001.
    """
    return log_snr_times(path, steps, start, end, last if last is not None else path.trained_times[0] or _MARGIN)


def noise_ratio(path: Path, steps: int, sigma_max: float | None = None) -> Tensor:
    """Uniform in the noise ratio, down to 0."""
    _, high, _ = _range(path, "noise-ratio", None, sigma_max)
    return _from_levels(path, torch.linspace(high, 0.0, _steps(steps) + 1, dtype=torch.float64)[:-1], sigma_max)


# Between two noise ratios -----------------------------------------------------------------------------------------


def karras(
    path: Path, steps: int, rho: float | None = None, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """EDM's grid, arXiv 2206.00364, eq. 5; rho is the path's own, or 7."""
    low, high, u = _range(path, "karras", sigma_min, sigma_max, steps)
    exponent = rho if rho is not None else path.rho if isinstance(path, EDM) else 7.0
    if exponent <= 0.0:
        raise PlanError(f"a 'karras' grid needs rho > 0, got {exponent}")
    return _from_levels(path, levels.karras_level(u, low, high, exponent), sigma_max)


def exponential(
    path: Path, steps: int, sigma_min: float | None = None, sigma_max: float | None = None, power: float = 1.0
) -> Tensor:
    """Geometric in the noise ratio (the same levels as uniform in log-SNR); `power` makes it polyexponential."""
    low, high, u = _range(path, "exponential", sigma_min, sigma_max, steps)
    if power <= 0.0:
        raise PlanError(f"an 'exponential' grid needs power > 0, got {power}")
    return _from_levels(path, levels.exponential_level(u, low, high, power), sigma_max)


def beta(
    path: Path,
    steps: int,
    a: float = 0.6,
    b: float = 0.6,
    on: str = "sigma",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """Quantiles of Beta(a, b), arXiv 2407.12173, of the noise ratio (on="sigma", diffusers) or of t (on="time")."""
    if a <= 0.0 or b <= 0.0:
        raise PlanError(f"a 'beta' grid needs a > 0 and b > 0, got {a} and {b}")
    if on == "time":
        u = torch.linspace(0.0, 1.0, _steps(steps) + 1, dtype=torch.float64)
        return levels.beta_level(u, 0.0, 1.0, a, b)
    if on != "sigma":
        raise PlanError(f"a 'beta' grid is on 'sigma' or 'time', not {on!r}")
    low, high, u = _range(path, "beta", sigma_min, sigma_max, steps)
    return _from_levels(path, levels.beta_level(u, low, high, a, b), sigma_max)


def align_your_steps(path: Path, steps: int, model: str = "sd", by: str = "sigma") -> Tensor:
    """Align Your Steps, arXiv 2404.14507, found for "sd", "sdxl" or "svd"; other numbers of steps are interpolated."""
    needs_log_snr(path, "align-your-steps")
    if by == "timestep":
        table = _table(path, "align-your-steps by timestep")
        return _end(table.time_of_timestep(spacings.align_your_steps_timesteps(steps, model)))
    if by != "sigma":
        raise PlanError(f"an 'align-your-steps' grid goes by 'sigma' or 'timestep', not {by!r}")
    found = spacings.align_your_steps_levels(steps, model)
    return _from_levels(path, found, float(found[0]))


# Curves in t ------------------------------------------------------------------------------------------------------


def quadratic(path: Path, steps: int, power: float = 2.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Linear in sqrt(t) (DDIM and DPM-Solver; DDIM's code starts at 0.8), or in another root."""
    if power <= 0.0:
        raise PlanError(f"a 'quadratic' grid needs power > 0, got {power}")
    return levels.power_time(_positions(steps), power, start, end)


def sigmoid(path: Path, steps: int, steepness: float = 6.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Linear in logit(t), cut to start..end: more steps at both ends."""
    if steepness <= 0.0:
        raise PlanError(f"a 'sigmoid' grid needs steepness > 0, got {steepness}")
    return _exact_ends(levels.sigmoid_time(_positions(steps), steepness, start, end), start, end)


def shifted(
    path: Path, steps: int, shift: float = 3.0, start: float = 1.0, end: float = 0.0, terminal: float | None = None
) -> Tensor:
    """SD3's: uniform in t, then `s t/(1 + (s-1) t)`. `resolution_shift` gives s for other resolutions."""
    return _stretched(levels.shifted_times(uniform_times(steps, start, end), shift), terminal)


def dynamic(
    path: Path,
    steps: int,
    tokens: int | None = None,
    mu: float | None = None,
    kappa: float = 1.0,
    kind: str = "exponential",
    terminal: float | None = None,
) -> Tensor:
    """FLUX's: uniform in t, then shifted by e^mu; give mu, or the number of image tokens it depends on."""
    if (tokens is None) == (mu is None):
        raise PlanError("a 'dynamic' grid needs either tokens (of the image) or mu")
    m = levels.flux_mu(tokens) if tokens is not None else mu
    if m is None or kappa <= 0.0:
        raise PlanError(f"a 'dynamic' grid needs kappa > 0, got {kappa}")
    return _stretched(levels.dynamic_shift(uniform_times(steps), m, kappa, kind), terminal)


def flow_match(
    path: Path,
    steps: int,
    shift: float = 1.0,
    timesteps: int = 1000,
    style: str = "euler",
    terminal: float | None = None,
) -> Tensor:
    """diffusers' flow grids: "euler" (the range is shifted once more than the steps, as there), "dpm" or "unipc"."""
    _steps(steps)
    tiny = 1.0 / timesteps
    if style == "euler":
        edge = float(levels.shifted_times(torch.tensor(tiny, dtype=torch.float64), shift))
        times = levels.shifted_times(torch.linspace(1.0, edge, steps, dtype=torch.float64), shift)
    elif style == "dpm":
        t = 1.0 - torch.linspace(1.0, tiny, steps + 1, dtype=torch.float64)
        times = levels.shifted_times(t, shift).flip(0)[:-1]
    elif style == "unipc":
        times = levels.shifted_times(torch.linspace(1.0, tiny, steps + 1, dtype=torch.float64)[:-1], shift)
        times[0] = times[0] - 1e-6 if abs(float(times[0]) - 1.0) < 1e-6 else times[0]
    else:
        raise PlanError(f"unknown style {style!r} of a flow grid: {suggest(style, ('euler', 'dpm', 'unipc'))}")
    return _stretched(_end(times), terminal)


# Entries of a table -----------------------------------------------------------------------------------------------


def _spaced(spacing: str) -> Grid:
    def grid(
        path: Path,
        steps: int,
        points: str = "closed",
        offset: int = 0,
        least_log_snr: float = -math.inf,
        final: str = "clean",
    ) -> Tensor:
        table = _table(path, spacing)
        entries = torch.arange(table.num_timesteps, dtype=torch.float64)
        used = spacings.clipped_entries(table.log_snr(table.time_of_timestep(entries)), least_log_snr)
        if final not in ("clean", "first"):
            raise PlanError(f"a grid ends at 'clean' data or at the table's 'first' entry, not at {final!r}")
        found = spacings.spaced_timesteps(table.num_timesteps, _steps(steps), spacing, points, offset, used)
        times = table.time_of_timestep(torch.tensor([*found, -1.0 if final == "clean" else 0.0], dtype=torch.float64))
        if len(found) != steps:
            raise PlanError(f"trailing spacing of {used} of {table.num_timesteps} entries gives no {steps} steps")
        return times

    grid.__doc__ = f"""diffusers' {spacing!r} spacing of a table's timesteps.

    points: "closed" (DDIM, Euler) or "open" (DPM-Solver, UniPC). offset: steps_offset. least_log_snr: noisier entries
    are left out (lambda_min_clipped, -5.1). final: where the last step goes, "clean" or the table's "first" entry.
    """
    return grid


def simple(path: Path, steps: int, entries: int | None = None, shift: float = 1.0) -> Tensor:
    """ComfyUI's "simple": every (L/N)-th of L table entries, counted from the noisy end."""
    count = entries or (path.num_timesteps if isinstance(path, VPDiscrete | VPTable) else 1000)
    return levels.shifted_times(spacings.simple_times(_steps(steps), count), shift)


def respaced(path: Path, steps: int) -> Tensor:
    """Official DiT's respacing of a table."""
    return respaced_times(_table(path, "respaced"), _steps(steps))


GRIDS: dict[str, Grid] = {
    "default": default_times,
    "uniform": uniform,
    "log-snr": log_snr,
    "noise-ratio": noise_ratio,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": lambda path, steps, power=2.0, sigma_min=None, sigma_max=None: exponential(
        path, steps, sigma_min, sigma_max, power
    ),
    "beta": beta,
    "align-your-steps": align_your_steps,
    "quadratic": quadratic,
    "sigmoid": sigmoid,
    "shifted": shifted,
    "dynamic": dynamic,
    "flow-match": flow_match,
    "linspace": _spaced("linspace"),
    "leading": _spaced("leading"),
    "trailing": _spaced("trailing"),
    "simple": simple,
    "respaced": respaced,
}


def get_grid(name: str) -> Grid:
    """A grid function `(path, steps, **options) -> times` by name. Raises PlanError with the nearest name."""
    if name not in GRIDS:
        raise PlanError(f"unknown time grid {name!r}: {suggest(name, GRIDS)}")
    return GRIDS[name]


def make_grid(
    path: Path, steps: int, grid: str | Mapping[str, Any], noise: tuple[float, float] | None = None
) -> Tensor:
    """The times of a grid given by name, or as {"name": ..., option: value}.

    noise: (least, most) noise ratio of a network trained on another path, 0 and inf where it has no limits; grids that
    take `sigma_min`, `sigma_max` or `start` keep to it unless these are given.
    Raises PlanError for an unknown name or option, for a path the grid cannot be made on, and for times that repeat.
    """
    options = {"name": grid} if isinstance(grid, str) else dict(grid)
    name = str(options.pop("name", ""))
    function = get_grid(_default_name(path) if name == "default" else name)
    known = list(inspect.signature(function).parameters)[2:]
    for option in options:
        if option not in known:
            hint = suggest(option, known) if known else "It takes none."
            raise PlanError(f"time grid {name!r} has no option {option!r}: {hint}")
    if noise is not None:
        low, high = noise
        own = {"sigma_min": low} if low > 0.0 else {}
        if math.isfinite(high):
            own.update(sigma_max=high, start=float(path.time_of_noise_ratio(high)))
        options = {**{k: v for k, v in own.items() if k in known}, **options}
    try:
        times = function(path, steps, **options)
    except TypeError as error:
        raise PlanError(f"time grid {name!r} does not take these options: {error}") from None
    if not bool((times.diff() < 0.0).all()) or not 0.0 <= float(times[-1]) < float(times[0]) <= 1.0:
        raise PlanError(
            f"time grid {name!r} with {steps} steps repeats times or leaves [0, 1] on path {path.name!r}; use fewer "
            f"steps or options that fit this path's noise"
        )
    return times


# Parts ------------------------------------------------------------------------------------------------------------


def _steps(steps: int) -> int:
    if steps < 1:
        raise PlanError(f"a time grid needs at least 1 step, got {steps}")
    return steps


def _positions(steps: int) -> Tensor:
    return torch.linspace(0.0, 1.0, _steps(steps) + 1, dtype=torch.float64)


def _end(times: Tensor) -> Tensor:
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _exact_ends(times: Tensor, start: float, end: float) -> Tensor:
    times[0], times[-1] = start, end
    return times


def _stretched(times: Tensor, terminal: float | None) -> Tensor:
    """The grid with its last time before the end moved to `terminal`."""
    if terminal is None or len(times) < 3:
        return times
    return _end(levels.stretched_times(times[:-1], float(times[-2]), terminal))


def _table(path: Path, grid: str) -> VPDiscrete | VPTable:
    if not isinstance(path, VPDiscrete | VPTable):
        raise PlanError(f"a {grid!r} grid chooses entries of a table, but path {path.name!r} has none; use 'uniform'")
    return path


def _range(
    path: Path, grid: str, sigma_min: float | None, sigma_max: float | None, steps: int = 1
) -> tuple[float, float, Tensor]:
    """The noise ratios a grid runs between (low, high), and the positions of its `steps` levels."""
    needs_log_snr(path, grid)
    first, last = path.trained_times
    if sigma_min is None:
        sigma_min = float(path.noise_ratio(first if first > 0.0 else _MARGIN))
    if sigma_max is None:
        sigma_max = float(path.noise_ratio(last if float(path.alpha_sigma(last).alpha) > 0.0 else 1.0 - _MARGIN))
    if not 0.0 < sigma_min < sigma_max:
        raise PlanError(f"a {grid!r} grid needs 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}")
    return sigma_min, sigma_max, torch.linspace(0.0, 1.0, _steps(steps), dtype=torch.float64)


def _from_levels(path: Path, found: Tensor, sigma_max: float | None) -> Tensor:
    """Times of these noise ratios, then 0."""
    times = _end(path.time_of_noise_ratio(found))
    if sigma_max is None:  # from the path's own noisy end, also where that is infinitely noisy
        times[0] = path.trained_times[1]
    return times
