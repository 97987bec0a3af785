"""Coefficient-for-coefficient equality with diffusers' schedulers, in float64 (sheet D, 14.8(1)).

diffusers keeps float32 tables and casts states down; both are replaced by float64 here, so that what is
compared is the algebra. Equal rows mean equal samples for every network (sheet D, 14.5).
"""

import warnings

import pytest
import torch

from pliant.paths import get_path
from pliant.solvers import Multistep, compile_program, normal_form_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

BETAS = {"linear": {"beta_start": 1e-4, "beta_end": 0.02}, "scaled-linear": {"beta_start": 0.00085, "beta_end": 0.012}}
STEPS = (5, 10, 20)


def every(*cases):
    """All steps x both tables x Karras on/off x cases; the default run keeps a representative part, `slow` the rest."""
    found = []
    for k, case in enumerate(cases):
        for n in STEPS:
            for b, betas in enumerate(BETAS):
                for karras in (False, True):
                    quick = (n == 10 and b == (k + karras) % 2) or (n == (5, 20)[k % 2] and not karras and b == 0)
                    marks = () if quick else pytest.mark.slow
                    name = "-".join(map(str, (case, n, betas, "karras" if karras else "plain")))
                    found.append(pytest.param(case, n, betas, karras, marks=marks, id=name))
    return pytest.mark.parametrize(("case", "steps", "betas", "karras"), found)


def make(cls, betas, steps, **options):
    """(path, scheduler with the path's table in float64, after set_timesteps)."""
    path = get_path("vp-discrete", betas=betas)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = cls(beta_schedule=betas.replace("-", "_"), **BETAS[betas], **options)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), path.alphas_cumprod, rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = path.alphas_cumprod
    scheduler.set_timesteps(steps)
    return path, scheduler


def times_of(path, scheduler):
    """Our grid at the scheduler's sigmas, which are set to the exact float64 values of those times."""
    sigmas = scheduler.sigmas.double()
    times = path.time_of_noise_ratio(sigmas)
    exact = path.noise_ratio(times)
    torch.testing.assert_close(exact, sigmas, rtol=2e-4, atol=1e-6)
    scheduler.sigmas = exact
    return times


def grid(times):
    """Without repetitions of neighbours (Heun's stages; a last sigma that is repeated)."""
    return times[torch.cat([torch.ones(1, dtype=torch.bool), times.diff().abs() > 1e-12])]


def our_rows(program):
    """Without the offset's column, which is zero."""
    return program.normal_form().rows()[:, :-1]


def same(ours, theirs, rtol=1e-9):
    """Relative to the largest coefficient of each row: rows mix numbers of very different size."""
    extra = theirs.shape[1] - ours.shape[1]
    if extra > 0:  # noises that were drawn but not used, outputs of steps that do not move
        assert float(theirs[:, ours.shape[1] :].abs().max()) < 2e-10  # DDPM clips its last variance at 1e-20
        theirs = theirs[:, : ours.shape[1]]
    assert ours.shape == theirs.shape
    assert bool(torch.isfinite(theirs).all())
    scale = theirs.abs().amax(dim=1, keepdim=True)
    assert float(((ours - theirs) / scale).abs().max()) < rtol


def compare(path, scheduler, solver, kind="epsilon", rtol=1e-9, **options):
    times = times_of(path, scheduler)
    theirs = normal_form_of(scheduler, **options)
    nodes = grid(times)
    count = len(scheduler.timesteps)
    if len(nodes) < len(times):  # a repeated last sigma: one more call of the network that changes nothing
        # its step counts for the orders of the last steps all the same
        solver = [solver(min(3, count - k) if count < 15 else 3) for k in range(len(nodes) - 1)]
        drop = torch.ones(theirs.shape[1], dtype=torch.bool)
        drop[count] = False
        if bool(theirs[-1].isfinite().all()):  # orders above 1 divide 0 by 0
            torch.testing.assert_close(theirs[-1], theirs[-2], rtol=1e-9, atol=1e-9)
        theirs = theirs[:-1, drop]
    elif callable(solver):
        solver = [solver(min(3, count - k) if count < 15 else 3) for k in range(len(nodes) - 1)]
    same(our_rows(compile_program(path, nodes, solver, kind)), theirs, rtol)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim(steps, eta, kind, betas):
    path, scheduler = make(diffusers.DDIMScheduler, betas, steps, prediction_type=kind, clip_sample=False)
    times = torch.cat([path.time_of_timestep(scheduler.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
    program = compile_program(path, times, {"name": "ddim", "eta": eta}, kind)
    noises = len(program.noise_slots)
    assert noises == (steps - 1 if eta else 0)
    same(our_rows(program), normal_form_of(scheduler, eta=eta))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm_posterior(spacing):
    options = {"clip_sample": False, "timestep_spacing": spacing}
    path, scheduler = make(diffusers.DDPMScheduler, "linear", 10, **options)
    scheduler.one = torch.ones((), dtype=torch.float64)
    times = torch.cat([path.time_of_timestep(scheduler.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
    program = compile_program(path, times, {"name": "ddpm", "variance": "posterior"}, "epsilon")
    same(our_rows(program), normal_form_of(scheduler))


# (order, their solver_type, our fit), x0 form.
MULTI = [(1, "midpoint", "midpoint"), (2, "midpoint", "midpoint"), (2, "heun", "lagrange"),
         (3, "midpoint", "published3"), (3, "heun", "mr-sampler")]  # fmt: skip


@every(*MULTI)
def test_dpmpp_multistep(case, steps, betas, karras):
    order, theirs, fit = case
    options = {"solver_order": order, "solver_type": theirs, "use_karras_sigmas": karras}
    path, scheduler = make(diffusers.DPMSolverMultistepScheduler, betas, steps, **options)
    compare(path, scheduler, Multistep(order, "sample", fit, lower_order_final=15))


@every(*MULTI)
def test_dpm_multistep(case, steps, betas, karras):
    order, theirs, fit = case
    options = {"solver_order": order, "solver_type": theirs, "use_karras_sigmas": karras,
               "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}  # fmt: skip
    path, scheduler = make(diffusers.DPMSolverMultistepScheduler, betas, steps, **options)
    compare(path, scheduler, lambda most: Multistep(min(order, most), "epsilon", fit, lower_order_final=False))


@every(*MULTI[:3], (3, "midpoint", "diffusers-sde3"))
def test_sde_dpmpp_multistep(case, steps, betas, karras):
    order, theirs, fit = case
    options = {"solver_order": order, "solver_type": theirs, "use_karras_sigmas": karras,
               "algorithm_type": "sde-dpmsolver++"}  # fmt: skip
    path, scheduler = make(diffusers.DPMSolverMultistepScheduler, betas, steps, **options)
    compare(path, scheduler, Multistep(order, "sample", fit, tau=1.0, lower_order_final=15))


@every(*MULTI[:3])
def test_sde_dpm_multistep(case, steps, betas, karras):
    if karras:
        pytest.skip("their last step repeats a sigma, divides 0 by 0 and returns NaN")
    order, theirs, fit = case
    options = {"solver_order": order, "solver_type": theirs, "algorithm_type": "sde-dpmsolver",
               "final_sigmas_type": "sigma_min"}  # fmt: skip
    path, scheduler = make(diffusers.DPMSolverMultistepScheduler, betas, steps, **options)
    compare(path, scheduler, Multistep(order, "epsilon", fit, tau=1.0, lower_order_final=15))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("fit", ["midpoint", "lagrange"])
def test_dpmpp_2m_other_predictions(fit, kind):
    theirs = "midpoint" if fit == "midpoint" else "heun"
    path, scheduler = make(
        diffusers.DPMSolverMultistepScheduler, "linear", 10, prediction_type=kind, solver_type=theirs
    )
    compare(path, scheduler, {"name": "dpmpp-2m", "fit": fit}, kind)


SINGLE = [(1, "midpoint", "midpoint"), (2, "midpoint", "midpoint"), (2, "heun", "lagrange"),
          (3, "midpoint", "midpoint"), (3, "heun", "lagrange")]  # fmt: skip


@every(*SINGLE)
def test_dpmpp_singlestep(case, steps, betas, karras):
    order, theirs, fit = case
    options = {"solver_order": order, "solver_type": theirs, "use_karras_sigmas": karras, "final_sigmas_type": "zero"}
    path, scheduler = make(diffusers.DPMSolverSinglestepScheduler, betas, steps, **options)
    compare(path, scheduler, {"name": "dpmpp-2s-grid", "order": order, "fit": fit})


@every(*SINGLE)
def test_dpm_singlestep(case, steps, betas, karras):
    if karras:
        pytest.skip("their last step repeats a sigma")
    order, theirs, fit = case
    for lower in (True, False):
        if not lower and steps % order:
            continue  # they switch it on then
        options = {"solver_order": order, "solver_type": theirs, "algorithm_type": "dpmsolver",
                   "final_sigmas_type": "sigma_min", "lower_order_final": lower}  # fmt: skip
        path, scheduler = make(diffusers.DPMSolverSinglestepScheduler, betas, steps, **options)
        solver = {"name": "dpm-2s-grid", "order": order, "fit": fit, "lower_order_final": lower}
        compare(path, scheduler, solver)


@every(*SINGLE[:3])
def test_sde_dpmpp_singlestep(case, steps, betas, karras):
    order, theirs, fit = case
    options = {"solver_order": order, "solver_type": theirs, "use_karras_sigmas": karras, "final_sigmas_type": "zero",
               "algorithm_type": "sde-dpmsolver++"}  # fmt: skip
    path, scheduler = make(diffusers.DPMSolverSinglestepScheduler, betas, steps, **options)
    compare(path, scheduler, {"name": "dpmpp-2s-grid", "order": order, "fit": fit, "tau": 1.0})


@every(1, 2, 3)
def test_unipc_bh2(case, steps, betas, karras):
    path, scheduler = make(diffusers.UniPCMultistepScheduler, betas, steps, solver_order=case, use_karras_sigmas=karras)
    compare(path, scheduler, {"name": "unipc", "order": case, "lower_order_final": True})


@every(("bh1", 1), ("bh1", 2), ("bh1", 3), ("bh2", 2))
def test_unipc_that_ends_above_zero(case, steps, betas, karras):
    """bh1 with a last sigma of 0 is NaN in diffusers (and the limit here)."""
    if karras:
        pytest.skip("their last step repeats a sigma")
    rule, order = case
    options = {"solver_order": order, "solver_type": rule, "final_sigmas_type": "sigma_min"}
    for predict, form in ((True, "sample"), (False, "epsilon")):
        path, scheduler = make(diffusers.UniPCMultistepScheduler, betas, steps, predict_x0=predict, **options)
        solver = {"name": "unipc", "order": order, "B": rule, "form": form, "lower_order_final": True}
        compare(path, scheduler, solver)


def test_unipc_without_some_correctors():
    path, scheduler = make(diffusers.UniPCMultistepScheduler, "linear", 8, solver_order=3, disable_corrector=[0, 3])
    compare(path, scheduler, {"name": "unipc-3", "disable_corrector": [0, 3], "lower_order_final": True})


def test_unipc_bh1_at_sigma_zero_is_nan_there_and_the_limit_here():
    path, scheduler = make(diffusers.UniPCMultistepScheduler, "linear", 5, solver_type="bh1")
    times = times_of(path, scheduler)
    assert bool(normal_form_of(scheduler)[-1].isnan().any())
    bh1, bh2 = (compile_program(path, times, {"name": "unipc-2", "B": b}, "sample") for b in ("bh1", "bh2"))
    assert torch.equal(our_rows(bh1)[-1], our_rows(bh2)[-1])  # x0 of the last call
    assert our_rows(bh1)[-1].tolist() == [0.0] * 5 + [1.0]


@every(1, 2, 3)
def test_deis(case, steps, betas, karras):
    options = {"solver_order": case, "use_karras_sigmas": karras}
    path, scheduler = make(diffusers.DEISMultistepScheduler, betas, steps, **options)
    compare(path, scheduler, lambda most: Multistep(min(case, most), "epsilon", "lagrange", lower_order_final=False))


@every("plms", "prk")
def test_pndm(case, steps, betas, karras):
    if karras:
        pytest.skip("PNDM has no Karras option")
    # Epsilon only: theirs converts a *combination* of v-predictions at the current state, not each at its own.
    for offset in (0, 1):
        options = {"skip_prk_steps": case == "plms", "set_alpha_to_one": True, "steps_offset": offset}
        path, scheduler = make(diffusers.PNDMScheduler, betas, steps, **options)
        scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        used = torch.tensor(sorted(set(scheduler._timesteps.tolist()), reverse=True), dtype=torch.float64)
        times = torch.cat([path.time_of_timestep(used), torch.zeros(1, dtype=torch.float64)])
        program = compile_program(path, times, "plms" if case == "plms" else "f-pndm", "epsilon")
        assert program.num_evaluations == steps + (1 if case == "plms" else 9)
        same(our_rows(program), normal_form_of(scheduler), rtol=1e-12)


def compare_ve(path, scheduler, solver, kind, **options):
    """Schedulers whose state is x/alpha, scaled down for the network: the same rows after undoing the scale."""
    times = times_of(path, scheduler)
    scheduler.is_scale_input_called = True
    theirs = normal_form_of(scheduler, **options)
    program = compile_program(path, grid(times), solver, kind)
    theirs[:, 0] /= program.start.alpha
    same(our_rows(program), theirs)


@every(*[(name, kind) for name in ("euler", "heun", "lms") for kind in ("epsilon", "v_prediction")])
def test_schedulers_in_edm_coordinates(case, steps, betas, karras):
    name, kind = case
    cls = {"euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler,
           "lms": diffusers.LMSDiscreteScheduler}[name]  # fmt: skip
    path, scheduler = make(cls, betas, steps, use_karras_sigmas=karras, prediction_type=kind)
    solver = {"euler": "euler-edm", "heun": "heun-edm", "lms": "lms-4"}[name]
    compare_ve(path, scheduler, solver, kind)


@every("epsilon", "v_prediction")
def test_euler_ancestral(case, steps, betas, karras):
    if karras:
        pytest.skip("EulerAncestral has no Karras option")
    path, scheduler = make(diffusers.EulerAncestralDiscreteScheduler, betas, steps, prediction_type=case)
    compare_ve(path, scheduler, "euler-ancestral", case)


@pytest.mark.parametrize("karras", [False, True])
def test_kdpm2_is_dpm_solver_2(karras):
    path, scheduler = make(diffusers.KDPM2DiscreteScheduler, "linear", 10, use_karras_sigmas=karras)
    theirs = scheduler.sigmas.double()
    times = path.time_of_noise_ratio(torch.cat([theirs[:1], theirs[1:-1:2]]))
    exact = path.noise_ratio(times)
    middle = exact.log().lerp(exact.roll(1).log(), 0.5).exp()
    scheduler.sigmas, scheduler.sigmas_interpol = (
        torch.cat([v[:1], v[1:].repeat_interleave(2), v[-1:]]) for v in (exact, middle)
    )
    scheduler.is_scale_input_called = True
    theirs = normal_form_of(scheduler)
    program = compile_program(path, times, "kdpm2", "epsilon")
    theirs[:, 0] /= program.start.alpha
    same(our_rows(program), theirs)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_on_the_flow_path(steps):
    cls = diffusers.DPMSolverMultistepScheduler
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    program = compile_program(get_path("linear"), scheduler.sigmas, "dpmpp-2m", "velocity")
    same(our_rows(program), normal_form_of(scheduler))


@pytest.mark.parametrize("steps", [5, 20])
def test_unipc_on_the_flow_path(steps):
    cls = diffusers.UniPCMultistepScheduler
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    solver = {"name": "unipc-3", "lower_order_final": True}
    program = compile_program(get_path("linear"), scheduler.sigmas, solver, "velocity")
    same(our_rows(program), normal_form_of(scheduler))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_flow_match_euler(steps, stochastic):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    path = get_path("linear")
    theirs = no_scaling(scheduler)
    program = compile_program(path, scheduler.sigmas, "flow-stochastic" if stochastic else "euler", "velocity")
    same(our_rows(program), theirs)
    if not stochastic:  # on the straight path DDIM is the same map
        same(our_rows(compile_program(path, scheduler.sigmas, "ddim", "velocity")), our_rows(program))


@pytest.mark.parametrize("steps", STEPS)
def test_flow_match_heun(steps):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    program = compile_program(get_path("linear"), grid(scheduler.sigmas), "heun", "velocity")
    same(our_rows(program), no_scaling(scheduler))


def no_scaling(scheduler):
    """Flow schedulers have no `scale_model_input`."""
    type(scheduler).scale_model_input = lambda self, x, t: x
    try:
        return normal_form_of(scheduler)
    finally:
        del type(scheduler).scale_model_input
