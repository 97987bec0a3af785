"""What a diffusers scheduler's config says about paths and time grids, in Pliant's terms. Does not import diffusers.

Two rules exist for spacing table timesteps, and every diffusers class follows one of them: "ddim" (N points over the
table; DDIM, DDPM) and "dpm" (N+1 points of which the last is dropped; the DPM-Solver family, UniPC, DEIS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.errors import ConfigError, PlanError, suggest
from pliant.paths import Path, PredictionType, VPTable, get_path, levels

RULES = ("ddim", "dpm")
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "velocity",
}


def table_betas(schedule: str, start: float, end: float, count: int) -> Tensor:
    """(count,) float64 betas of a named schedule."""
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17, with its cap on beta
        angle = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * (math.pi / 2)
        level = torch.cos(angle) ** 2
        return torch.clamp(1.0 - level[1:] / level[:-1], max=0.999)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6.0, 6.0, count, dtype=torch.float64)) * (end - start) + start
    known = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    raise ConfigError(f"unknown beta_schedule {schedule!r}: {suggest(schedule, known)}")


def path_of_config(config: Mapping[str, Any]) -> Path:
    """The path a scheduler config describes: `linear` for flow prediction, else a table of noise levels."""
    if config["prediction_type"] == "flow_prediction":
        return get_path("linear")
    count = config["num_train_timesteps"]
    scale = 1000.0 / count
    named = {
        ("linear", scale * 1e-4, scale * 2e-2): "linear",
        ("scaled_linear", 0.00085, 0.012): "scaled-linear",
    }
    key = (config["beta_schedule"], config["beta_start"], config["beta_end"])
    plain = config["trained_betas"] is None and not config["rescale_betas_zero_snr"]
    if plain and key in named:
        return get_path("vp-discrete", betas=named[key], num_timesteps=count)
    if config["trained_betas"] is not None:
        betas = torch.tensor(list(config["trained_betas"]), dtype=torch.float64)
    else:
        betas = table_betas(*key, count)
    level = torch.cumprod(1.0 - betas, 0)
    if config["rescale_betas_zero_snr"]:  # arXiv 2305.08891, algorithm 1
        root = level.sqrt()
        level = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return VPTable(tuple(level.tolist()))


def spaced_timesteps(rule: str, spacing: str, steps: int, total: int, offset: int) -> list[float]:
    """`steps` table timesteps, noisiest first (the three spacings of arXiv 2305.08891, table 2)."""
    if rule not in RULES:
        raise ConfigError(f"unknown timestep_rule {rule!r}: {suggest(rule, RULES)}")
    if not 1 <= steps <= total:
        raise PlanError(f"the number of steps lies between 1 and {total}, got {steps}")
    extra = 1 if rule == "dpm" else 0
    if spacing == "leading":
        stride = total // (steps + extra)
        return [float(k * stride + offset) for k in range(steps + extra)][::-1][:steps]
    if spacing == "linspace":
        width = max(steps + extra - 1, 1)
        return [float(round((width - k) * (total - 1) / width)) for k in range(steps)]
    if spacing == "trailing":
        return [float(round(total - k * total / steps) - 1) for k in range(steps)]
    raise ConfigError(f"unknown timestep_spacing {spacing!r}: {suggest(spacing, SPACINGS)}")


def respaced(first: float, last: float, steps: int, config: Mapping[str, Any]) -> list[float] | None:
    """`steps` noise levels from first down to last as the config's `use_*_sigmas` say; None if none is set."""
    u = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    if config["use_karras_sigmas"]:
        found = levels.karras_level(u, last, first)
    elif config["use_exponential_sigmas"] or config["use_lu_lambdas"]:
        found = levels.exponential_level(u, last, first)
    elif config["use_beta_sigmas"]:
        found = levels.beta_level(u, last, first)
    else:
        return None
    return list(found.tolist())


def shifted(times: Tensor, config: Mapping[str, Any], mu: float | None) -> Tensor:
    """Flow times under the config's static shift, or under `mu` when it shifts dynamically."""
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise PlanError("this config shifts times by the image's size: pass mu, as Flux's and SD3's pipelines do")
        times = levels.dynamic_shift(times, mu, kind=config["time_shift_type"])
    else:
        times = levels.shifted_times(times, config["flow_shift"] if config["use_flow_sigmas"] else config["shift"])
    if config["shift_terminal"]:
        times = levels.stretched_times(times, float(times[-1]), config["shift_terminal"])
    return times


def flow_times(config: Mapping[str, Any], steps: int, mu: float | None, sigmas: Sequence[float] | None) -> list[float]:
    """Times (= sigmas) of a flow pipeline, without the final 0. sigmas: before shifting, as pipelines pass them."""
    tiny = torch.tensor(1.0 / config["num_train_timesteps"], dtype=torch.float64)
    if sigmas is not None:
        even = torch.tensor(list(sigmas), dtype=torch.float64)
    elif config["use_flow_sigmas"]:  # the DPM-Solver family's rule
        even = torch.linspace(1.0 - float(tiny), 0.0, steps + 1, dtype=torch.float64)[:-1]
    else:
        # FlowMatchEuler's rule: uniform down to the smallest training level, which is itself already shifted.
        least = tiny if config["use_dynamic_shifting"] else levels.shifted_times(tiny, config["shift"])
        even = torch.linspace(1.0, float(least), steps, dtype=torch.float64)
    times: list[float] = shifted(even, config, mu).tolist()
    return respaced(times[0], times[-1], steps, config) or times


def table_times(config: Mapping[str, Any], path: Path, rule: str, steps: int) -> list[float]:
    """House times of a table pipeline, without the end."""
    total = config["num_train_timesteps"]
    spacing = config["timestep_spacing"] or ("leading" if rule == "ddim" else "linspace")
    times = [(k + 1.0) / total for k in spaced_timesteps(rule, spacing, steps, total, config["steps_offset"])]
    # use_*_sigmas respace the whole table in the DPM-Solver family, and what the spacing left of it in Euler's.
    span = [1.0, 1.0 / total] if rule == "dpm" else [times[0], times[-1]]
    ends = path.noise_ratio(torch.tensor(span, dtype=torch.float64)).tolist()
    ratios = respaced(ends[0], ends[1], steps, config) if math.isfinite(ends[0]) else None
    if ratios is not None:
        exact: list[float] = path.time_of_noise_ratio(torch.tensor(ratios, dtype=torch.float64)).tolist()
        return exact
    if any(config[f"use_{name}"] for name in ("karras_sigmas", "exponential_sigmas", "lu_lambdas", "beta_sigmas")):
        raise ConfigError("a table with zero terminal SNR has no largest sigma; use timestep_spacing='trailing'")
    return times


def table_end(config: Mapping[str, Any], rule: str, last: float) -> float:
    """House time at which sampling ends: clean data, or table entry 0 where the config says so."""
    stop = not config["set_alpha_to_one"] if rule == "ddim" else config["final_sigmas_type"] == "sigma_min"
    end = 1.0 / config["num_train_timesteps"] if stop else 0.0
    return end if end < last - 1e-9 else 0.0
