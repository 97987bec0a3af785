"""Coefficient-for-coefficient equality with diffusers' schedulers, in float64.

diffusers keeps float32 tables and casts states down; both are replaced by float64 here, so that what is
compared is the algebra. Equal rows mean equal samples for every network (sheet D, 14.5).
"""

import pytest
import torch

from pliant.paths import get_path
from pliant.solvers import compile_program
from support.schedulers import scheduler_rows, widen

pytest.importorskip("diffusers")

BETAS = {"linear": {"beta_start": 1e-4, "beta_end": 0.02}, "scaled-linear": {"beta_start": 0.00085, "beta_end": 0.012}}
KINDS = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction"}


def house_times(path, timesteps):
    """Our grid for their timesteps: table entry k at (k+1)/T, then clean data."""
    return torch.cat([path.time_of_timestep(timesteps.double()), torch.zeros(1, dtype=torch.float64)])


def our_rows(program):
    """Without the offset's column, which is zero."""
    return program.normal_form().rows()[:, :-1]


def same(ours, theirs, rtol=1e-9):
    """Relative to the largest coefficient of each row: rows mix numbers of very different size."""
    assert ours.shape == theirs.shape
    scale = theirs.abs().amax(dim=1, keepdim=True)
    assert float(((ours - theirs) / scale).abs().max()) < rtol


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_ddim(steps, eta, kind, betas):
    from diffusers import DDIMScheduler

    path = get_path("vp-discrete", betas=betas)
    scheduler = DDIMScheduler(
        beta_schedule=betas.replace("-", "_"), prediction_type=kind, clip_sample=False, **BETAS[betas]
    )
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), path.alphas_cumprod, rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = path.alphas_cumprod
    scheduler.set_timesteps(steps)
    program = compile_program(path, house_times(path, scheduler.timesteps), {"name": "ddim", "eta": eta}, kind)
    noises = len(program.noise_slots)
    assert noises == (steps - 1 if eta else 0)
    same(our_rows(program), scheduler_rows(scheduler, noises, eta=eta))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", ["midpoint", "lagrange"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpmpp_2m(steps, fit, kind, betas, monkeypatch):
    import diffusers.schedulers.scheduling_dpmsolver_multistep as module

    widen(module, monkeypatch)
    path = get_path("vp-discrete", betas=betas)
    scheduler = module.DPMSolverMultistepScheduler(
        beta_schedule=betas.replace("-", "_"),
        prediction_type=kind,
        solver_type="midpoint" if fit == "midpoint" else "heun",
        **BETAS[betas],
    )
    scheduler.set_timesteps(steps)
    times = house_times(path, scheduler.timesteps)
    ratios = path.noise_ratio(times)
    torch.testing.assert_close(scheduler.sigmas.double(), ratios, rtol=1e-4, atol=0)
    scheduler.sigmas = ratios
    program = compile_program(path, times, {"name": "dpmpp-2m", "fit": fit}, kind)
    same(our_rows(program), scheduler_rows(scheduler))


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_on_the_flow_path(steps, monkeypatch):
    import diffusers.schedulers.scheduling_dpmsolver_multistep as module

    widen(module, monkeypatch)
    scheduler = module.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    program = compile_program(get_path("linear"), scheduler.sigmas, "dpmpp-2m", "velocity")
    same(our_rows(program), scheduler_rows(scheduler))


@pytest.mark.parametrize("steps", [5, 20])
def test_flow_match_euler(steps, monkeypatch):
    import diffusers.schedulers.scheduling_flow_match_euler_discrete as module

    widen(module, monkeypatch)
    scheduler = module.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    program = compile_program(get_path("linear"), scheduler.sigmas, "euler", "velocity")
    same(our_rows(program), scheduler_rows(scheduler))
    # On the straight path DDIM is the same map, and so is a wrong sign not.
    same(our_rows(compile_program(get_path("linear"), scheduler.sigmas, "ddim", "velocity")), our_rows(program))


@pytest.mark.parametrize("steps", [5, 20])
def test_flow_match_heun(steps, monkeypatch):
    import diffusers.schedulers.scheduling_flow_match_heun_discrete as module

    widen(module, monkeypatch)
    scheduler = module.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    grid = scheduler.sigmas.double()
    grid = torch.cat([grid[:1], grid[1::2]])  # inner values appear twice: once per evaluation
    scheduler.sigmas = scheduler.sigmas.double()
    program = compile_program(get_path("linear"), grid, "heun", "velocity")
    same(our_rows(program), scheduler_rows(scheduler))
